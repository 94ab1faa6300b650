//! `cowshed img rebase`.

use std::path::PathBuf;

use clap::Args;
use cowshed_qcow::ops::{self, Task};
use cowshed_qcow::{Backing, Format};

use super::common::{self, Caches};
use super::open::{Access, Named};
use super::progress::{self, Progress};
use super::{Failure, options};
use crate::disk::lock::Use;

/// Give an image another backing file.
///
/// What the old one gave it and the new one would not is copied into the image first, so that the
/// disk stays as it is. Ended before its time, it is run again.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cowshed img rebase -b newer.qcow2 -F qcow2 overlay.qcow2
  cowshed img rebase -b '' overlay.qcow2                        no backing file any more
  cowshed img rebase -c -b '' overlay.qcow2                     the same, compressed
  cowshed img rebase -u -b moved.qcow2 -F qcow2 overlay.qcow2   only the name changes")]
pub(super) struct RebaseArgs {
    /// Format of the image
    #[arg(short, value_name = "FORMAT", value_parser = common::format)]
    format: Option<Format>,

    /// The new backing file, as seen from the folder of the image; empty: none
    #[arg(short, value_name = "BACKING")]
    backing: String,

    /// Format of the new backing file
    #[arg(short = 'F', value_name = "FORMAT", value_parser = common::format)]
    backing_format: Option<Format>,

    /// Change the name only, and open neither backing file: the disk is what the new one makes
    /// of it
    #[arg(short)]
    unsafe_rebase: bool,

    /// Compress the clusters that are copied into the image; of what it has a part of, that and the
    /// rest stay as they are
    #[arg(short)]
    compress: bool,

    #[command(flatten)]
    progress: Progress,

    #[command(flatten)]
    caches: Caches,

    #[command(flatten)]
    access: Access,

    /// The image
    image: PathBuf,
}

pub(super) fn run(args: &RebaseArgs) -> Result<u8, Failure> {
    let backing = match (args.backing.as_str(), args.backing_format) {
        ("", _) => None,
        (_, None) => {
            let text = "name the new backing file's format, with -F: it is never guessed";
            return Err(Failure::Usage(text.into()));
        }
        (name, format) => Some(Backing {
            name: name.to_owned(),
            format,
        }),
    };
    let access = &args.access;
    let named = access.name(&args.image, args.format)?;
    if args.unsafe_rebase {
        access
            .open_alone(&named, Use::Write)?
            .set_backing(backing)?;
        return Ok(0);
    }
    let image = access.open(&named, Use::Write)?;
    let new = match &backing {
        None => None,
        Some(backing) => {
            let path = options::beside(&named.path, &backing.name);
            let named = Named::path(&path, backing.format);
            Some(access.open(&named, access.reading())?)
        }
    };
    progress::watch(&args.progress, &Task::default(), |task| {
        let threads = common::threads();
        ops::rebase(&image, new.as_ref(), args.compress, threads, task)
    })?;
    image.set_backing(backing)?;
    Ok(0)
}
