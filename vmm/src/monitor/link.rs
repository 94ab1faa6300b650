//! What the session and the monitor's process say to each other: JSON, one message a packet.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::exit::Ending;

/// Longest message in bytes: the console's last lines take up to six times their size.
const MAX: usize = 128 << 10;

/// What the monitor tells.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Told {
    /// The first vCPU was let go, this long after the run began.
    Started(Duration),
    /// It did not come to that.
    Failed(String),
    /// The guest ended.
    Ending {
        how: Ending,
        /// The panic's message, if its console showed one.
        panic: Option<String>,
    },
    /// The guest's kernel panicked and has said all there is to say of it.
    Panic(String),
    /// A person ended an interactive run.
    Escaped,
    /// The vCPUs stand still, and what the guest had said has been passed on.
    Drained,
    /// All is put away. The process ends.
    Closed(Closed),
}

/// What is left of a machine.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Closed {
    /// Bytes that the guest read from its disks.
    pub(crate) bytes_read: u64,
    /// Bytes that it wrote to them.
    pub(crate) bytes_written: u64,
    /// Size of all overlay files in bytes, or why a disk is not whole.
    pub(crate) overlay_size: Result<Option<u64>, String>,
    /// The last lines of the console.
    pub(crate) last_lines: Vec<String>,
}

/// What the session asks for.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Stop the vCPUs and pass on what the guest has said.
    Stop,
    /// Stop the devices, write out the disks, end.
    Close {
        /// The throwaway overlay is to be kept: write out its tables, too.
        keep: bool,
    },
}

/// One end: sends `S`, receives `R`. Clones share it.
pub(crate) struct Link<S, R> {
    socket: Arc<OwnedFd>,
    messages: PhantomData<fn(S) -> R>,
}

impl<S, R> Clone for Link<S, R> {
    fn clone(&self) -> Self {
        Self {
            socket: self.socket.clone(),
            messages: PhantomData,
        }
    }
}

/// The two ends: the session's and the monitor's.
pub(crate) fn pair() -> io::Result<(Link<Order, Told>, Link<Told, Order>)> {
    let kind = SocketType::SEQPACKET;
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    Ok((Link::new(ours), Link::new(theirs)))
}

impl<S: Serialize, R: DeserializeOwned> Link<S, R> {
    fn new(socket: OwnedFd) -> Self {
        Self {
            socket: Arc::new(socket),
            messages: PhantomData,
        }
    }

    /// Sends a message. An end that is gone hears nothing any more, which its keeper learns otherwise.
    pub(crate) fn tell(&self, message: &S) {
        // Plain data always serialises.
        let packet = serde_json::to_vec(message).unwrap_or_default();
        loop {
            match send(&self.socket, &packet, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                Err(error) => return tracing::debug!(%error, "the other end is gone"),
                Ok(_) => return,
            }
        }
    }

    /// Whether there is a message, or the other end is gone.
    pub(crate) fn has_something(&self) -> bool {
        let now = Timespec::default();
        poll(&mut [PollFd::new(self, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Waits for a message; `None` when the other end is gone.
    ///
    /// # Errors
    /// It says something that makes no sense.
    pub(crate) fn hear(&self) -> io::Result<Option<R>> {
        // Its length first: most messages are a few bytes.
        let mut packet = Vec::new();
        let len = self.receive(&mut packet, RecvFlags::PEEK | RecvFlags::TRUNC)?;
        if len > MAX {
            return Err(io::Error::other("a message that is too long"));
        }
        packet.resize(len, 0);
        match self.receive(&mut packet, RecvFlags::empty())? {
            0 => Ok(None),
            _ => Ok(Some(serde_json::from_slice(&packet)?)),
        }
    }

    /// The length of the next packet, 0 when there will be none.
    fn receive(&self, packet: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
        loop {
            match recv(&self.socket, &mut *packet, flags) {
                Err(Errno::INTR) => {}
                // The other end has gone without reading our last words. That comes once, and before
                // what it had said itself.
                Err(Errno::CONNRESET) => {}
                received => return Ok(received?.1),
            }
        }
    }
}

impl<S, R> AsFd for Link<S, R> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_message_passes_and_the_end_is_heard() {
        let (session, monitor) = pair().unwrap();
        assert!(!session.has_something());
        // As long as the console keeps, of the characters that take most room.
        let last_lines = vec!["\u{7f}\"".repeat(8 << 10)];
        monitor.tell(&Told::Closed(Closed {
            bytes_read: 1,
            bytes_written: 2,
            overlay_size: Err("full".into()),
            last_lines: last_lines.clone(),
        }));
        drop(monitor);
        let Some(Told::Closed(closed)) = session.hear().unwrap() else {
            panic!("another message");
        };
        assert_eq!(closed.last_lines, last_lines);
        assert_eq!(closed.overlay_size, Err("full".into()));
        assert!(session.has_something());
        assert!(session.hear().unwrap().is_none());
        session.tell(&Order::Stop);
    }

    #[test]
    fn last_words_are_heard_of_who_did_not_listen_any_more() {
        let (session, monitor) = pair().unwrap();
        session.tell(&Order::Stop);
        monitor.tell(&Told::Failed("no memory".into()));
        drop(monitor);
        let Some(Told::Failed(why)) = session.hear().unwrap() else {
            panic!("another message");
        };
        assert_eq!(why, "no memory");
        assert!(session.hear().unwrap().is_none());
    }

    #[test]
    fn nonsense_is_an_error() {
        let (session, monitor) = pair().unwrap();
        send(&monitor, b"{\"Started\":", SendFlags::empty()).unwrap();
        session.hear().unwrap_err();
    }
}
