//! The sleep registers of hardware-reduced ACPI (ACPI 6.5, section 4.8.3.7): power-off.

use super::{EventSink, MachineEvent};
use crate::bus::BusDevice;

/// Sleep control register, then sleep status register.
pub const LEN: u64 = 2;
/// The value of SLP_TYP that the tables give for S5, "soft off".
pub const S5: u8 = 5;
const CONTROL: u64 = 0;
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 7;
const SLP_EN: u8 = 1 << 5;

/// Two bytes: control and status. The status never says "woken", for nothing sleeps.
pub struct AcpiSleep {
    events: EventSink,
}

impl AcpiSleep {
    /// Registers that tell `events` of a power-off.
    pub fn new(events: EventSink) -> Self {
        Self { events }
    }
}

impl BusDevice for AcpiSleep {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (CONTROL, Some(&value)) = (offset, data.first())
            && value & SLP_EN != 0
            && (value >> SLP_TYP_SHIFT) & SLP_TYP_MASK == S5
        {
            (self.events)(MachineEvent::PowerOff);
        }
    }
}
