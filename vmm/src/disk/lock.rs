//! QEMU's image locks, so that cowshed, QEMU and `qemu-img` keep out of each other's way.
//!
//! An image's user says what it does and what it will not have others do, by shared locks on
//! single bytes of the file: byte `100 + p` is "I do p", byte `200 + p` is "nobody else may
//! do p", where p is 0 for reading consistent data, 1 for writing, 3 for resizing. First all
//! bytes are locked, then the opposite ones are asked for: who finds one of those locked by
//! someone else gives up. The locks belong to the open file description: they end with it, even
//! on SIGKILL. The bytes need not exist.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Once;

use super::holders::holders;

/// What is done with an image while it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Reading, whoever may be writing: what is read may be old, or make no sense.
    Look,
    /// Reading. Nobody else may write or resize it meanwhile.
    Read,
    /// Reading, writing, growing. Nobody else may do so meanwhile, or read.
    Write,
}

/// Why an image is not to be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    /// Another process writes it.
    #[error("another process{0} writes to it: wait for that to end")]
    Written(String),
    /// Another process relies on its content.
    #[error(
        "another process{0} uses it and would see it change: end that first, or write to an overlay"
    )]
    Read(String),
    /// Asking failed.
    #[error("cannot lock it")]
    Io(#[source] io::Error),
}

const DOES: libc::off_t = 100;
const FORBIDS: libc::off_t = 200;
const READ: libc::off_t = 0;
const WRITE: libc::off_t = 1;
const RESIZE: libc::off_t = 3;

/// Locks an image for as long as the file, or a duplicate of it, is open. A file system that has
/// no locks gets none, with one warning.
///
/// # Errors
/// Someone else's use and this one exclude each other.
pub(crate) fn lock(file: &File, how: Use) -> Result<(), LockError> {
    match claim(file, how) {
        Err(LockError::Io(error)) if no_locks_here(&error) => {
            static WARNING: Once = Once::new();
            WARNING.call_once(|| {
                tracing::warn!(
                    "the images' file system has no locks ({error}): \
                     nothing keeps others from writing to them"
                );
            });
            Ok(())
        }
        result => result,
    }
}

fn claim(file: &File, how: Use) -> Result<(), LockError> {
    let does: &[libc::off_t] = match how {
        Use::Look | Use::Read => &[READ],
        Use::Write => &[READ, WRITE, RESIZE],
    };
    let forbids: &[libc::off_t] = match how {
        Use::Look => &[],
        Use::Read | Use::Write => &[WRITE, RESIZE],
    };
    for byte in does
        .iter()
        .map(|p| DOES + p)
        .chain(forbids.iter().map(|p| FORBIDS + p))
    {
        share(file, byte).map_err(LockError::Io)?;
    }
    for p in does {
        if is_held(file, FORBIDS + p).map_err(LockError::Io)? {
            return Err(LockError::Read(holders(file)));
        }
    }
    for p in forbids {
        if is_held(file, DOES + p).map_err(LockError::Io)? {
            return Err(LockError::Written(holders(file)));
        }
    }
    Ok(())
}

fn no_locks_here(error: &io::Error) -> bool {
    let codes = [libc::ENOLCK, libc::EINVAL, libc::ENOSYS, libc::EOPNOTSUPP];
    error
        .raw_os_error()
        .is_some_and(|code| codes.contains(&code))
}

/// Takes a shared lock on one byte.
fn share(file: &File, byte: libc::off_t) -> io::Result<()> {
    fcntl(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte).map(drop)
}

/// Somebody else has a lock on this byte.
fn is_held(file: &File, byte: libc::off_t) -> io::Result<bool> {
    let found = fcntl(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte)?;
    Ok(libc::c_int::from(found.l_type) != libc::F_UNLCK)
}

fn fcntl(
    file: &File,
    command: libc::c_int,
    kind: libc::c_int,
    byte: libc::off_t,
) -> io::Result<libc::flock> {
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        // The kernel asks for this in open file description locks.
        l_pid: 0,
    };
    // SAFETY: both commands take a pointer to a `flock`, which lives across the call, and the
    // descriptor is open while `file` is borrowed.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(lock)
    }
}
