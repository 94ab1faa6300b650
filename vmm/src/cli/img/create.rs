//! `cowshed img create`.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use cowshed_qcow::{Format, Image, OpenOptions};

use super::open::{Access, Named};
use super::options::{self, Wanted};
use super::target::Target;
use super::{Failure, common};
use crate::cli::value;

/// Create an image.
///
/// Without -f the format is raw, as with qemu-img. With a backing file its size is the default.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cowshed img create -f qcow2 disk.qcow2 20G
  cowshed img create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
  cowshed img create -f qcow2 --object secret,id=k,file=password \\
    -o encrypt.format=luks,encrypt.key-secret=k secret.qcow2 20G
  cowshed img create -f qcow2 -o help")]
pub(super) struct CreateArgs {
    /// Format of the new image
    #[arg(short, value_name = "FORMAT", value_parser = common::format, default_value = "raw")]
    format: Format,

    /// Backing file: what the image does not have is read from there, and never written. The name
    /// is recorded; it is seen from the folder of the new image
    #[arg(short, value_name = "BACKING")]
    backing: Option<String>,

    /// Format of the backing file
    #[arg(short = 'F', value_name = "FORMAT", value_parser = common::format)]
    backing_format: Option<Format>,

    /// Do not open the backing file
    #[arg(short)]
    unsafe_backing: bool,

    /// Options of the format, such as cluster_size=4k,compat=1.1; `-o help` lists them
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,

    /// Say nothing
    #[arg(short)]
    quiet: bool,

    #[command(flatten)]
    access: Access,

    /// The new image. A file that is there is replaced
    #[arg(required_unless_present = "options")]
    image: Option<PathBuf>,

    /// Size of the disk, with an optional k, M, G, T, P or E
    #[arg(value_parser = value::size)]
    size: Option<u64>,
}

pub(super) fn run(args: &CreateArgs) -> Result<u8, Failure> {
    let help = args
        .options
        .iter()
        .any(|list| list == "help" || list == "?");
    if help {
        std::io::stdout().write_all(options::HELP.as_bytes())?;
        return Ok(0);
    }
    let usage = |text: &str| Err(Failure::Usage(text.to_owned()));
    let Some(path) = &args.image else {
        return usage("which file is to be created?");
    };
    let wanted = Wanted::parse(&args.options, args.backing.as_deref(), args.backing_format)?;
    let backing = match &wanted.backing_file {
        Some(name) if !args.unsafe_backing => {
            Some(open_backing(args, path, name, wanted.backing_format)?)
        }
        _ => None,
    };
    let size = args.size.or(wanted.size);
    let Some(size) = size.or_else(|| backing.as_ref().map(Image::size)) else {
        return usage("how large is the disk to be? Give a size after the file's name");
    };
    let size = size.checked_next_multiple_of(512).ok_or_else(too_large)?;
    let needed: Vec<_> = backing.iter().collect();
    let target = Target::begin(path, &wanted, true, &needed)?;
    target.make(args.format, &wanted, size, &args.access.object)?;
    target.publish()?;
    if !args.quiet {
        let (path, format, size) = (path.display(), args.format.name(), common::human(size));
        writeln!(std::io::stdout(), "{path}: {format}, {size}")?;
    }
    Ok(0)
}

fn too_large() -> Failure {
    Failure::Usage("the size is too large".into())
}

/// Opens a backing file, to see that it can be, and how large its disk is.
fn open_backing(
    args: &CreateArgs,
    image: &Path,
    backing: &str,
    format: Option<Format>,
) -> Result<Image, Failure> {
    let named = Named::path(&options::beside(image, backing), format);
    let (file, format) = args.access.file(&named, args.access.reading())?;
    let options = OpenOptions {
        stay_locked: true,
        ..args.access.options(&named, format, true)
    };
    args.access.open_file(&named.path, file, &options)
}
