//! The driver's side of a split virtqueue (VIRTIO 1.2, section 2.7).

use core::sync::atomic::{Ordering, fence};

use crate::memory::Region;
use crate::outcome::Outcome;
use crate::time;

/// Descriptor flag: the chain goes on at `next`.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes to it.
pub const WRITE: u16 = 2;
/// Descriptor flag: it holds a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Feature: indirect descriptors.
pub const F_INDIRECT: u64 = 1 << 28;

const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;
const INDEX: u64 = 2;
const RING: u64 = 4;

/// A buffer for the device: the entry of the descriptor table.
#[derive(Clone, Copy, Debug, Default)]
pub struct Descriptor {
    /// Guest physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the chain's next descriptor.
    pub next: u16,
}

/// A queue in memory that the device was told of.
#[derive(Debug)]
pub struct Queue {
    /// Entries, a power of two.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: Region,
    /// Available ring: from driver to device.
    pub available: Region,
    /// Used ring: from device to driver.
    pub used: Region,
    doorbell: Region,
    index: u16,
    offered: u16,
    taken: u16,
}

impl Queue {
    pub(crate) fn new(size: u16, doorbell: Region, index: u16, interrupts: bool) -> Self {
        let entries = u64::from(size);
        let available = Region::allocate(RING + 2 * entries, 4096);
        available.write(0, if interrupts { 0 } else { NO_INTERRUPT });
        Self {
            size,
            descriptors: Region::allocate(16 * entries, 4096),
            available,
            used: Region::allocate(RING + 8 * entries, 4096),
            doorbell,
            index,
            offered: 0,
            taken: 0,
        }
    }

    /// Writes an entry of the descriptor table.
    pub fn describe(&self, index: u16, descriptor: Descriptor) {
        write_descriptor(self.descriptors, index, descriptor);
    }

    /// Puts the chain that begins at a descriptor on the available ring. The device does not
    /// see it before [`Queue::publish`].
    pub fn offer(&mut self, head: u16) {
        let entry = u64::from(self.offered % self.size);
        self.available.write(RING + 2 * entry, head);
        self.offered = self.offered.wrapping_add(1);
    }

    /// Shows the device what was offered, and rings its doorbell if it wants that.
    pub fn publish(&self) {
        self.reveal();
        // The index must be visible before the device's wish is read: it may be falling asleep.
        fence(Ordering::SeqCst);
        if self.used.read::<u16>(0) & NO_NOTIFY == 0 {
            self.ring();
        }
    }

    /// Shows the device what was offered, without a word.
    pub fn reveal(&self) {
        fence(Ordering::Release);
        self.available.write(INDEX, self.offered);
    }

    /// Rings the doorbell.
    pub fn ring(&self) {
        self.doorbell.write(0, self.index);
    }

    /// Whether the used ring has an entry that was not taken.
    pub fn has_used(&self) -> bool {
        self.used.read::<u16>(INDEX) != self.taken
    }

    /// Takes an entry from the used ring: the head of the chain, and the bytes written to it.
    pub fn take(&mut self) -> Option<(u32, u32)> {
        if !self.has_used() {
            return None;
        }
        fence(Ordering::Acquire);
        let entry = RING + 8 * u64::from(self.taken % self.size);
        self.taken = self.taken.wrapping_add(1);
        Some((self.used.read(entry), self.used.read(entry + 4)))
    }

    /// Waits for an entry of the used ring.
    pub fn wait(&mut self) -> Outcome<(u32, u32)> {
        let mut entry = None;
        time::wait(|| {
            entry = self.take();
            entry.is_some()
        });
        entry.ok_or("a device does not answer")
    }
}

/// Writes an entry of a descriptor table.
pub fn write_descriptor(table: Region, index: u16, descriptor: Descriptor) {
    let entry = table.part(16 * u64::from(index), 16);
    entry.write(0, descriptor.address);
    entry.write(8, descriptor.len);
    entry.write(12, descriptor.flags);
    entry.write(14, descriptor.next);
}
