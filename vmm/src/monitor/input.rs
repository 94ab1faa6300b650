//! What a person types, on its way to the guest's serial port.

use std::io::{self, Read};
use std::sync::Arc;
use std::thread;

use cowshed_devices::legacy::serial::Serial;

use crate::terminal::EscapeFilter;

/// Reads standard input on a thread of its own until it ends. On a terminal the escape is
/// looked for, and `escaped` is called when it came.
pub(super) fn forward(
    serial: Arc<Serial>,
    terminal: bool,
    escaped: impl Fn() + Send + 'static,
) -> io::Result<()> {
    thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(move || {
            let mut filter = EscapeFilter::default();
            let mut bytes = [0; 256];
            loop {
                let count = match io::stdin().read(&mut bytes) {
                    Ok(0) => return,
                    Ok(count) => count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => {
                        tracing::warn!(%error, "standard input is lost to the guest");
                        return;
                    }
                };
                let typed = bytes.get(..count).unwrap_or_default();
                let mut passed = Vec::with_capacity(typed.len() + 1);
                let escape = if terminal {
                    filter.feed(typed, &mut passed)
                } else {
                    passed.extend_from_slice(typed);
                    false
                };
                if escape {
                    return escaped();
                }
                if let Err(error) = send(&serial, &passed) {
                    tracing::warn!(%error, "standard input is lost to the guest");
                    return;
                }
            }
        })?;
    Ok(())
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
