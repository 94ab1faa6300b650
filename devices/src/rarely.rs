//! Warnings that a guest can cause.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts what a guest can cause as often as it likes. A few of many are told: the first, and each
/// time they have become twice as many.
#[derive(Debug, Default)]
pub struct Rarely(AtomicU64);

impl Rarely {
    /// None so far.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// One more: how many that makes, if it is to be told.
    pub fn count(&self) -> Option<u64> {
        let count = self.0.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        count.is_power_of_two().then_some(count)
    }
}
