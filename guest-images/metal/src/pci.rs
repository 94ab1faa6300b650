//! PCI functions of bus 0, through the configuration ports.

use core::iter;

use crate::port;

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;

/// Command register: the function answers at its memory BARs.
pub const MEMORY_ENABLE: u32 = 1 << 1;
/// Command register: the function may read and write memory, and send interrupts.
pub const BUS_MASTER: u32 = 1 << 2;

const COMMAND: u8 = 0x04;
const BAR0: u8 = 0x10;
const CAPABILITIES: u8 = 0x34;
const CAPABILITY_LIST: u16 = 1 << 4;

/// A function of bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// Device number, below 32.
    pub device: u8,
    /// Function number, below 8.
    pub function: u8,
}

/// A base address register of a memory range.
#[derive(Clone, Copy, Debug)]
pub struct Bar {
    /// Number of its (first) register.
    pub index: u8,
    /// Where the function answers.
    pub address: u64,
    /// Bytes that it takes.
    pub size: u64,
    /// Whether the address takes two registers.
    pub wide: bool,
}

/// Every function that is present.
pub fn functions() -> impl Iterator<Item = Function> {
    (0..32)
        .flat_map(|device| (0..8).map(move |function| Function { device, function }))
        .filter(|it| it.function == 0 || it.sibling(0).read8(0x0e) & 0x80 != 0)
        .filter(|it| it.read16(0) != 0xffff)
}

impl Function {
    fn sibling(self, function: u8) -> Self {
        Self { function, ..self }
    }

    /// Where the function's configuration space lies in an ECAM window, in bytes.
    pub fn ecam_offset(self) -> u64 {
        u64::from(self.device) << 15 | u64::from(self.function) << 12
    }

    fn select(self, register: u8) -> u16 {
        let function = u32::from(self.device) << 11 | u32::from(self.function) << 8;
        port::write32(ADDRESS, 1 << 31 | function | u32::from(register & 0xfc));
        DATA + u16::from(register & 3)
    }

    /// Reads a byte of configuration space.
    pub fn read8(self, register: u8) -> u8 {
        port::read8(self.select(register))
    }

    /// Reads two bytes of configuration space.
    pub fn read16(self, register: u8) -> u16 {
        port::read16(self.select(register))
    }

    /// Reads four bytes of configuration space.
    pub fn read32(self, register: u8) -> u32 {
        port::read32(self.select(register))
    }

    /// Writes a byte of configuration space.
    pub fn write8(self, register: u8, value: u8) {
        port::write8(self.select(register), value);
    }

    /// Writes two bytes of configuration space.
    pub fn write16(self, register: u8, value: u16) {
        port::write16(self.select(register), value);
    }

    /// Writes four bytes of configuration space.
    pub fn write32(self, register: u8, value: u32) {
        port::write32(self.select(register), value);
    }

    /// Vendor and device identifier.
    pub fn id(self) -> (u16, u16) {
        (self.read16(0), self.read16(2))
    }

    /// The command register.
    pub fn command(self) -> u32 {
        self.read16(COMMAND).into()
    }

    /// Sets the command register. The zeros in its upper half leave the status register alone.
    pub fn set_command(self, command: u32) {
        self.write32(COMMAND, command & 0xffff);
    }

    /// Capabilities: the identifier and the offset of each. At most as many as fit.
    pub fn capabilities(self) -> impl Iterator<Item = (u8, u8)> {
        let mut next = match self.read16(0x06) & CAPABILITY_LIST {
            0 => 0,
            _ => self.read8(CAPABILITIES) & 0xfc,
        };
        iter::from_fn(move || {
            let offset = next;
            (offset >= 0x40).then(|| {
                let [id, link, ..] = self.read32(offset).to_le_bytes();
                next = link & 0xfc;
                (id, offset)
            })
        })
        .take(48)
    }

    /// The memory BAR in a register, if it is one.
    pub fn bar(self, index: u8) -> Option<Bar> {
        let low = self.bar_register(index, None);
        let wide = low & 0b111 == 0b100;
        if low & 1 != 0 {
            return None;
        }
        // Sizes are found by writing ones, while the function does not answer anywhere.
        let command = self.command();
        self.set_command(command & !MEMORY_ENABLE);
        let high = if wide {
            self.bar_register(index + 1, None)
        } else {
            0
        };
        let low_mask = self.bar_register(index, Some(u32::MAX)) & !0xf;
        let high_mask = if wide {
            self.bar_register(index + 1, Some(u32::MAX))
        } else {
            u32::MAX
        };
        let bar = Bar {
            index,
            address: u64::from(high) << 32 | u64::from(low & !0xf),
            size: (!(u64::from(high_mask) << 32 | u64::from(low_mask))).wrapping_add(1),
            wide,
        };
        self.set_bar(bar, bar.address);
        self.set_command(command);
        (low_mask != 0).then_some(bar)
    }

    /// The memory BARs.
    pub fn bars(self) -> impl Iterator<Item = Bar> {
        let mut index = 0;
        iter::from_fn(move || {
            while index < 6 {
                let bar = self.bar(index);
                index += if bar.is_some_and(|bar| bar.wide) {
                    2
                } else {
                    1
                };
                if bar.is_some() {
                    return bar;
                }
            }
            None
        })
    }

    /// Writes an address into a BAR, whether or not the function answers at it meanwhile.
    pub fn set_bar(self, bar: Bar, address: u64) {
        self.write32(BAR0 + 4 * bar.index, address as u32);
        if bar.wide {
            self.write32(BAR0 + 4 * (bar.index + 1), (address >> 32) as u32);
        }
    }

    /// Address that a BAR holds.
    pub fn bar_address(self, index: u8) -> u64 {
        let low = self.bar_register(index, None);
        let high = match low & 0b111 {
            0b100 => self.bar_register(index + 1, None),
            _ => 0,
        };
        u64::from(high) << 32 | u64::from(low & !0xf)
    }

    /// Writes a BAR register if there is something to write; then reads it.
    fn bar_register(self, index: u8, value: Option<u32>) -> u32 {
        let register = BAR0 + 4 * index;
        if let Some(value) = value {
            self.write32(register, value);
        }
        self.read32(register)
    }
}
