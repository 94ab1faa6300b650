//! `cowshed img resize`.

use std::io::Write as _;
use std::path::PathBuf;

use clap::Args;
use cowshed_qcow::{Format, Preallocation, ResizeOptions};

use super::Failure;
use super::common::{self, human};
use super::open::Access;
use super::options;
use crate::cli::value;
use crate::disk::lock::Use;

/// Make a disk larger or smaller.
///
/// What it gains reads as zeros, whatever its backing file has there. The partitions and file
/// systems on it stay as they are: shrink those first, grow them afterwards.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cowshed img resize disk.qcow2 40G
  cowshed img resize disk.qcow2 +10G
  cowshed img resize --shrink disk.qcow2 20G")]
pub(super) struct ResizeArgs {
    /// Format of the image
    #[arg(short, value_name = "FORMAT", value_parser = common::format)]
    format: Option<Format>,

    /// The disk may become smaller: what lies past its new end is lost
    #[arg(long)]
    shrink: bool,

    /// What of the gain is allocated at once: off, metadata, falloc or full
    #[arg(long, value_name = "MODE", default_value = "off")]
    preallocation: String,

    /// Say nothing
    #[arg(short)]
    quiet: bool,

    #[command(flatten)]
    access: Access,

    /// The image
    image: PathBuf,

    /// The new size, with an optional k, M, G, T, P or E; with + or - before it, the change
    #[arg(allow_hyphen_values = true)]
    size: String,
}

pub(super) fn run(args: &ResizeArgs) -> Result<u8, Failure> {
    let preallocation: Preallocation = options::preallocation(&args.preallocation)?;
    let named = args.access.name(&args.image, args.format)?;
    let image = args.access.open(&named, Use::Write)?;
    let size = wanted(&args.size, image.size())?;
    if size < image.size() && !args.shrink {
        let (path, old) = (named.path.display(), human(image.size()));
        let text = format!(
            "{path} has {old}: to make it smaller, and lose what lies past its new end, add --shrink"
        );
        return Err(Failure::Usage(text));
    }
    image.resize(
        size,
        &ResizeOptions {
            shrink: args.shrink,
            preallocation,
        },
    )?;
    if !args.quiet {
        writeln!(
            std::io::stdout(),
            "{}: {}",
            named.path.display(),
            human(size)
        )?;
    }
    Ok(0)
}

/// The size that `text` asks for.
fn wanted(text: &str, old: u64) -> Result<u64, Failure> {
    let wrong = |reason: String| Failure::Usage(format!("the size {text:?}: {reason}"));
    let (sign, digits) = match text.split_at_checked(1) {
        Some((sign @ ("+" | "-"), digits)) => (sign, digits),
        _ => ("", text),
    };
    let size = value::size(digits).map_err(|error| wrong(error.to_string()))?;
    let size = match sign {
        "+" => old.checked_add(size),
        "-" => old.checked_sub(size),
        _ => Some(size),
    };
    size.filter(|size| *size <= i64::MAX as u64)
        .ok_or_else(|| wrong("the disk cannot be that size".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_absolute_or_changes() {
        assert_eq!(wanted("1G", 5).unwrap(), 1 << 30);
        assert_eq!(wanted("+1k", 1024).unwrap(), 2048);
        assert_eq!(wanted("-512", 1024).unwrap(), 512);
        assert_eq!(wanted("513", 0).unwrap(), 513);
        for bad in ["", "-2k", "+", "8E", "1X"] {
            assert!(wanted(bad, 1024).is_err(), "{bad}");
        }
    }
}
