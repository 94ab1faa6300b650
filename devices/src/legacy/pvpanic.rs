//! The pvpanic device (QEMU's `docs/specs/pvpanic`, ACPI `QEMU0001`): the guest's kernel says
//! that it panicked.

use super::{EventSink, MachineEvent};
use crate::bus::BusDevice;
use crate::rarely::Rarely;

/// Number of ports.
pub const LEN: u64 = 1;
/// The guest panicked.
const PANICKED: u8 = 1 << 0;
/// The guest panicked and a crash kernel of its own handles that.
const CRASH_LOADED: u8 = 1 << 1;

/// One port: reads tell which events are known, writes send them.
pub struct PvPanic {
    events: EventSink,
}

impl PvPanic {
    /// A device that tells `events` of a panic.
    pub fn new(events: EventSink) -> Self {
        Self { events }
    }
}

impl BusDevice for PvPanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        match data.first() {
            Some(event) if event & PANICKED != 0 => (self.events)(MachineEvent::Panic),
            // The crash kernel now runs in the same machine and ends it when it is done.
            Some(event) if event & CRASH_LOADED != 0 => {
                static TOLD: Rarely = Rarely::new();
                if let Some(count) = TOLD.count() {
                    tracing::warn!(count, "the guest panicked; its crash kernel takes over");
                }
            }
            _ => {}
        }
    }
}
