//! What the monitor's process has open only because it is a copy: files that a shell, a build's job
//! server or a service had left open for cowshed, and what is the session's.

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};

use rustix::io::{FdFlags, fcntl_getfd};

/// Closes it, but for the standard streams: `session`, and what came through an exec. All that this
/// program opens itself is marked to be closed by one.
///
/// # Errors
/// `/proc` is not there.
pub(crate) fn close(session: &[RawFd]) -> io::Result<()> {
    for name in names()? {
        // SAFETY: it was open a moment ago, and this process has no other thread that would close it;
        // the number of what is closed already (the listing) is only asked about.
        let is_needed = match unsafe { fcntl_getfd(BorrowedFd::borrow_raw(name)) } {
            Ok(flags) => flags.contains(FdFlags::CLOEXEC) && !session.contains(&name),
            Err(_) => true,
        };
        if !is_needed {
            // SAFETY: nothing in this process refers to it: what does is on the stack of the session's
            // process, which this copy never returns to.
            unsafe { libc::close(name) };
        }
    }
    Ok(())
}

/// What is open beside the standard streams.
fn names() -> io::Result<Vec<RawFd>> {
    let mut names = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        names.extend(name.to_str().and_then(|name| name.parse::<RawFd>().ok()));
    }
    names.retain(|name| *name > libc::STDERR_FILENO);
    Ok(names)
}
