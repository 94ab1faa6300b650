//! The console device (virtio 1.2, section 5.3) with several ports: byte streams between host
//! and guest, each with a name.
//!
//! One thread serves the queues and never blocks on a host descriptor. Each descriptor has a
//! thread of its own, started with the first byte, that does blocking reads or writes: a peer
//! that does not read stalls its own port, no descriptor's flags are changed (they may be shared
//! with other processes), and whatever can be read or written works: pipes, files, terminals,
//! sockets, `/dev/null`.

use std::os::fd::OwnedFd;

mod blocking;
mod control;
mod device;
mod hub;
mod input;
mod output;
mod service;

pub use device::Console;
pub use hub::ConsoleHandle;

/// One stream, or a pair of them, between host and guest.
///
/// In Linux a port is `/dev/virtio-ports/NAME` (by udev) or `/dev/vportNpM`, and `hvc0` and
/// following for consoles.
#[derive(Default)]
pub struct Port {
    /// The port's name in the guest: UTF-8, without zero bytes.
    pub name: String,
    /// The guest may use it as a terminal.
    pub is_console: bool,
    /// What the guest reads. It is read only while the guest has the port open and offers
    /// buffers; its end is passed on as the closing of the port's host end.
    pub input: Option<OwnedFd>,
    /// Where the guest's bytes go; without one they are dropped. When the guest closes the port
    /// it is closed, or shut down for writing if the port has an input too (a socket), unless
    /// the port is a console. When it fails, as a pipe does that nobody reads any more, a port
    /// without an input is closed, which the guest's writer meets as EPIPE.
    pub output: Option<OwnedFd>,
}

#[cfg(test)]
mod tests;
