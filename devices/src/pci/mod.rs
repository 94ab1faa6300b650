//! PCI functions: configuration space, BARs, MSI-X. The host bridge is the VMM's.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

pub mod configuration;
pub mod msix;

/// A memory BAR as the guest has programmed it at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarMapping {
    /// Index of the BAR's first register, 0 to 5.
    pub index: usize,
    /// Guest physical address.
    pub address: u64,
    /// Size in bytes, a power of two.
    pub size: u64,
}

/// A place in a BAR where the guest's write is a doorbell: the hypervisor signals `event`
/// instead of leaving guest mode.
pub struct Doorbell {
    /// The BAR's index.
    pub bar: usize,
    /// Byte offset in the BAR.
    pub offset: u64,
    /// What to signal.
    pub event: EventFd,
}

/// One PCI function in a slot of the VMM's only bus.
pub trait PciFunction: Send + Sync {
    /// Reads one 32-bit register of the configuration space (`register` = byte offset / 4).
    fn config_read(&self, register: u16) -> u32;
    /// Writes 1, 2 or 4 bytes at `offset` bytes into the configuration space.
    /// The caller re-reads [`Self::mappings`] afterwards and moves what has moved.
    fn config_write(&self, offset: u16, data: &[u8]);
    /// The BARs that decode now: none while memory space is disabled in the command register.
    fn mappings(&self) -> Vec<BarMapping>;
    /// Every BAR of the function, with the size it needs (the address field is what it was
    /// programmed to last). The VMM assigns addresses by writing the registers as firmware does.
    fn bars(&self) -> Vec<BarMapping>;
    /// The function's doorbells.
    fn doorbells(&self) -> Vec<Doorbell>;
    /// The guest reads in BAR `bar`.
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]);
    /// The guest writes in BAR `bar`.
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]);
    /// Stops the function's work and waits for what is in flight. Idempotent.
    fn stop(&self);
}

/// A shared function.
pub type SharedFunction = Arc<dyn PciFunction>;
