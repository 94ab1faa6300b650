//! Text on COM1.

use core::fmt;

use crate::port;

const COM1: u16 = 0x3f8;
/// The line status register, and its bit that says a byte has come.
const STATUS: u16 = COM1 + 5;
const READY: u8 = 1;

/// Waits for a byte.
#[must_use]
pub fn read() -> u8 {
    while port::read8(STATUS) & READY == 0 {}
    port::read8(COM1)
}

/// Sends a byte.
pub fn write(byte: u8) {
    port::write8(COM1, byte);
}

/// The first serial port. A virtual one is always ready for the next byte, so nothing waits.
#[derive(Debug)]
pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(write);
        Ok(())
    }
}

/// Prints a line on COM1.
#[macro_export]
macro_rules! println {
    ($($arg:tt)*) => {{
        use core::fmt::Write as _;
        // Writing to a port does not fail.
        let _ = writeln!($crate::serial::Serial, $($arg)*);
    }};
}
