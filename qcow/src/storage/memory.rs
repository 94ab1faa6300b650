//! Bytes in memory, for tests and examples.

use std::io;
use std::sync::{PoisonError, RwLock};

use super::Storage;

/// Bytes in memory. It grows by being written to; nothing bounds it.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    bytes: RwLock<Vec<u8>>,
}

impl MemoryStorage {
    /// Starts with `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        MemoryStorage {
            bytes: RwLock::new(bytes),
        }
    }

    /// A copy of the content.
    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn with_range(&self, offset: u64, len: u64, change: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let too_large = || io::Error::from(io::ErrorKind::FileTooLarge);
        let start = usize::try_from(offset).map_err(|_| too_large())?;
        let len = usize::try_from(len).map_err(|_| too_large())?;
        let end = start.checked_add(len).ok_or_else(too_large)?;
        let mut bytes = self.bytes.write().unwrap_or_else(PoisonError::into_inner);
        if bytes.len() < end {
            let more = end - bytes.len();
            bytes.try_reserve(more).map_err(|_| too_large())?;
            bytes.resize(end, 0);
        }
        change(bytes.get_mut(start..end).unwrap_or_default());
        Ok(())
    }
}

impl Storage for MemoryStorage {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let bytes = self.bytes.read().unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let have = bytes.get(start..).unwrap_or_default();
        let n = have.len().min(buf.len());
        let (head, tail) = buf.split_at_mut(n);
        head.copy_from_slice(&have[..n]);
        tail.fill(0);
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.with_range(offset, buf.len() as u64, |range| range.copy_from_slice(buf))
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.with_range(offset, len, |range| range.fill(0))
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.saturating_add(len).min(self.len()?);
        if offset < end {
            self.zero(offset, end - offset)
        } else {
            Ok(())
        }
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self
            .bytes
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::FileTooLarge)?;
        self.bytes
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .resize(len, 0);
        Ok(())
    }
}
