//! `cowshed img compare`.

use std::io::Write as _;
use std::path::PathBuf;

use clap::Args;
use cowshed_qcow::Format;
use cowshed_qcow::ops::{Difference, Task, compare};

use super::Failure;
use super::common::{self, Caches, threads};
use super::open::Access;
use super::progress::{self, Progress};

/// Status of a comparison that could not be made: 1 is a difference.
pub(super) const FAILED: u8 = 2;

/// Compare what two images have.
///
/// Ends with 0 if they have the same, with 1 if they differ, with 2 if that cannot be told. If
/// one is longer, the rest of it must be zeros.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cowshed img compare -f raw -F qcow2 disk.raw disk.qcow2
  cowshed img compare -q one.qcow2 other.qcow2 || echo different")]
pub(super) struct CompareArgs {
    /// Format of the first image
    #[arg(short, value_name = "FORMAT", value_parser = common::format)]
    format: Option<Format>,

    /// Format of the second image
    #[arg(short = 'F', value_name = "FORMAT", value_parser = common::format)]
    second_format: Option<Format>,

    /// Different sizes are a difference, and so is where the images have holes
    #[arg(short)]
    strict: bool,

    #[command(flatten)]
    progress: Progress,

    #[command(flatten)]
    caches: Caches,

    #[command(flatten)]
    access: Access,

    /// One image
    first: PathBuf,

    /// The other
    second: PathBuf,
}

pub(super) fn run(args: &CompareArgs) -> Result<u8, Failure> {
    let open = |path, format| {
        let named = args.access.name(path, format)?;
        args.access.open(&named, args.access.reading())
    };
    let first = open(&args.first, args.format)?;
    let second = open(&args.second, args.second_format)?;
    let say = |line: &str| match args.progress.quiet {
        true => Ok(()),
        false => writeln!(std::io::stdout(), "{line}"),
    };
    if args.strict && first.size() != second.size() {
        say("Strict mode: Image size mismatch!")?;
        return Ok(1);
    }
    let found = progress::watch(&args.progress, &Task::default(), |task| {
        compare(&first, &second, args.strict, threads(), task)
    })?;
    if found.sizes_differ {
        say("Warning: Image size mismatch!")?;
    }
    match found.difference {
        None => say("Images are identical.")?,
        Some(Difference::Content { offset }) => {
            say(&format!("Content mismatch at offset {offset}!"))?;
        }
        Some(Difference::Allocation { offset }) => say(&format!(
            "Strict mode: Offset {offset} block status mismatch!"
        ))?,
    }
    Ok(u8::from(found.difference.is_some()))
}
