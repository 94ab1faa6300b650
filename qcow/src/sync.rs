//! Locks: the standard library's. `tests/interleave.rs` builds the crate with `--cfg shuttle`, and
//! shuttle's locks try out the orders in which threads can run.

#[cfg(not(shuttle))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, RwLock, atomic};

#[cfg(shuttle)]
pub(crate) use shuttle::sync::{Condvar, Mutex, MutexGuard, RwLock, atomic};
