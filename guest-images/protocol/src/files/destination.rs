//! Where the root of a tree goes.

use alloc::vec::Vec;

use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// Where the root of a tree goes.
pub(super) enum Place {
    /// It becomes the entry of this name in this directory.
    Entry(OwnedFd, Vec<u8>),
    /// It is a directory whose entries go into this one.
    Merge(OwnedFd),
}

/// Finds the place of a tree whose root is called `name`, or has none, by the rules of
/// [`files`](crate::files).
pub(super) fn place(
    at: BorrowedFd<'_>,
    destination: &[u8],
    name: &[u8],
    is_directory: bool,
) -> Result<Place, Errno> {
    match open_directory(at, destination) {
        Ok(directory) if name.is_empty() => Ok(Place::Merge(directory)),
        Ok(directory) => Ok(Place::Entry(directory, name.to_vec())),
        Err(Errno::NOENT | Errno::NOTDIR) => {
            let end = destination
                .iter()
                .rposition(|byte| *byte != b'/')
                .map_or(0, |last| last + 1);
            if end < destination.len() && !is_directory {
                return Err(Errno::NOTDIR);
            }
            let path = destination.get(..end).unwrap_or_default();
            let split = path
                .iter()
                .rposition(|byte| *byte == b'/')
                .map_or(0, |slash| slash + 1);
            let (parent, name) = path.split_at(split);
            let parent = if parent.is_empty() { b"." } else { parent };
            Ok(Place::Entry(open_directory(at, parent)?, name.to_vec()))
        }
        Err(errno) => Err(errno),
    }
}

fn open_directory(at: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(at, path, flags, Mode::empty())
}
