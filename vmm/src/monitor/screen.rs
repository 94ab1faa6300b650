//! Standard output as the interactive console's screen. The guest's vCPU writes to it, so it must
//! not hold the run up once that is to end, whether anybody reads or not.

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Most bytes in one write: a pipe that is ready has room for them.
const CHUNK: usize = 512;

/// The screen.
pub(super) struct Screen {
    stdout: OwnedFd,
    closed: EventFd,
}

/// Closes a [`Screen`] from another thread.
pub(super) struct Closer(EventFd);

impl Screen {
    /// Our standard output, and how to be done with it.
    pub(super) fn new() -> io::Result<(Self, Closer)> {
        let closed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let closer = Closer(closed.try_clone()?);
        let stdout = io::stdout().as_fd().try_clone_to_owned()?;
        Ok((Self { stdout, closed }, closer))
    }
}

impl Closer {
    /// From now on what the guest writes is dropped, also what waits to be written.
    pub(super) fn close(&self) {
        // Fails only when the counter is full: then it is closed already.
        let _ = self.0.write(1);
    }
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: the event is open for as long as `self`.
        let closed = unsafe { BorrowedFd::borrow_raw(self.closed.as_raw_fd()) };
        let mut fds = [
            PollFd::new(&self.stdout, PollFlags::OUT),
            PollFd::new(&closed, PollFlags::IN),
        ];
        poll(&mut fds, None)?;
        if !fds[1].revents().is_empty() {
            return Ok(bytes.len());
        }
        Ok(rustix::io::write(
            &self.stdout,
            bytes.get(..CHUNK).unwrap_or(bytes),
        )?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
