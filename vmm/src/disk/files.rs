//! Opens files that are images, or are named by one, with QEMU's locks.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{FileStorage, Format, Opener, Storage};

use super::Error;
use super::lock::{Use, lock};

/// Opens and locks a file of the host.
pub(crate) fn storage(path: &Path, how: Use) -> io::Result<Arc<dyn Storage>> {
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
pub(crate) fn recognise(path: &Path, storage: &dyn Storage) -> Result<Format, Error> {
    match cowshed_qcow::is_qcow2(storage) {
        Ok(true) => Ok(Format::Qcow2),
        Ok(false) => Err(Error::Unnamed(path.to_path_buf())),
        Err(source) => Err(Error::open(path, source)),
    }
}

/// Gives a chain its top, which is open already, and then opens what that names.
pub(crate) struct Files {
    top: Cell<Option<Arc<dyn Storage>>>,
    below: Use,
}

impl Files {
    /// `below` is how the others are used if they are not to be written.
    pub(crate) fn under(top: Arc<dyn Storage>, below: Use) -> Self {
        Self {
            top: Cell::new(Some(top)),
            below,
        }
    }
}

impl Opener for Files {
    fn open(&self, path: &Path, writable: bool) -> io::Result<Arc<dyn Storage>> {
        match self.top.take() {
            Some(top) => Ok(top),
            None => storage(path, if writable { Use::Write } else { self.below }),
        }
    }
}
