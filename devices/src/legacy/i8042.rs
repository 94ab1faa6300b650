//! The keyboard controller, as far as it resets the machine.

use super::{EventSink, MachineEvent};
use crate::bus::BusDevice;

/// Number of ports, from 0x60.
pub const LEN: u64 = 5;
/// Offset of the status (read) and command (write) register, port 0x64.
const COMMAND: u64 = 4;
/// Pulses the processor's reset line.
const PULSE_RESET: u8 = 0xfe;

/// Ports 0x60 to 0x64. There is no keyboard: every read is 0, so a driver that waits for the
/// input buffer to empty goes on at once.
pub struct I8042 {
    events: EventSink,
}

impl I8042 {
    /// A controller that tells `events` when the guest resets the machine.
    pub fn new(events: EventSink) -> Self {
        Self { events }
    }
}

impl BusDevice for I8042 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data == [PULSE_RESET] {
            (self.events)(MachineEvent::Reset);
        }
    }
}
