//! The block device (virtio 1.2, section 5.2).

mod device;
pub mod disk;
mod request;
mod transfer;
mod worker;

pub use device::{Block, BlockStats, Options};

#[cfg(test)]
mod tests;
