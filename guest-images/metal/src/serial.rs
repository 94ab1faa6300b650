//! Text on COM1.

use core::fmt;

use crate::port;

const COM1: u16 = 0x3f8;

/// The first serial port. A virtual one is always ready for the next byte, so nothing waits.
#[derive(Debug)]
pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| port::write8(COM1, byte));
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
