//! What has gone through a disk, for reports.

use std::sync::atomic::{AtomicU64, Ordering};

/// What has gone through a disk, for reports.
#[derive(Debug, Default)]
pub struct BlockStats {
    read: AtomicU64,
    written: AtomicU64,
    failures: AtomicU64,
}

impl BlockStats {
    /// Bytes that the guest has read.
    pub fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Bytes that the guest has written, zeroes by command not counted.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Requests that failed on the host.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Returns how many that makes.
    pub(super) fn add_failure(&self) -> u64 {
        self.failures
            .fetch_add(1, Ordering::Relaxed)
            .saturating_add(1)
    }

    pub(super) fn add_read(&self, bytes: u64) {
        self.read.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn add_written(&self, bytes: u64) {
        self.written.fetch_add(bytes, Ordering::Relaxed);
    }
}
