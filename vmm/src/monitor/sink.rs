//! Where copies of the console go: a screen, a log. The guest's vCPU writes to them, so they must not
//! hold the run up once that is to end, whether anybody reads or not.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Most bytes in one write: a pipe that is ready has room for them.
const CHUNK: usize = 512;

/// One of them.
pub(super) struct Sink {
    to: OwnedFd,
    closed: EventFd,
}

/// Closes all that were made of it, from another thread.
pub(super) struct Closer(EventFd);

impl Closer {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?))
    }

    pub(super) fn sink(&self, to: OwnedFd) -> io::Result<Sink> {
        let closed = self.0.try_clone()?;
        Ok(Sink { to, closed })
    }

    /// From now on what nobody takes at once is dropped, also what waits to be written.
    pub(super) fn close(&self) {
        // Fails only when the counter is full: then it is closed already.
        let _ = self.0.write(1);
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: the event is open for as long as `self`.
        let closed = unsafe { BorrowedFd::borrow_raw(self.closed.as_raw_fd()) };
        let mut fds = [
            PollFd::new(&self.to, PollFlags::OUT),
            PollFd::new(&closed, PollFlags::IN),
        ];
        poll(&mut fds, None)?;
        if fds[0].revents().is_empty() {
            return Ok(bytes.len());
        }
        let chunk = bytes.get(..CHUNK).unwrap_or(bytes);
        Ok(rustix::io::write(&self.to, chunk)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
