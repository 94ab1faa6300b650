//! The configuration space of a type 0 function (PCI Local Bus 3.0, section 6.1).

use super::BarMapping;

/// Bytes of configuration space; a function without PCI Express has no more.
pub const SIZE: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CLASS: usize = 0x08;
const BAR0: usize = 0x10;
const BAR_COUNT: usize = 6;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITY_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
/// Bit 10 of the command register.
const COMMAND_INTX_DISABLE: u8 = 1 << 2;
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// A BAR is at least this large: the low bits of its register say what kind it is.
const MIN_BAR: u32 = 16;

/// Who a function says it is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class code: base class, subclass and interface in the low 24 bits.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// What does not fit into a configuration space: a mistake of the function's author.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The BAR's size or index is impossible, or the index is taken.
    #[error("bar {index} cannot have {size:#x} bytes")]
    Bar {
        /// The BAR's index.
        index: usize,
        /// Its size in bytes.
        size: u32,
    },
    /// No room is left for a capability.
    #[error("no room for a capability of {0} bytes")]
    Capability(usize),
}

/// The registers of one function, and which of their bits the guest can change.
#[derive(Clone, Debug)]
pub struct Configuration {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Sizes of the memory BARs in bytes; 0 is none.
    bar_sizes: [u32; BAR_COUNT],
    /// Where the next capability begins.
    next: usize,
    /// Where the pointer to the next capability is.
    link: usize,
}

impl Configuration {
    /// A function without BARs, capabilities and interrupt pin.
    pub fn new(identity: &Identity) -> Self {
        let mut this = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bar_sizes: [0; BAR_COUNT],
            next: FIRST_CAPABILITY,
            link: CAPABILITY_POINTER,
        };
        this.put(0, &identity.vendor.to_le_bytes());
        this.put(2, &identity.device.to_le_bytes());
        let class = identity.class << 8 | u32::from(identity.revision);
        this.put(CLASS, &class.to_le_bytes());
        this.put(SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        this.put(SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        this.put(STATUS, &[STATUS_CAPABILITIES]);
        this.writable[COMMAND] = COMMAND_MEMORY | COMMAND_BUS_MASTER;
        this.writable[COMMAND + 1] = COMMAND_INTX_DISABLE;
        this
    }

    /// Adds a 32-bit memory BAR of `size` bytes, not prefetchable.
    ///
    /// # Errors
    /// The size is no power of two or below 16, or the index is over 5 or taken.
    pub fn add_memory_bar(&mut self, index: usize, size: u32) -> Result<(), Error> {
        let error = Error::Bar { index, size };
        let slot = self.bar_sizes.get_mut(index).ok_or(error)?;
        if *slot != 0 || !size.is_power_of_two() || size < MIN_BAR {
            return Err(Error::Bar { index, size });
        }
        *slot = size;
        // Address bits below the size are fixed at zero, which is how a driver finds the size.
        self.allow(BAR0 + 4 * index, &(!(size - 1)).to_le_bytes());
        Ok(())
    }

    /// Appends the capability `id` with what follows its two header bytes; `writable` says
    /// which bits of that the guest may change (missing bytes: none). Returns its offset.
    ///
    /// # Errors
    /// There is no room.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<usize, Error> {
        let at = self.next;
        let end = at + 2 + body.len();
        if end > SIZE || writable.len() > body.len() {
            return Err(Error::Capability(body.len() + 2));
        }
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.put(self.link, &[at as u8]);
        self.link = at + 1;
        self.next = end.next_multiple_of(4);
        Ok(at)
    }

    /// Reads a 32-bit register (byte offset / 4). Past the end there is nothing but zeros.
    pub fn read(&self, register: u16) -> u32 {
        let at = usize::from(register) * 4;
        match self
            .bytes
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok())
        {
            Some(bytes) => u32::from_le_bytes(bytes),
            None => 0,
        }
    }

    /// The bytes from `offset`, as many as there are up to `len`.
    pub fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        let end = offset.saturating_add(len).min(SIZE);
        self.bytes.get(offset..end).unwrap_or_default()
    }

    /// Writes what the guest may change of `data` at byte `offset`.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let at = usize::from(offset);
        let registers = self.bytes.iter_mut().zip(&self.writable).skip(at);
        for ((byte, writable), new) in registers.zip(data) {
            *byte = *byte & !writable | new & writable;
        }
    }

    /// Changes bytes whatever the guest may do, as the device itself does.
    pub fn set(&mut self, offset: usize, data: &[u8]) {
        for (byte, new) in self.bytes.iter_mut().skip(offset).zip(data) {
            *byte = *new;
        }
    }

    /// Every BAR, with the address that it was programmed to last.
    pub fn bars(&self) -> Vec<BarMapping> {
        let bars = self
            .bar_sizes
            .iter()
            .enumerate()
            .filter(|&(_, &size)| size != 0);
        bars.map(|(index, &size)| BarMapping {
            index,
            // The kind bits of a 32-bit memory BAR that is not prefetchable are zero.
            address: u64::from(self.read((BAR0 / 4 + index) as u16)),
            size: u64::from(size),
        })
        .collect()
    }

    /// The BARs that decode: none while memory space is disabled.
    pub fn mappings(&self) -> Vec<BarMapping> {
        if self.bytes[COMMAND] & COMMAND_MEMORY == 0 {
            Vec::new()
        } else {
            self.bars()
        }
    }

    fn put(&mut self, at: usize, data: &[u8]) {
        self.bytes[at..at + data.len()].copy_from_slice(data);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }
}

#[cfg(test)]
mod tests;
