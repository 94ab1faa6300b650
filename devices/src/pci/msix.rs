//! MSI-X: the table, the pending bits, and the way to the hypervisor's interrupt routes.
//!
//! Each vector is an event file descriptor that the device signals, whatever the guest has
//! programmed. While the vector may be delivered, the hypervisor consumes the descriptor
//! (an irqfd). While it is masked nobody does, so the count that stays in the descriptor *is*
//! the pending bit, and attaching the irqfd again delivers it.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// The message of an unmasked vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Address that the write goes to.
    pub address: u64,
    /// Value written.
    pub data: u32,
}

/// The hypervisor's side: attaches a vector's event to an interrupt message.
pub trait MsiRouter: Send + Sync {
    /// From now on each signal of `event` delivers `message`, a signal that is already
    /// pending included. Replaces the message if `vector` was attached.
    fn attach(&self, vector: u16, event: &EventFd, message: MsiMessage) -> io::Result<()>;
    /// From now on signals of `event` stay in it.
    fn detach(&self, vector: u16, event: &EventFd) -> io::Result<()>;
}
