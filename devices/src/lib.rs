//! Emulated devices: virtio over PCI and the few legacy devices that Linux wants.
//!
//! Nothing here knows KVM. A device reaches the hypervisor through four small things that
//! its maker hands over: an [`irq::IrqLine`], a [`pci::msix::MsiRouter`], event file
//! descriptors that the hypervisor signals when the guest rings a doorbell, and
//! [`threads::Threads`], which makes its threads.

#![deny(missing_docs)]

pub mod bus;
pub mod irq;
pub mod legacy;
pub mod pci;
mod poll;
pub mod rarely;
pub mod threads;
pub mod virtio;
