//! How much work it is to try a password.

use std::time::{Duration, Instant};

use crate::crypt::hash::Hash;
use crate::crypt::secret::Secret;

/// Iterations that a slot has at least, and the master key's digest.
const LEAST_ITERATIONS: u32 = 1000;
/// The digest has one for this many of a slot's.
const DIGEST_SHARE: u32 = 8;

/// How much work it is to try a password: iterations of PBKDF2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyCost {
    /// What this machine does in that time; at least 1000.
    Time(Duration),
    /// So many; at least 1000.
    Iterations(u32),
}

impl Default for KeyCost {
    /// Two seconds, as QEMU and cryptsetup have it.
    fn default() -> Self {
        KeyCost::Time(Duration::from_secs(2))
    }
}

impl KeyCost {
    /// Iterations of a slot.
    pub(super) fn iterations(self, hash: Hash, key_bytes: usize) -> u32 {
        let wanted = match self {
            KeyCost::Iterations(iterations) => iterations,
            KeyCost::Time(time) => in_time(time, hash, key_bytes),
        };
        wanted.max(LEAST_ITERATIONS)
    }
}

/// How many iterations this machine does in a time, measured for a small part of it.
fn in_time(time: Duration, hash: Hash, key_bytes: usize) -> u32 {
    const MEASURE: Duration = Duration::from_millis(50);
    let mut key = Secret::zeros(key_bytes);
    let mut tried = LEAST_ITERATIONS;
    loop {
        let start = Instant::now();
        hash.derive(b"password", b"salt", tried, key.bytes_mut());
        let took = start.elapsed();
        if took < MEASURE && tried < u32::MAX / 2 {
            tried *= 2;
            continue;
        }
        let wanted = u128::from(tried) * time.as_nanos() / took.as_nanos().max(1);
        return u32::try_from(wanted).unwrap_or(u32::MAX);
    }
}

/// Iterations of the master key's digest, beside a slot's.
pub(super) fn of_digest(iterations: u32) -> u32 {
    (iterations / DIGEST_SHARE).max(LEAST_ITERATIONS)
}
