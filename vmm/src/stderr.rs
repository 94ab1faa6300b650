//! Standard error for our own lines. Somebody may have stopped reading it: that must hold up neither
//! the guest nor the end of a run.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Most bytes in one write: a pipe that is ready has room for them.
const CHUNK: usize = 512;
/// How long a reader that is behind is waited for, the first time.
const PATIENCE: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};
const NONE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 0,
};

/// The reader was waited for in vain: from then on it gets what it has room for.
static GAVE_UP: AtomicBool = AtomicBool::new(false);

/// Writes what its reader takes and drops the rest.
pub(crate) struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let stderr = io::stderr();
        let patience = match GAVE_UP.load(Ordering::Relaxed) {
            true => NONE,
            false => PATIENCE,
        };
        let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
        loop {
            match poll(&mut fds, Some(&patience)) {
                Ok(0) => {
                    GAVE_UP.store(true, Ordering::Relaxed);
                    return Ok(bytes.len());
                }
                Err(Errno::INTR) => {}
                result => {
                    result?;
                    break;
                }
            }
        }
        Ok(rustix::io::write(
            stderr,
            bytes.get(..CHUNK).unwrap_or(bytes),
        )?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
