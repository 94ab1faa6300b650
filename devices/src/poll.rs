//! Waiting for event file descriptors.

use std::io;
use std::os::fd::AsRawFd;

use vmm_sys_util::eventfd::EventFd;

/// Waits until one of `events` is readable, or for `timeout` milliseconds (-1: for ever).
///
/// # Errors
/// poll(2) failed; an interruption by a signal is none.
pub(crate) fn wait(events: &[&EventFd], timeout: i32) -> io::Result<()> {
    let mut fds: Vec<_> = events.iter().map(|event| entry(event)).collect();
    poll(&mut fds, timeout).map(drop)
}

/// Whether `event` has been signalled since it was read last.
pub(crate) fn readable(event: &EventFd) -> bool {
    poll(&mut [entry(event)], 0).is_ok_and(|count| count > 0)
}

fn entry(event: &EventFd) -> libc::pollfd {
    libc::pollfd {
        fd: event.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    }
}

fn poll(fds: &mut [libc::pollfd], timeout: i32) -> io::Result<usize> {
    // SAFETY: `fds` is a valid array of that many entries for the time of the call.
    let count = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
    match usize::try_from(count) {
        Ok(count) => Ok(count),
        Err(_) => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            error => Err(error),
        },
    }
}
