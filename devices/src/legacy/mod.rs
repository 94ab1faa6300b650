//! The few devices of a PC that Linux wants beside virtio.

use std::sync::Arc;

pub mod acpi_sleep;
pub mod cmos;
pub mod i8042;
pub mod pvpanic;
pub mod serial;

/// What the guest asked of the machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// Start again from the beginning.
    Reset,
    /// Switch off.
    PowerOff,
    /// The guest's kernel panicked.
    Panic,
}

/// Told of each event, on the vCPU's thread that caused it: it must not block.
pub type EventSink = Arc<dyn Fn(MachineEvent) + Send + Sync>;

#[cfg(test)]
mod tests;
