//! The modern virtio-pci transport (VIRTIO 1.2, section 4.1).

use crate::memory::Region;
use crate::outcome::{Outcome, ensure};
use crate::pci::{self, BUS_MASTER, Function, MEMORY_ENABLE};
use crate::queue::Queue;
use crate::time;

const VENDOR: u16 = 0x1af4;
/// A modern device's PCI identifier is its virtio identifier added to this.
const FIRST_DEVICE: u16 = 0x1040;

/// Virtio identifier of a disk.
pub const BLOCK: u16 = 2;
/// Virtio identifier of a console.
pub const CONSOLE: u16 = 3;
/// Virtio identifier of a source of random numbers.
pub const ENTROPY: u16 = 4;

/// Device status: the driver found the device.
pub const ACKNOWLEDGE: u8 = 1;
/// Device status: the driver can drive it.
pub const DRIVER: u8 = 2;
/// Device status: the driver is ready.
pub const DRIVER_OK: u8 = 4;
/// Device status: the features are settled.
pub const FEATURES_OK: u8 = 8;
/// Device status: the device gave up.
pub const NEEDS_RESET: u8 = 0x40;

/// Feature: the device follows VIRTIO 1.0 or later.
pub const VERSION_1: u64 = 1 << 32;
/// No MSI-X table entry.
pub const NO_VECTOR: u16 = 0xffff;

/// Registers of the common configuration (section 4.1.4.3), as offsets.
pub mod common {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const DEVICE_STATUS: u64 = 0x14;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
}

/// A device whose registers were found.
#[derive(Clone, Copy, Debug)]
pub struct Device {
    /// Where it is on the bus.
    pub function: Function,
    /// Common configuration.
    pub common: Region,
    /// Configuration of its kind of device, which not every kind has.
    pub config: Option<Region>,
    /// Doorbells.
    pub notify: Region,
    notify_multiplier: u64,
}

/// The virtio devices of a kind, in the order of the bus.
pub fn devices(kind: u16) -> impl Iterator<Item = Function> {
    pci::functions().filter(move |it| it.id() == (VENDOR, FIRST_DEVICE + kind))
}

impl Device {
    /// Finds a device's registers where its BARs are now, and lets it use memory.
    pub fn open(function: Function) -> Outcome<Self> {
        function.set_command(MEMORY_ENABLE | BUS_MASTER);
        let part = |kind| structure(function, kind);
        let (notify, notify_offset) = part(2).ok_or("a virtio device has no notify structure")?;
        Ok(Self {
            function,
            common: part(1)
                .ok_or("a virtio device has no common configuration")?
                .0,
            config: part(4).map(|(region, _)| region),
            notify,
            notify_multiplier: function.read32(notify_offset + 16).into(),
        })
    }

    /// Device status.
    pub fn status(&self) -> u8 {
        self.common.read(common::DEVICE_STATUS)
    }

    /// Sets device status bits, the earlier ones included.
    pub fn set_status(&self, status: u8) {
        self.common.write(common::DEVICE_STATUS, status);
    }

    /// Resets the device and waits until it has let go of everything.
    pub fn reset(&self) -> Outcome {
        self.set_status(0);
        ensure(
            time::wait(|| self.status() == 0),
            "a device does not finish its reset",
        )
    }

    /// Features that the device offers.
    pub fn features(&self) -> u64 {
        let half = |select: u32| {
            self.common.write(common::DEVICE_FEATURE_SELECT, select);
            u64::from(self.common.read::<u32>(common::DEVICE_FEATURE))
        };
        half(0) | half(1) << 32
    }

    /// Resets the device and takes the wanted features that it offers: they are returned.
    pub fn negotiate(&self, wanted: u64) -> Outcome<u64> {
        self.reset()?;
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        let taken = self.features() & (wanted | VERSION_1);
        for (select, half) in [(0u32, taken as u32), (1, (taken >> 32) as u32)] {
            self.common.write(common::DRIVER_FEATURE_SELECT, select);
            self.common.write(common::DRIVER_FEATURE, half);
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        ensure(
            self.status() & FEATURES_OK != 0,
            "a device refuses features that it offers",
        )?;
        Ok(taken)
    }

    /// Makes a queue of at most `limit` entries, of which the device signals used buffers by an
    /// entry of the MSI-X table, or not at all with [`NO_VECTOR`].
    pub fn queue(&self, index: u16, limit: u16, vector: u16) -> Outcome<Queue> {
        self.common.write(common::QUEUE_SELECT, index);
        let size = self.common.read::<u16>(common::QUEUE_SIZE).min(limit);
        ensure(
            size.is_power_of_two(),
            "a queue is missing, or its size no power of two",
        )?;
        self.common.write(common::QUEUE_SIZE, size);
        self.common.write(common::QUEUE_MSIX_VECTOR, vector);
        ensure(
            self.common.read::<u16>(common::QUEUE_MSIX_VECTOR) == vector,
            "a queue does not take its MSI-X vector",
        )?;
        let queue = Queue::new(size, self.doorbell(index), index, vector != NO_VECTOR);
        for (register, region) in [
            (common::QUEUE_DESC, queue.descriptors),
            (common::QUEUE_DRIVER, queue.available),
            (common::QUEUE_DEVICE, queue.used),
        ] {
            self.set_address(register, region.address());
        }
        self.common.write(common::QUEUE_ENABLE, 1u16);
        Ok(queue)
    }

    /// Writes a 64-bit register in halves, as the specification asks.
    pub fn set_address(&self, register: u64, address: u64) {
        self.common.write(register, address as u32);
        self.common.write(register + 4, (address >> 32) as u32);
    }

    /// Where to write a queue's index to notify the device.
    pub fn doorbell(&self, index: u16) -> Region {
        self.common.write(common::QUEUE_SELECT, index);
        let offset: u16 = self.common.read(common::QUEUE_NOTIFY_OFF);
        self.notify
            .part(u64::from(offset) * self.notify_multiplier, 2)
    }

    /// Tells the device that its queues are ready.
    pub fn start(&self) -> Outcome {
        self.set_status(self.status() | DRIVER_OK);
        ensure(
            self.status() & NEEDS_RESET == 0,
            "a device gives up as it starts",
        )
    }
}

/// A structure's memory and the offset of its capability (section 4.1.4).
fn structure(function: Function, kind: u8) -> Option<(Region, u8)> {
    let is_kind = |&(id, offset): &(u8, u8)| id == 0x09 && function.read8(offset + 3) == kind;
    let (_, capability) = function.capabilities().find(is_kind)?;
    let bar = function.bar_address(function.read8(capability + 4));
    let address = bar.checked_add(function.read32(capability + 8).into())?;
    let len = u64::from(function.read32(capability + 12));
    if address < crate::memory::ram_end() || address.checked_add(len)? > 1 << 32 {
        return None;
    }
    // SAFETY: it is mapped, and past the RAM that holds this program.
    Some((unsafe { Region::new(address, len) }, capability))
}
