//! An address space (port I/O or memory-mapped I/O) and the devices in it.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// A device that answers accesses to a range of a [`Bus`].
///
/// Methods take `&self`: vCPUs call them concurrently.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what the guest reads at `offset` bytes into the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes what the guest wrote at `offset` bytes into the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range cannot be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The range is empty or runs past the end of the address space.
    #[error("range of {len:#x} bytes at {base:#x} is empty or wraps around")]
    Range {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Another device is there already.
    #[error("range of {len:#x} bytes at {base:#x} overlaps the device at {other:#x}")]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
        /// First address of the range that is in the way.
        other: u64,
    },
}

/// A device's place on the bus.
struct Range {
    /// Last address, inclusive, so that a range may end at the top of the address space.
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// The ranges of one address space.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<BTreeMap<u64, Range>>,
}

impl Bus {
    /// Puts `device` at `len` bytes from `base`.
    ///
    /// # Errors
    /// The range is empty, wraps around or overlaps another; the bus is unchanged then.
    pub fn insert(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), Error> {
        let last = len
            .checked_sub(1)
            .and_then(|len| base.checked_add(len))
            .ok_or(Error::Range { base, len })?;
        let mut ranges = self.ranges_mut();
        // Ranges do not overlap each other, so the last that begins at or below `last` is the
        // only one that can reach into this one.
        if let Some((&other, range)) = ranges.range(..=last).next_back()
            && range.last >= base
        {
            return Err(Error::Overlap { base, len, other });
        }
        ranges.insert(base, Range { last, device });
        Ok(())
    }

    /// Takes the device that begins at `base` off the bus and returns it. An access that is
    /// under way in another thread may still reach it.
    pub fn remove(&self, base: u64) -> Option<Arc<dyn BusDevice>> {
        self.ranges_mut().remove(&base).map(|range| range.device)
    }

    /// Reads `data.len()` bytes at `addr`. What no device claims is all ones, and `false`.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        match self.find(addr, data.len()) {
            Some((offset, device)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes `data` at `addr`. What no device claims is dropped, and `false`.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        match self.find(addr, data.len()) {
            Some((offset, device)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }

    /// The device whose range holds the whole access. The lock is not held while the device
    /// works: a device may change the bus.
    fn find(&self, addr: u64, len: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let len = u64::try_from(len).ok()?;
        let last = addr.checked_add(len.checked_sub(1)?)?;
        let ranges = self.ranges();
        let (base, range) = ranges.range(..=addr).next_back()?;
        (last <= range.last).then(|| (addr - base, Arc::clone(&range.device)))
    }

    // A panic elsewhere cannot leave the map half-changed: no user code runs under the lock.
    fn ranges(&self) -> RwLockReadGuard<'_, BTreeMap<u64, Range>> {
        self.ranges.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn ranges_mut(&self) -> RwLockWriteGuard<'_, BTreeMap<u64, Range>> {
        self.ranges.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
