//! Opens files that are images, or are named by one, with QEMU's locks.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::storage::Identity;
use cowshed_qcow::{FileStorage, Format, Opener, Storage};

use super::Error;
use super::lock::{Use, lock};
use crate::config::Cache;

/// What direct I/O moves, in the file and in memory, is multiples of this many bytes: a page of the
/// host's cache, and no less than any disk's block.
pub(super) const ALIGNMENT: u64 = 4096;

/// Opens and locks a file of the host.
pub(crate) fn storage(path: &Path, how: Use) -> io::Result<Arc<dyn Storage>> {
    Ok(Arc::new(FileStorage::new(open(path, how)?)))
}

/// The same for a guest's disk.
pub(super) fn guest_storage(path: &Path, how: Use, cache: Cache) -> io::Result<Arc<dyn Storage>> {
    let storage = for_guest(open(path, how)?, how, cache)?;
    Ok(Arc::new(storage))
}

/// Makes storage for a guest's disk of an open file.
pub(super) fn for_guest(file: File, how: Use, cache: Cache) -> io::Result<FileStorage> {
    let handle = second_handle(&file, how, cache)?;
    let storage = match cache {
        Cache::Unsafe => FileStorage::without_sync(file),
        Cache::Writeback | Cache::None => FileStorage::new(file),
    };
    Ok(storage.with_handle(handle))
}

/// The file that the disk's engine works with. It is opened a second time because the kernel holds
/// on to the files of an io_uring for a while after the process has ended: the locks, which
/// belong to the first, are to end with the process.
///
/// With [`Cache::None`] it goes past the page cache, and the first does not. That is sound because
/// only whole pages go past it ([`ALIGNMENT`]), and the kernel writes out and drops the pages that
/// it passes: both see the same unless two requests for one page overlap in time. A disk's tables
/// share no page with what is moved past the cache, and who fills a cluster that is new has its pages
/// for itself until it is committed. So that leaves requests that overlap in place too, of which a
/// guest is promised nothing.
fn second_handle(file: &File, how: Use, cache: Cache) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(how == Use::Write);
    if cache == Cache::None {
        options.custom_flags(libc::O_DIRECT);
    }
    match options.open(format!("/proc/self/fd/{}", file.as_raw_fd())) {
        Err(error) if cache == Cache::None && error.raw_os_error() == Some(libc::EINVAL) => {
            let advice = "its file system has no direct I/O: leave cache=none out";
            Err(io::Error::new(io::ErrorKind::Unsupported, advice))
        }
        // Without /proc, locks last a little longer.
        Err(_) if cache != Cache::None => file.try_clone(),
        opened => opened,
    }
}

fn open(path: &Path, how: Use) -> io::Result<File> {
    let kind = path.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::other("it is neither a file nor a block device"));
    }
    let file = File::options()
        .read(true)
        .write(how == Use::Write)
        .open(path)?;
    lock(&file, how).map_err(io::Error::other)?;
    Ok(file)
}

/// Which file a path leads to, if it leads to one.
pub(crate) fn identity(path: &Path) -> Option<Identity> {
    let metadata = path.metadata().ok()?;
    Some(Identity {
        device: metadata.dev(),
        inode: metadata.ino(),
    })
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
    /// For a guest's disk.
    cache: Option<Cache>,
}

impl Files {
    /// `below` is how the others are used if they are not to be written.
    pub(crate) fn under(top: Arc<dyn Storage>, below: Use) -> Self {
        Self {
            top: Cell::new(Some(top)),
            below,
            cache: None,
        }
    }

    /// The same for a guest's disk: the others are only read.
    pub(super) fn under_guest(top: Arc<dyn Storage>, cache: Cache) -> Self {
        Self {
            cache: Some(cache),
            ..Self::under(top, Use::Read)
        }
    }
}

impl Opener for Files {
    fn open(&self, path: &Path, writable: bool) -> io::Result<Arc<dyn Storage>> {
        let how = if writable { Use::Write } else { self.below };
        match (self.top.take(), self.cache) {
            (Some(open), _) => Ok(open),
            (None, Some(cache)) => guest_storage(path, how, cache),
            (None, None) => storage(path, how),
        }
    }
}
