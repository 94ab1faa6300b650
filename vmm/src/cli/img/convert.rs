//! `cowshed img convert`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use cowshed_qcow::ops::{CopyOptions, Task, copy};
use cowshed_qcow::{Format, Image, OpenOptions, Selector, Storage};

use super::Failure;
use super::common::{self, Cache, threads};
use super::open::{Access, Named};
use super::options::{self, Wanted};
use super::progress::{self, Progress};
use super::target::Target;
use crate::cli::value;
use crate::disk::lock::Use;

/// Bytes of the disk whose marks are copied at a time.
const BITMAP_STEP: u64 = 1 << 40;

/// Copy images into a new one, perhaps of another format.
///
/// The target gets its name when it is whole: whatever happens before, there is none, or the old
/// one. Holes stay holes, and zeros become holes. Only a crash of the host right after the command can
/// lose what it wrote under a new name, as with qemu-img, unless -t writeback says to wait for the disk.
#[derive(Args, Debug)]
#[command(
    override_usage = "cowshed img convert [OPTIONS] <SOURCE>... <TARGET>",
    after_help = "\
Examples:
  cowshed img convert -f raw -O qcow2 disk.raw disk.qcow2
  cowshed img convert -O qcow2 -c -o compression_type=zstd disk.qcow2 small.qcow2
  cowshed img convert -O qcow2 -B base.qcow2 -F qcow2 overlay.qcow2 moved.qcow2
  cowshed img convert -O raw overlay.qcow2 flat.raw
  cowshed img convert -O qcow2 -l before disk.qcow2 was.qcow2
  cowshed img convert --object secret,id=k,file=password -O qcow2 \\
    -o encrypt.format=luks,encrypt.key-secret=k disk.qcow2 secret.qcow2
  cowshed img convert --object secret,id=k,file=password -O qcow2 \\
    --image-opts driver=qcow2,file.filename=secret.qcow2,encrypt.key-secret=k open.qcow2"
)]
pub(super) struct ConvertArgs {
    /// Format of the sources
    #[arg(short, value_name = "FORMAT", value_parser = common::format)]
    format: Option<Format>,

    /// Format of the target
    #[arg(short = 'O', value_name = "FORMAT", value_parser = common::format, default_value = "raw")]
    output_format: Format,

    /// Options of the target's format; `-o help` lists them
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,

    /// Compress the target's clusters
    #[arg(short)]
    compress: bool,

    /// Backing file of the target: only what differs from it is copied
    #[arg(short = 'B', value_name = "BACKING")]
    backing: Option<String>,

    /// Format of the backing file
    #[arg(short = 'F', value_name = "FORMAT", value_parser = common::format)]
    backing_format: Option<Format>,

    /// Copy a snapshot that is in the source: an ID or a name, snapshot.id=ID or
    /// snapshot.name=NAME
    #[arg(short = 'l', value_name = "SNAPSHOT")]
    snapshot: Option<String>,

    /// Zeros of at least this many bytes become holes; 0: none do, and all is allocated
    #[arg(short = 'S', value_name = "SIZE", value_parser = value::size, default_value = "4k")]
    sparse: u64,

    /// The host copies, and no zeros are looked for: two files on btrfs or XFS share their blocks
    /// at once. (Without -C they are read once, and what is not zeros is shared all the same.)
    #[arg(short = 'C', conflicts_with_all = ["compress", "sparse", "salvage"])]
    offload: bool,

    /// How many parts are copied at a time
    #[arg(short = 'm', value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=16))]
    parallel: Option<u16>,

    /// Write the target in any order
    #[arg(short = 'W')]
    out_of_order: bool,

    /// Write to a target that is there, and is large enough
    #[arg(short = 'n')]
    no_create: bool,

    /// Whether a target under a new name is on the disk when the command ends
    #[arg(short = 't', value_name = "CACHE", value_enum, default_value_t = Cache::Unsafe)]
    cache: Cache,

    /// Taken for scripts: sources are read by way of the host's cache
    #[arg(short = 'T', value_name = "CACHE", value_enum)]
    source_cache: Option<Cache>,

    /// With -n: the target reads as zeros
    #[arg(long, requires = "no_create")]
    target_is_zero: bool,

    /// Copy at most this many bytes of the disk a second
    #[arg(short, value_name = "RATE", value_parser = value::size, default_value_t = 0, hide_default_value = true)]
    rate: u64,

    /// Copy what can be read: what cannot is zeros, with a warning
    #[arg(long)]
    salvage: bool,

    /// Copy the persistent bitmaps of the source too
    #[arg(long)]
    bitmaps: bool,

    /// With --bitmaps: leave out bitmaps that are inconsistent
    #[arg(long, requires = "bitmaps")]
    skip_broken_bitmaps: bool,

    /// With -n: the target is named by options, as with --image-opts
    #[arg(long, requires = "no_create")]
    target_image_opts: bool,

    #[command(flatten)]
    progress: Progress,

    #[command(flatten)]
    access: Access,

