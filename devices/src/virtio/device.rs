//! What a transport asks of a device.

use std::io;
use std::sync::Arc;

use super::Memory;
use super::link::DriverLink;
use super::queue::VirtQueue;
use crate::threads::Threads;

/// What a driver has agreed on when it starts a device.
pub struct Activation {
    /// The guest's memory.
    pub memory: Memory,
    /// The negotiated features.
    pub features: u64,
    /// The queues, by index; `None` where the driver enabled none.
    pub queues: Vec<Option<VirtQueue>>,
    /// The way to the driver beside the queues.
    pub link: Arc<DriverLink>,
    /// Who makes the device's threads.
    pub threads: Arc<dyn Threads>,
}

impl Activation {
    /// Whether the feature of bit number `bit` was negotiated.
    pub fn has(&self, bit: u32) -> bool {
        feature(bit) & self.features != 0
    }

    /// Takes queue `index` out, if the driver enabled it.
    pub fn take_queue(&mut self, index: usize) -> Option<VirtQueue> {
        self.queues.get_mut(index).and_then(Option::take)
    }
}

/// The mask of the feature bit number `bit`.
pub const fn feature(bit: u32) -> u64 {
    1 << bit
}

/// A virtio device, whatever the transport. Its threads run from [`Self::activate`] to
/// [`Self::stop`]; both are called with no other call under way.
pub trait VirtioDevice: Send {
    /// The device ID (virtio 1.2, section 5).
    fn id(&self) -> u16;
    /// The PCI class code, 24 bits.
    fn class(&self) -> u32;
    /// The features of the device's own; those of rings and transport are the transport's.
    fn features(&self) -> u64;
    /// The largest size of each queue: a power of two.
    fn queue_sizes(&self) -> Vec<u16>;
    /// The device configuration as it is now: at most 512 bytes, always the same number.
    fn config(&self) -> Vec<u8>;
    /// The driver is ready: starts work.
    ///
    /// # Errors
    /// Work could not start; the driver is told that the device needs a reset.
    fn activate(&mut self, activation: Activation) -> io::Result<()>;
    /// Ends work and waits for what is in flight: afterwards the device touches neither queues
    /// nor guest memory. Idempotent; the device can be activated again.
    fn stop(&mut self);
}
