//! Port I/O. Ring 3 may use every port: the task state segment of `boot.s` says so.

use core::arch::asm;

/// Writes a byte to a port.
pub fn write8(port: u16, value: u8) {
    // SAFETY: OUT touches neither memory nor flags; what devices do is theirs to answer for.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    }
}

/// Writes two bytes to a port.
pub fn write16(port: u16, value: u16) {
    // SAFETY: as in `write8`.
    unsafe {
        asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags))
    }
}

/// Writes four bytes to a port.
pub fn write32(port: u16, value: u32) {
    // SAFETY: as in `write8`.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags))
    }
}

/// Reads four bytes from a port.
pub fn read32(port: u16) -> u32 {
    let value;
    // SAFETY: as in `write8`.
    unsafe {
        asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags))
    }
    value
}
