//! A virtio disk (VIRTIO 1.2, section 5.2).

use core::array;

use crate::memory::Region;
use crate::outcome::{Outcome, ensure};
use crate::pci::Function;
use crate::queue::{Descriptor, NEXT, Queue, WRITE};
use crate::virtio::{self, Device};

/// Feature: the disk is read-only.
pub const F_RO: u64 = 1 << 5;
/// Feature: the block size is told.
pub const F_BLK_SIZE: u64 = 1 << 6;
/// Feature: flush requests.
pub const F_FLUSH: u64 = 1 << 9;
/// Feature: several queues.
pub const F_MQ: u64 = 1 << 12;
/// Feature: discard requests.
pub const F_DISCARD: u64 = 1 << 13;
/// Feature: requests that write zeros.
pub const F_WRITE_ZEROES: u64 = 1 << 14;

/// Request: read.
pub const IN: u32 = 0;
/// Request: write.
pub const OUT: u32 = 1;
/// Request: flush.
pub const FLUSH: u32 = 4;
/// Request: the serial number, 20 bytes.
pub const GET_ID: u32 = 8;
/// Request: discard.
pub const DISCARD: u32 = 11;
/// Request: write zeros.
pub const WRITE_ZEROES: u32 = 13;

/// Status of a request that succeeded.
pub const OK: u8 = 0;
/// Status of a request that failed.
pub const IOERR: u8 = 1;

/// What the status byte holds until the device writes it.
pub const NO_STATUS: u8 = 0xff;
/// Bytes in a sector, whatever the block size.
pub const SECTOR: u64 = 512;
/// Descriptors of a request: header, data, status.
const CHAIN: u16 = 3;

/// A disk by one of its queues, ready for requests.
#[derive(Debug)]
pub struct Disk {
    /// Its transport.
    pub device: Device,
    /// Its configuration.
    pub config: Region,
    /// Its queue.
    pub queue: Queue,
    /// Features that were taken.
    pub features: u64,
    /// A header and a status byte for each slot, 32 bytes apart.
    slots: Region,
}

impl Disk {
    /// The PCI function of a disk by its number.
    pub fn find(number: u64) -> Outcome<Function> {
        virtio::devices(virtio::BLOCK)
            .nth(number as usize)
            .ok_or("there is no such disk")
    }

    /// Resets a disk and starts it with one queue. With `vector` it signals by that entry of the
    /// MSI-X table.
    pub fn open(function: Function, vector: u16) -> Outcome<Self> {
        let [disk] = Self::open_queues(function, vector)?;
        Ok(disk)
    }

    /// Resets a disk and starts it with as many queues as are asked for.
    pub fn open_queues<const N: usize>(function: Function, vector: u16) -> Outcome<[Self; N]> {
        let device = Device::open(function)?;
        let config = device.config.ok_or("a disk has no configuration")?;
        let wanted = F_RO | F_BLK_SIZE | F_FLUSH | F_MQ | F_DISCARD | F_WRITE_ZEROES;
        let features = device.negotiate(wanted)?;
        let queues = array::from_fn(|index| device.queue(index as u16, 256, vector));
        if let Some(Err(why)) = queues.iter().find(|queue: &&Outcome<_>| queue.is_err()) {
            return Err(why);
        }
        device.start()?;
        let disk = |queue: Outcome<Queue>| {
            let queue = queue.expect("it is none of the errors");
            let slots = Region::allocate(32 * u64::from(queue.size / CHAIN), 32);
            Self {
                device,
                config,
                queue,
                features,
                slots,
            }
        };
        Ok(queues.map(disk))
    }

    /// Sectors that the disk has.
    pub fn capacity(&self) -> u64 {
        let half = |offset| u64::from(self.config.read::<u32>(offset));
        half(0) | half(4) << 32
    }

    /// Requests that fit in the queue at once.
    pub fn depth(&self) -> u16 {
        self.queue.size / CHAIN
    }

    /// Writes a request into a slot below [`Disk::depth`] and offers it.
    pub fn submit(&mut self, slot: u16, kind: u32, sector: u64, data: Option<Region>) {
        let memory = self.slots.part(32 * u64::from(slot), 32);
        memory.write(0, kind);
        memory.write(8, sector);
        memory.write(16, NO_STATUS);
        let head = slot * CHAIN;
        let (header, status) = (memory.address(), memory.address() + 16);
        let after_header = if data.is_some() { head + 1 } else { head + 2 };
        let write = if matches!(kind, IN | GET_ID) {
            WRITE
        } else {
            0
        };
        let descriptor = |address, len, flags, next| Descriptor {
            address,
            len,
            flags,
            next,
        };
        self.queue
            .describe(head, descriptor(header, 16, NEXT, after_header));
        if let Some(data) = data {
            let (address, len) = (data.address(), data.size());
            self.queue
                .describe(head + 1, descriptor(address, len, NEXT | write, head + 2));
        }
        self.queue
            .describe(head + 2, descriptor(status, 1, WRITE, 0));
        self.queue.offer(head);
    }

    /// Status byte of a slot's request: [`NO_STATUS`] until the disk wrote it.
    pub fn status(&self, slot: u16) -> u8 {
        self.slots.read(32 * u64::from(slot) + 16)
    }

    /// Waits until some request is done: its slot and status.
    pub fn wait(&mut self) -> Outcome<(u16, u8)> {
        let (head, _) = self.queue.wait()?;
        self.slot(head)
    }

    /// Takes a request that is done, if there is one: its slot and status.
    pub fn take(&mut self) -> Outcome<Option<(u16, u8)>> {
        match self.queue.take() {
            Some((head, _)) => self.slot(head).map(Some),
            None => Ok(None),
        }
    }

    fn slot(&self, head: u32) -> Outcome<(u16, u8)> {
        let slot = u16::try_from(head).unwrap_or(u16::MAX) / CHAIN;
        ensure(
            slot < self.depth(),
            "a disk answers a request that nobody made",
        )?;
        let status = self.status(slot);
        ensure(
            status != NO_STATUS,
            "a disk ends a request without a status",
        )?;
        Ok((slot, status))
    }

    /// Makes one request and waits for its status.
    pub fn request(&mut self, kind: u32, sector: u64, data: Option<Region>) -> Outcome<u8> {
        self.submit(0, kind, sector, data);
        self.queue.publish();
        Ok(self.wait()?.1)
    }
}
