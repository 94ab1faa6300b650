//! `cowshed img commit`.

use std::cell::RefCell;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use cowshed_qcow::{Format, Image, Opener, ResizeOptions, Storage, ops};

use super::common;
use super::open::{Access, Named, failed};
use super::{Failure, progress};
use crate::disk::files::storage;
use crate::disk::lock::Use;

/// Move what an overlay has into its backing file.
///
/// The overlay is empty then. Other overlays of that backing file see it change: there must be
/// none. Ended before its time, it is run again.
#[derive(Args, Debug)]
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

    /// Show progress, also where standard error is no terminal
    #[arg(short)]
    progress: bool,

    /// Say nothing
    #[arg(short)]
    quiet: bool,

    #[command(flatten)]
    access: Access,

    /// The overlay
    image: PathBuf,
}

/// Opens the files of a chain, the base among them for writing, and keeps that.
struct Chain<'a> {
    access: &'a Access,
    /// The file that is to be written, if it is found: the first beneath the top, or this one.
    wanted: Option<PathBuf>,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    opened: usize,
    base: Option<(usize, PathBuf, Arc<dyn Storage>)>,
}

impl Opener for Chain<'_> {
    fn open(&self, path: &Path, writable: bool) -> io::Result<Arc<dyn Storage>> {
        let mut state = self.state.borrow_mut();
        let depth = state.opened;
        state.opened += 1;
        let is_base = match &self.wanted {
            None => depth == 1,
            Some(wanted) => depth > 0 && path.canonicalize().ok().as_ref() == Some(wanted),
        };
        let write = writable || is_base;
        let file = storage(
            path,
            if write {
                Use::Write
            } else {
                self.access.reading()
            },
        )?;
        if is_base {
            state.base = Some((depth, path.to_owned(), file.clone()));
        }
        Ok(file)
    }
}

pub(super) fn run(args: &CommitArgs) -> Result<u8, Failure> {
    let named = args.access.name(&args.image, args.format)?;
    let path = &named.path;
    // Which format it has is asked before it is opened for writing.
    let format = args.access.file(&named, args.access.reading())?.1;
    let wanted = args.base.as_ref().map(|base| {
        let base = super::options::beside(path, base);
        base.canonicalize().map_err(|error| failed(&base, error))
    });
    let chain = Chain {
        access: &args.access,
        wanted: wanted.transpose()?,
        state: RefCell::default(),
    };
    let top = Image::open(path, &args.access.options(&named, format, false), &chain)?;
    let Some((above, base_path, base_file)) = chain.state.into_inner().base else {
        return Err(Failure::Usage(match &args.base {
            Some(base) => format!("{base} is not in the chain of {}", path.display()),
            None => format!("{} has no backing file to commit to", path.display()),
        }));
    };
    let format = top.format(above).unwrap_or(Format::Raw);
    let beneath = Named::path(&base_path, Some(format));
    let options = args.access.options(&beneath, format, false);
    let base = args.access.open_file(&base_path, base_file, &options)?;
    if base.size() < top.size() {
        base.resize(top.size(), &ResizeOptions::default())?;
    }
    progress::watch(args.progress, args.quiet, |task| {
        ops::commit(&top, &base, above, task)
    })?;
    drop(base);
    if !args.keep && above == 1 {
        top.make_empty()?;
    }
    Ok(0)
}
