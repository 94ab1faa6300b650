//! What answers where a PC has its CMOS clock. There is none, and the ACPI tables say so.

use crate::bus::BusDevice;

/// Index and data port.
pub const LEN: u64 = 2;

/// Reads zero: "update in progress" is never set, so a driver that waits for its end does not
/// spin, which it would on the all-ones of an unclaimed port.
#[derive(Clone, Copy, Debug, Default)]
pub struct AbsentCmos;

impl BusDevice for AbsentCmos {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}
