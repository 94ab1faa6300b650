//! How a device interrupts the guest over a line of the platform (not MSI).

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// An edge-triggered interrupt line, such as COM1's IRQ 4.
pub trait IrqLine: Send + Sync {
    /// Sends one edge to the interrupt controller.
    fn raise(&self) -> io::Result<()>;
}

impl IrqLine for EventFd {
    fn raise(&self) -> io::Result<()> {
        self.write(1)
    }
}
