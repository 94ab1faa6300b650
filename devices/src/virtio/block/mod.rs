//! The block device (virtio 1.2, section 5.2).

pub mod disk;
