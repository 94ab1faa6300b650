//! An address space (port I/O or memory-mapped I/O) and the devices in it.

use std::sync::Arc;

/// A device that answers accesses to a range of a [`Bus`].
///
/// Methods take `&self`: vCPUs call them concurrently.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what the guest reads at `offset` bytes into the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes what the guest wrote at `offset` bytes into the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// The ranges of one address space.
#[derive(Default)]
pub struct Bus {
    ranges: std::sync::RwLock<std::collections::BTreeMap<u64, (u64, Arc<dyn BusDevice>)>>,
}
