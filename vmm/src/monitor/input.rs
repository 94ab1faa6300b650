//! What a person types, on its way to the guest's serial port.

use std::io::{self, Read};
use std::sync::Arc;
use std::thread;

use cowshed_devices::legacy::serial::Serial;

use crate::terminal::EscapeFilter;

/// Standard input, on its way to the guest.
pub(super) struct Typed {
    serial: Arc<Serial>,
    /// It is a terminal's: the escape is looked for.
    terminal: bool,
}

impl Typed {
    pub(super) fn new(serial: Arc<Serial>, terminal: bool) -> Self {
        Self { serial, terminal }
    }

    /// Passes it on until it ends, on a thread of its own. To be called when there is some: most
    /// guests get none. `escaped` is called when the escape came.
    pub(super) fn forward(self, escaped: impl FnOnce() + Send + 'static) {
        let pass = move || match self.pass() {
            Ok(true) => escaped(),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "standard input is lost to the guest"),
        };
        let thread = thread::Builder::new().name("stdin".to_owned()).spawn(pass);
        if let Err(error) = thread {
            tracing::warn!(%error, "standard input is lost to the guest");
        }
    }

    /// Whether it ended with the escape.
    fn pass(&self) -> io::Result<bool> {
        let mut filter = EscapeFilter::default();
        let mut bytes = [0; 256];
        loop {
            let count = match io::stdin().read(&mut bytes) {
                Ok(0) => return Ok(false),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let typed = bytes.get(..count).unwrap_or_default();
            let mut passed = Vec::with_capacity(typed.len() + 1);
            if !self.terminal {
                passed.extend_from_slice(typed);
            } else if filter.feed(typed, &mut passed) {
                return Ok(true);
            }
            send(&self.serial, &passed)?;
        }
    }
}

/// Gives the guest all of `bytes`, as fast as it takes them.
fn send(serial: &Serial, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let taken = serial.enqueue(bytes)?;
        bytes = bytes.get(taken..).unwrap_or_default();
        if !bytes.is_empty() {
            wait(serial)?;
        }
    }
    Ok(())
}

/// Waits until the guest has emptied the port's queue.
fn wait(serial: &Serial) -> io::Result<()> {
    use rustix::event::{PollFd, PollFlags, poll};
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: the port outlives this borrow of its event.
    let drained = unsafe { BorrowedFd::borrow_raw(serial.drained().as_raw_fd()) };
    poll(&mut [PollFd::new(&drained, PollFlags::IN)], None)?;
    // Another wait may have taken the count: then there is room all the same.
    let _ = serial.drained().read();
    Ok(())
}
