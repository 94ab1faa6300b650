//! Interrupts: `boot.s` counts them, by vector.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::memory::Region;
use crate::outcome::{Outcome, ensure};
use crate::pci::Function;
use crate::port;

/// First vector that `boot.s` counts.
pub const FIRST_VECTOR: u8 = 32;
const VECTORS: usize = 16;

/// Where a message-signalled interrupt for CPU 0 is written to, and the local APIC's registers.
const LAPIC: u64 = 0xfee0_0000;
const SPURIOUS_VECTOR: u64 = 0xf0;

unsafe extern "C" {
    /// Counters that the interrupt handlers of `boot.s` increment.
    safe static interrupt_counts: [AtomicU64; VECTORS];
}

/// Interrupts of a vector so far.
pub fn count(vector: u8) -> u64 {
    let index = vector.checked_sub(FIRST_VECTOR).map(usize::from);
    let counter = index.and_then(|index| interrupt_counts.get(index));
    counter.map_or(0, |count| count.load(Ordering::Relaxed))
}

/// Lets the CPU take interrupts from its local APIC, and none from the old controllers.
pub fn enable() {
    port::write8(0x21, 0xff);
    port::write8(0xa1, 0xff);
    // SAFETY: the local APIC is there on every PC.
    let lapic = unsafe { Region::new(LAPIC, 0x1000) };
    let last = u32::from(FIRST_VECTOR) + VECTORS as u32 - 1;
    lapic.write(SPURIOUS_VECTOR, 0x100 | last);
    // SAFETY: ring 0 sets the flag for us; the handlers change nothing but their counters.
    unsafe { asm!("sti", options(nostack)) }
}

/// A function's MSI-X table (PCI 3.0, section 6.8.2).
#[derive(Clone, Copy, Debug)]
pub struct Msix {
    function: Function,
    capability: u8,
    table: Region,
    pending: Region,
}

impl Msix {
    const CAPABILITY: u8 = 0x11;
    const ENABLE: u32 = 1 << 31;
    const FUNCTION_MASK: u32 = 1 << 30;

    /// Finds the table and enables it.
    pub fn open(function: Function) -> Outcome<Self> {
        let capability = function
            .capabilities()
            .find(|&(id, _)| id == Self::CAPABILITY);
        let (_, capability) = capability.ok_or("a function has no MSI-X")?;
        let entries = u64::from(function.read16(capability + 2) & 0x7ff) + 1;
        let region = |register, len| {
            let place = function.read32(register);
            let address = function.bar_address((place & 7) as u8) + u64::from(place & !7);
            let fits = address >= crate::memory::ram_end() && address + len <= 1 << 32;
            ensure(
                fits,
                "an MSI-X table lies outside the first 4 GiB, or over RAM",
            )?;
            // SAFETY: it is mapped, and past the RAM that holds this program.
            Ok(unsafe { Region::new(address, len) })
        };
        let table = region(capability + 4, 16 * entries)?;
        let pending = region(capability + 8, 8 * entries.div_ceil(64))?;
        let msix = Self {
            function,
            capability,
            table,
            pending,
        };
        msix.mask_all(false);
        Ok(msix)
    }

    /// Points an entry of the table at a vector of CPU 0, unmasked.
    pub fn route(&self, entry: u16, vector: u8) {
        let entry = self.table.part(16 * u64::from(entry), 16);
        entry.write(0, LAPIC as u32);
        entry.write(4, 0u32);
        entry.write(8, u32::from(vector));
        entry.write(12, 0u32);
    }

    /// Masks an entry of the table, or unmasks it.
    pub fn mask(&self, entry: u16, masked: bool) {
        self.table
            .write(16 * u64::from(entry) + 12, u32::from(masked));
    }

    /// Enables MSI-X, with all entries masked or with each as its own bit says.
    pub fn mask_all(&self, masked: bool) {
        let mask = if masked { Self::FUNCTION_MASK } else { 0 };
        self.function.write32(self.capability, Self::ENABLE | mask);
    }

    /// Whether an entry has an interrupt to send once it is unmasked.
    pub fn is_pending(&self, entry: u16) -> bool {
        let bits: u32 = self.pending.read(u64::from(entry) / 32 * 4);
        bits >> (entry % 32) & 1 != 0
    }
}
