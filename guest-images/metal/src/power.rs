//! The ways a guest ends.

use core::hint;

use crate::port;

/// Resets the machine through the keyboard controller.
pub fn reset() -> ! {
    port::write8(0x64, 0xfe);
    stop()
}

/// Turns the machine off through ACPI.
pub fn off() -> ! {
    // The sleep control register of a hardware-reduced machine: SLP_TYP 5 and SLP_EN.
    port::write8(0x600, 5 << 2 | 0x20);
    // Still here: PM1a control of QEMU's PC machines, where SLP_TYP is 0.
    port::write16(0x604, 0x2000);
    stop()
}

/// Does nothing, for ever.
pub fn stop() -> ! {
    loop {
        hint::spin_loop();
    }
}
