//! Storages for trials: one that fails on demand, one in which requests overlap.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use cowshed_qcow::{MemoryStorage, Storage};

/// Memory whose n-th call fails, once.
pub struct FaultStorage {
    pub inner: MemoryStorage,
    /// Calls until the one that fails; negative if none will.
    left: Arc<AtomicI64>,
    kind: io::ErrorKind,
}

impl FaultStorage {
    /// Every call succeeds for now.
    pub fn new(bytes: Vec<u8>, kind: io::ErrorKind) -> Arc<Self> {
        let left = Arc::new(AtomicI64::new(-1));
        let inner = MemoryStorage::new(bytes);
        Arc::new(FaultStorage { inner, left, kind })
    }

    /// Another file, whose calls count with this one's.
    pub fn beside(&self) -> Arc<Self> {
        let (inner, left) = (MemoryStorage::default(), self.left.clone());
        let kind = self.kind;
        Arc::new(FaultStorage { inner, left, kind })
    }

    /// `n` more calls succeed, then one fails.
    pub fn fail_after(&self, n: i64) {
        self.left.store(n, Ordering::Relaxed);
    }

    /// No call fails any more. Whether one has.
    pub fn recover(&self) -> bool {
        self.left.swap(-1, Ordering::Relaxed) < 0
    }

    fn call(&self) -> io::Result<()> {
        match self.left.fetch_sub(1, Ordering::Relaxed) {
            0 => Err(self.kind.into()),
            _ => Ok(()),
        }
    }
}

impl Storage for FaultStorage {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.call()?;
        self.inner.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        // A write that fails may have written a part, in sectors.
        if let Err(error) = self.call() {
            self.inner
                .write_at(offset, &buf[..buf.len() / 1024 * 512])?;
            return Err(error);
        }
        self.inner.write_at(offset, buf)
    }
    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.call()?;
        self.inner.zero(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.call()?;
        self.inner.punch(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        self.call()?;
        self.inner.sync()
    }
    fn len(&self) -> io::Result<u64> {
        self.call()?;
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.call()?;
        self.inner.set_len(len)
    }
}

/// Memory that lets other threads run inside each call, so that requests overlap.
#[derive(Default)]
pub struct YieldingStorage(pub MemoryStorage);

impl YieldingStorage {
    fn inner(&self) -> &MemoryStorage {
        (0..3).for_each(|_| std::thread::yield_now());
        &self.0
    }
}

impl Storage for YieldingStorage {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.inner().read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.inner().write_at(offset, buf)
    }
    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner().zero(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner().punch(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        self.inner().sync()
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner().set_len(len)
    }
}
