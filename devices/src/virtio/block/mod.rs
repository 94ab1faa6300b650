//! The block device (virtio 1.2, section 5.2).
//!
//! A request's way: `service` (a thread for each queue) takes it, `request` checks it, `begin` asks the
//! `disk` where its bytes are, and `ring` moves them, or `pool` has it done with blocking calls
//! (`execute`, `transfer`).

mod begin;
mod device;
pub mod disk;
mod execute;
mod flights;
mod poll_window;
mod pool;
mod request;
mod ring;
mod service;
mod stats;
mod throttle;
mod transfer;

pub use device::{Block, Engine, MAX_QUEUES, Options};
pub use stats::BlockStats;
pub use throttle::Limits;

#[cfg(test)]
mod tests;
