//! What the threads that may block have in common.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Condvar, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// Waits for a change; `None` if `deadline` has passed.
pub(super) fn wait<'a, T>(
    changed: &Condvar,
    guard: MutexGuard<'a, T>,
    deadline: Option<Instant>,
) -> Option<MutexGuard<'a, T>> {
    let Some(deadline) = deadline else {
        return Some(changed.wait(guard).unwrap_or_else(PoisonError::into_inner));
    };
    let left = deadline.checked_duration_since(Instant::now())?;
    Some(
        changed
            .wait_timeout(guard, left)
            .unwrap_or_else(PoisonError::into_inner)
            .0,
    )
}

/// The last part of a dotted name: threads have short ones.
pub(super) fn tail(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// Waits until `fd` is ready for `what`.
pub(super) fn ready(fd: &OwnedFd, what: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::from_borrowed_fd(fd.as_fd(), what)], None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
