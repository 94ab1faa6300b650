//! Port I/O. Ring 3 may use every port: the task state segment of `boot.s` says so.

use core::arch::asm;

macro_rules! access {
    ($word:ty, $write:ident, $read:ident, $register:tt) => {
        #[doc = concat!("Writes a `", stringify!($word), "` to a port.")]
        pub fn $write(port: u16, value: $word) {
            // SAFETY: OUT touches neither memory nor flags; what the device behind the port
            // does to memory was asked for by whoever gave it an address.
            unsafe {
                asm!(concat!("out dx, ", $register), in("dx") port, in($register) value,
                     options(nostack, preserves_flags));
            }
        }

        #[doc = concat!("Reads a `", stringify!($word), "` from a port.")]
        pub fn $read(port: u16) -> $word {
            let value;
            // SAFETY: as with OUT.
            unsafe {
                asm!(concat!("in ", $register, ", dx"), in("dx") port, out($register) value,
                     options(nostack, preserves_flags));
            }
            value
        }
    };
}

access!(u8, write8, read8, "al");
access!(u16, write16, read16, "ax");
access!(u32, write32, read32, "eax");
