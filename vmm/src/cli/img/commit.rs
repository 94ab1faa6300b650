//! `cowshed img commit`.

use std::cell::RefCell;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use cowshed_qcow::ops::{self, CommitOptions, Task};
use cowshed_qcow::{Format, Image, Opener, ResizeOptions, Storage};

use super::common::{self, Caches};
use super::open::{Access, Named, failed};
use super::progress::{self, Progress};
use super::{Failure, options};
use crate::cli::value;
use crate::disk::files::storage;
use crate::disk::lock::Use;

/// Move what an overlay has into its backing file.
///
/// The overlay is empty then. Other overlays of that backing file see it change: there must be
/// none. Ended before its time, it is run again.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cowshed img commit overlay.qcow2
  cowshed img commit -b base.qcow2 top.qcow2        what lies between goes there too
  cowshed img commit --object secret,id=k,file=password --image-opts \\
    driver=qcow2,file.filename=top.qcow2,backing.encrypt.key-secret=k")]
pub(super) struct CommitArgs {
    /// Format of the image
    #[arg(short, value_name = "FORMAT", value_parser = common::format)]
    format: Option<Format>,

    /// Commit into this file of the chain, by the name that an image of it records. What lies
    /// between goes there too, and keeps what it has
    #[arg(short, value_name = "BASE")]
    base: Option<String>,

    /// Leave the overlay as it is
    #[arg(short = 'd')]
    keep: bool,

    #[command(flatten)]
    progress: Progress,

    #[command(flatten)]
    caches: Caches,

    /// Go through at most this many bytes of the disk a second
    #[arg(short, value_name = "RATE", value_parser = value::size, default_value_t = 0, hide_default_value = true)]
    rate: u64,

    #[command(flatten)]
    access: Access,

    /// The overlay
    image: PathBuf,
}

/// Opens the files of a chain anew. Those of the base are open for writing already, and locked: its
/// data file too.
struct Chain<'a> {
    access: &'a Access,
    base: RefCell<Vec<(PathBuf, Arc<dyn Storage>)>>,
}

impl Opener for Chain<'_> {
    fn open(&self, path: &Path, writable: bool) -> io::Result<Arc<dyn Storage>> {
        let mut base = self.base.borrow_mut();
        if let Some((_, file)) = base.iter().find(|(at, _)| at == path) {
            return Ok(file.clone());
        }
        if !writable {
            return storage(path, self.access.reading());
        }
        let file = storage(path, Use::Write)?;
        base.push((path.to_owned(), file.clone()));
        Ok(file)
    }
}

pub(super) fn run(args: &CommitArgs) -> Result<u8, Failure> {
    let access = &args.access;
    let named = access.name(&args.image, args.format)?;
    let path = &named.path;
    // Which files there are is to be known before one of them is opened for writing.
    let chain = access.open(&named, access.reading())?;
    let above = base_of(args, path, &chain)?;
    let base_path = chain
        .paths()
        .get(above)
        .map_or(PathBuf::new(), PathBuf::from);
    let formats = chain.format(0).zip(chain.format(above));
    let (format, base_format) = formats.unwrap_or((Format::Qcow2, Format::Raw));
    drop(chain);

    let beneath = Named {
        secrets: named.secrets_from(above),
        ..Named::path(&base_path, Some(base_format))
    };
    let (file, _) = access.file(&beneath, Use::Write)?;
    let options = access.options(&beneath, base_format, false);
    let files = Chain {
        access,
        base: RefCell::new(vec![(base_path.clone(), file)]),
    };
    let base = Image::open(&base_path, &options, &files)?;
    let top = Image::open(path, &access.options(&named, format, false), &files)?;
    if top.paths().get(above) != Some(&&*base_path) {
        let text = format!("the chain of {} has just changed", path.display());
        return Err(Failure::Usage(text));
    }
    if base.size() < top.size() {
        base.resize(top.size(), &ResizeOptions::default())?;
    }
    let options = CommitOptions {
        above,
        make_empty: !args.keep && above == 1,
        threads: common::threads(),
    };
    progress::watch(&args.progress, &Task::with_rate(args.rate), |task| {
        ops::commit(&top, &base, &options, task)
    })?;
    Ok(0)
}

/// How deep in the chain the base is.
fn base_of(args: &CommitArgs, path: &Path, chain: &Image) -> Result<usize, Failure> {
    let Some(base) = &args.base else {
        if chain.depth() > 1 {
            return Ok(1);
        }
        let text = format!("{} has no backing file to commit to", path.display());
        return Err(Failure::Usage(text));
    };
    let wanted = options::beside(path, base);
    let real = |path: &Path| path.canonicalize().map_err(|error| failed(path, error));
    let wanted = real(&wanted)?;
    for (depth, file) in chain.paths().into_iter().enumerate().skip(1) {
        if real(file)? == wanted {
            return Ok(depth);
        }
    }
    let text = format!("{base} is not in the chain of {}", path.display());
    Err(Failure::Usage(text))
}
