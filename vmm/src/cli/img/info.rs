//! `cowshed img info`.

mod json;

use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use cowshed_qcow::storage::Identity;
use cowshed_qcow::{Compression, EncryptionInfo, Format, Info, Storage};

use super::common::{self, Output, human};
use super::open::{Access, Named};
use super::{Failure, options, snapshot};

/// Files of a chain that are looked at.
const MAX_DEPTH: usize = 512;

/// Show what an image says of itself.
///
/// Neither its backing file nor its data file is opened, and no password is needed.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cowshed img info disk.qcow2
  cowshed img info --output json --backing-chain overlay.qcow2")]
pub(super) struct InfoArgs {
    /// Format of the image
    #[arg(short, value_name = "FORMAT", value_parser = common::format)]
    format: Option<Format>,

    /// How to answer
    #[arg(long, value_name = "HOW", default_value = "human")]
    output: Output,

    /// Show the backing files too, which are opened
    #[arg(long)]
    backing_chain: bool,

    #[command(flatten)]
    access: Access,

    /// The image
    image: PathBuf,
}

/// A file of the chain.
struct Described {
    path: PathBuf,
    /// Bytes of the file.
    len: u64,
    allocated: u64,
    content: Content,
}

enum Content {
    Raw,
    Qcow2(Box<Info>),
}

impl Described {
    fn format(&self) -> Format {
        match self.content {
            Content::Raw => Format::Raw,
            Content::Qcow2(_) => Format::Qcow2,
        }
    }

    /// Where the backing file that it records is looked for.
    fn backing(&self) -> Option<(PathBuf, Option<Format>)> {
        let Content::Qcow2(info) = &self.content else {
            return None;
        };
        let backing = info.backing.as_ref()?;
        let path = options::beside(&self.path, &backing.name);
        Some((path, backing.format))
    }
}

pub(super) fn run(args: &InfoArgs) -> Result<u8, Failure> {
    let mut named = args.access.name(&args.image, args.format)?;
    let mut chain = Vec::new();
    let mut passed: Vec<Identity> = Vec::new();
    loop {
        let (file, format) = args.access.file(&named, args.access.reading())?;
        let failed = |error| super::open::failed(&named.path, error);
        if let Some(identity) = file.identity().map_err(failed)? {
            if passed.contains(&identity) || passed.len() == MAX_DEPTH {
                let path = named.path.display();
                let text = format!("the chain comes back to {path}, or has no end");
                return Err(Failure::Usage(text));
            }
            passed.push(identity);
        }
        let described = describe(&named.path, file, format)?;
        let next = described.backing().filter(|_| args.backing_chain);
        chain.push(described);
        let Some((path, format)) = next else { break };
        if format.is_none() {
            let text = format!(
                "the format of {} is not recorded, and never guessed",
                path.display()
            );
            return Err(Failure::Usage(text));
        }
        named = Named::path(&path, format);
    }
    match args.output {
        Output::Json => json::print(&chain, args.backing_chain)?,
        Output::Human => {
            for (i, file) in chain.iter().enumerate() {
                if i > 0 {
                    writeln!(std::io::stdout())?;
                }
                print(file)?;
            }
        }
    }
    Ok(0)
}

fn describe(
    path: &Path,
    file: std::sync::Arc<dyn Storage>,
    format: Format,
) -> Result<Described, Failure> {
    let failed = |error| super::open::failed(path, error);
    let len = file.len().map_err(failed)?;
    let allocated = file.allocated().map_err(failed)?;
    let content = match format {
        Format::Raw => Content::Raw,
        Format::Qcow2 => Content::Qcow2(Box::new(Info::read(path, file)?)),
    };
    Ok(Described {
        path: path.to_owned(),
        len,
        allocated,
        content,
    })
}

/// What people ask of an image, the usual left out.
fn print(file: &Described) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    let mut line = |name: &str, value: String| writeln!(out, "{name:<16}{value}");
    let size = |bytes: u64| format!("{} ({bytes} bytes)", human(bytes));
    line("image", file.path.display().to_string())?;
    let info = match &file.content {
        Content::Raw => {
            line("format", "raw".into())?;
            line("disk", size(file.len.next_multiple_of(512)))?;
            line("on the host", size(file.allocated))?;
            return Ok(());
        }
        Content::Qcow2(info) => info,
    };
    line("format", format!("qcow2, version {}", info.version))?;
    line("disk", size(info.virtual_size))?;
    line("on the host", size(file.allocated))?;
    line("clusters", human(info.cluster_size.into()))?;
    if let Some(backing) = &info.backing {
        let format = backing.format.map_or("format not recorded", Format::name);
        line("backing file", format!("{} ({format})", backing.name))?;
    }
    if let Some(name) = &info.data_file {
        let raw = if info.data_file_raw { " (raw)" } else { "" };
        line("data file", format!("{name}{raw}"))?;
    }
    match &info.encryption {
        None => {}
        Some(EncryptionInfo::LegacyAes) => line("encryption", "AES-128, weak".into())?,
        Some(EncryptionInfo::Luks(luks)) => {
            let used = luks.slots.iter().filter(|slot| slot.iterations.is_some());
            let (cipher, bits, mode) = (&luks.cipher, luks.key_bits, &luks.cipher_mode);
            let passwords = used.count();
            let text = format!("LUKS, {cipher}-{bits}-{mode}, {passwords} passwords");
            line("encryption", text)?;
        }
    }
    let mut features = Vec::new();
    if info.compression == Compression::Zstd {
        features.push("zstd".to_owned());
    }
    if info.extended_l2 {
        features.push("subclusters".to_owned());
    }
    if info.refcount_bits != 16 {
        features.push(format!("refcounts of {} bits", info.refcount_bits));
    }
    if info.lazy_refcounts {
        features.push("lazy refcounts".to_owned());
    }
    if !features.is_empty() {
        line("features", features.join(", "))?;
    }
    if info.dirty {
        let text = "not closed, or in use: its refcounts are rebuilt when it is written next";
        line("state", text.into())?;
    }
    if info.corrupt {
        line("state", "CORRUPT: see cowshed img check".into())?;
    }
    for bitmap in &info.bitmaps {
        let mut state = vec![human(bitmap.granularity)];
        if bitmap.enabled {
            state.push("enabled".to_owned());
        }
        state.extend(bitmap.inconsistent.clone());
        line("bitmap", format!("{} ({})", bitmap.name, state.join(", ")))?;
    }
    drop(out);
    if !info.snapshots.is_empty() {
        writeln!(std::io::stdout(), "\nsnapshots")?;
        snapshot::list(&info.snapshots)?;
    }
    Ok(())
}
