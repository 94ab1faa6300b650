//! Locks: the standard library's. `tests/interleave.rs` builds the crate with `--cfg shuttle`, and
//! shuttle's locks try out the orders in which threads can run.

#[cfg(not(shuttle))]
pub(crate) use std::sync::{Mutex, MutexGuard, RwLock, atomic};

#[cfg(shuttle)]
pub(crate) use shuttle::sync::{Mutex, MutexGuard, RwLock, atomic};

#[cfg(shuttle)]
use shuttle::sync::Condvar;
#[cfg(not(shuttle))]
use std::sync::Condvar;

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

/// A condition that is signalled far more often than somebody waits for it: the standard library's
/// makes a system call for each signal, this one only if there is a waiter.
#[derive(Debug, Default)]
pub(crate) struct Signal {
    condvar: Condvar,
    /// Changed by who holds the lock that belongs to the condition. A signaller has held it since
    /// it changed what is waited for: a waiter is counted by then, or sees the change.
    waiting: atomic::AtomicUsize,
}

impl Signal {
    /// Lets go of the lock until the next signal.
    pub(crate) fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let guard = self
            .condvar
            .wait(guard)
            .unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        guard
    }

    /// Wakes all who wait.
    pub(crate) fn notify_all(&self) {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            self.condvar.notify_all();
        }
    }
}
