//! Copying trees in and out.

use alloc::string::ToString;

use cowshed_guest_protocol::files::{ReceiveError, Receiver, send_tree};
use cowshed_guest_protocol::{Failure, FromGuest, Item, Reason};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags};

use crate::Stop;
use crate::control::Control;

/// A tree that the VMM sends.
pub(crate) struct CopyIn(Receiver);

impl CopyIn {
    pub(crate) fn begin(destination: &[u8], name: &[u8]) -> Result<Self, Stop> {
        let root = root().map_err(Stop::boot("open /"))?;
        Ok(Self(Receiver::new(root, destination, name, u64::MAX)))
    }

    /// Takes the next part; whether it was the last.
    pub(crate) fn item(&mut self, item: Item<'_>) -> Result<bool, Stop> {
        self.0.item(item).map_err(|error: ReceiveError| Stop {
            failure: Failure::CopyIn,
            message: error.to_string(),
        })
    }
}

/// Sends the tree at `source`, or why it cannot be sent.
pub(crate) fn out(control: &mut Control, source: &[u8]) {
    let sent = root()
        .map_err(|errno| Reason(errno).to_string())
        .and_then(|root| {
            let mut sink = |item: Item<'_>| {
                control.send(&FromGuest::Item(item));
                Ok::<(), core::convert::Infallible>(())
            };
            send_tree(root.as_fd(), source, &mut sink).map_err(|error| error.to_string())
        });
    if let Err(message) = sent {
        control.send(&FromGuest::Item(Item::Failed { message: &message }));
    }
}

fn root() -> Result<OwnedFd, rustix::io::Errno> {
    rustix::fs::open(
        "/",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
}
