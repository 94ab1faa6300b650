//! Opens images that a person named, and what lies beneath them.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cowshed_qcow::storage::Identity;
use cowshed_qcow::{FileStorage, Format, Image, OpenOptions, Opener, ReferencePolicy, Storage};

use super::Error;
use super::lock::{Use, lock};
use crate::config;

/// An image that a person named, open.
pub(super) struct Base {
    /// Its chain.
    pub(super) image: Image,
    /// The path that the person gave.
    pub(super) path: PathBuf,
    /// Its format.
    pub(super) format: Format,
    /// Which file it is.
    pub(super) identity: Option<Identity>,
}

/// Opens a disk's image. What is beneath it is only read, however it is opened itself.
pub(super) fn open(disk: &config::Disk, how: Use) -> Result<Base, Error> {
    let path = &disk.path;
    let storage = storage(path, how).map_err(|source| Error::open(path, source))?;
    let format = match disk.format {
        Some(format) => name(format),
        None => recognise(path, &*storage)?,
    };
    let identity = storage
        .identity()
        .map_err(|source| Error::open(path, source))?;
    let options = OpenOptions {
        read_only: how == Use::Read,
        references: match disk.allow_outside {
            true => ReferencePolicy::Any,
            false => ReferencePolicy::OwnFolder,
        },
        backing_format: disk.backing_format.map(name),
        ..OpenOptions::new(format)
    };
    let image = Image::open(
        path,
        &options,
        &Files {
            top: Cell::new(Some(storage)),
        },
    )?;
    Ok(Base {
        image,
        path: path.clone(),
        format,
        identity,
    })
}

/// Opens and locks a file of the host.
pub(super) fn storage(path: &Path, how: Use) -> io::Result<Arc<dyn Storage>> {
    let kind = path.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::other("it is neither a file nor a block device"));
    }
    let file = File::options()
        .read(true)
        .write(how == Use::Write)
        .open(path)?;
    lock(&file, how).map_err(io::Error::other)?;
    Ok(Arc::new(FileStorage::new(file)))
}

/// The format of a file that a person named without its format.
fn recognise(path: &Path, storage: &dyn Storage) -> Result<Format, Error> {
    match cowshed_qcow::is_qcow2(storage) {
        Ok(true) => Ok(Format::Qcow2),
        Ok(false) => Err(Error::Unnamed(path.to_path_buf())),
        Err(source) => Err(Error::open(path, source)),
    }
}

fn name(format: config::Format) -> Format {
    match format {
        config::Format::Qcow2 => Format::Qcow2,
        config::Format::Raw => Format::Raw,
    }
}

/// Gives a chain its top, which is open already, and then opens what that names.
struct Files {
    top: Cell<Option<Arc<dyn Storage>>>,
}

impl Opener for Files {
    fn open(&self, path: &Path, writable: bool) -> io::Result<Arc<dyn Storage>> {
        match self.top.take() {
            Some(top) => Ok(top),
            None => storage(path, if writable { Use::Write } else { Use::Read }),
        }
    }
}