    /// The sources, one after the other on the new disk, and the target
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

pub(super) fn run(args: &ConvertArgs) -> Result<u8, Failure> {
    let usage = |text: &str| Err(Failure::Usage(text.to_owned()));
    let (path, sources) = match args.files.split_last() {
        Some((path, sources)) if !sources.is_empty() => (path, sources),
        _ => return usage("name the source and the target"),
    };
    let wanted = Wanted::parse(&args.options, args.backing.as_deref(), args.backing_format)?;
    if args.compress && args.output_format == Format::Raw {
        return usage("a raw image cannot be compressed: add -O qcow2");
    }
    if args.bitmaps && (args.output_format == Format::Raw || sources.len() > 1) {
        return usage("--bitmaps takes one source and a qcow2 target: add -O qcow2");
    }
    let snapshot = args.snapshot.as_deref().map(selector);
    let open = |path: &PathBuf| {
        let mut named = args.access.name(path, args.format)?;
        named.snapshot.clone_from(&snapshot);
        args.access.open(&named, args.access.reading())
    };
    let sources: Vec<Image> = sources.iter().map(open).collect::<Result<_, _>>()?;
    let size = sources.iter().map(Image::size).sum();
    if args.no_create {
        let named = if args.target_image_opts {
            args.access.name_by_options(path, None)?
        } else {
            Named::path(path, Some(args.output_format))
        };
        let target = args.access.open(&named, Use::Write)?;
        return convert(args, &sources, &target, args.target_is_zero).map(|()| 0);
    }
    let disk = wanted.size.unwrap_or(size).max(size);
    let base = match &wanted.backing_file {
        None => None,
        Some(backing) => {
            let backing = options::beside(path, backing);
            let named = Named::path(&backing, wanted.backing_format);
            Some(args.access.open(&named, args.access.reading())?)
        }
    };
    let needed: Vec<_> = sources.iter().chain(&base).collect();
    let new = Target::begin(path, &wanted, args.cache != Cache::Unsafe, &needed)?;
    let file = new.make(args.output_format, &wanted, disk, &args.access.object)?;
    let image = target(args, path, (file, new.data()?), &wanted, base)?;
    convert(args, &sources, &image, wanted.backing_file.is_none())?;
    drop(image);
    new.publish()?;
    Ok(0)
}

/// Opens a new target for writing.
fn target(
    args: &ConvertArgs,
    path: &Path,
    (file, data): (Arc<dyn Storage>, Option<Arc<dyn Storage>>),
    wanted: &Wanted,
    base: Option<Image>,
) -> Result<Image, Failure> {
    let mut named = Named::path(path, Some(args.output_format));
    named.secrets = wanted
        .secret(&args.access.object)?
        .map(|secret| (0, secret))
        .into_iter()
        .collect();
    let options = OpenOptions {
        data_file: data,
        ..args.access.options(&named, args.output_format, false)
    };
    Ok(Image::open_over(path, file, &options, base)?)
}

/// The snapshot that `-l` means.
fn selector(text: &str) -> Selector {
    match text.split_once('=') {
        Some(("snapshot.id", id)) => Selector::Id(id.into()),
        Some(("snapshot.name", name)) => Selector::Name(name.into()),
        _ => Selector::IdOrName(text.into()),
    }
}

/// Copies the bitmaps that can be used.
fn copy_bitmaps(source: &Image, target: &Image) -> Result<(), Failure> {
    for bitmap in source.bitmaps()? {
        if bitmap.inconsistent.is_some() {
            continue;
        }
        let granularity = u32::try_from(bitmap.granularity).ok();
        target.add_bitmap(&bitmap.name, granularity, bitmap.enabled)?;
        let size = source.size();
        for start in (0..size).step_by(BITMAP_STEP as usize) {
            let part = start..(start + BITMAP_STEP).min(size);
            let ranges = source.dirty_ranges(&bitmap.name, part)?;
            target.mark_bitmap(&bitmap.name, &ranges)?;
        }
    }
    Ok(())
}

fn convert(
    args: &ConvertArgs,
    sources: &[Image],
    target: &Image,
    target_is_zero: bool,
) -> Result<(), Failure> {
    let sparse = u32::try_from(args.sparse)
        .ok()
        .filter(|size| *size % 512 == 0);
    let Some(sparse) = sparse else {
        let text = "-S takes a multiple of 512 of less than 4G";
        return Err(Failure::Usage(text.into()));
    };
    let options = CopyOptions {
        sparse: (sparse > 0).then_some(sparse),
        threads: args.parallel.map_or_else(threads, usize::from),
        out_of_order: args.out_of_order,
        target_is_zero,
        only_differences: args.backing.is_some(),
        compress: args.compress,
        salvage: args.salvage,
        offload: args.offload,
    };
    let broken = sources.iter().flat_map(Image::bitmaps).flatten();
    let mut broken = broken.filter(|bitmap| bitmap.inconsistent.is_some());
    if let (true, false, Some(bitmap)) = (args.bitmaps, args.skip_broken_bitmaps, broken.next()) {
        return Err(Failure::Usage(format!(
            "the bitmap {:?} is inconsistent and cannot be copied: add --skip-broken-bitmaps, or \
             remove it with cowshed img bitmap --remove",
            bitmap.name
        )));
    }
    let mut at = 0;
    for source in sources {
        let task = Task::with_rate(args.rate);
        progress::watch(&args.progress, &task, |task| {
            copy(source, target, at, &options, task)
        })?;
        at += source.size();
    }
    if let (true, [source]) = (args.bitmaps, sources) {
        copy_bitmaps(source, target)?;
    }
    target.flush()?;
    Ok(())
}
