//! Virtio 1.2 devices over the modern PCI transport.

pub mod block;
mod buffers;
pub mod console;
pub mod device;
pub mod link;
pub mod pci;
pub mod queue;
pub mod rng;
#[cfg(test)]
mod testing;
mod worker;

/// The guest's memory, shared by cloning.
pub type Memory = vm_memory::GuestMemoryMmap<()>;
