//! The qcow2 format: backing chains, copy-on-write, and nothing of virtio or KVM.
#![forbid(unsafe_code)]

mod addr;
mod alloc;
mod cache;
mod chain;
mod compress;
mod create;
mod decompressed;
mod entry;
mod error;
mod extension;
mod flush;
mod header;
mod host;
mod image;
mod layer;
mod options;
mod pin;
mod plan;
mod qcow2;
mod refcount;
pub mod storage;
mod write;
mod writing;
mod zero;

use std::io;

pub use chain::{Format, Opener, ReferencePolicy};
pub use create::{CreateOptions, create};
pub use error::{Error, Result, Violation};
pub use image::{Backing, Image};
pub use options::OpenOptions;
pub use pin::Pin;
pub use plan::{Extent, Plan};
pub use storage::{FileStorage, MemoryStorage, Storage};

/// Whether `storage` begins with qcow2's magic number. Ask it only of a file that a person named:
/// what a guest can write may pretend to be anything.
pub fn is_qcow2(storage: &dyn Storage) -> io::Result<bool> {
    let mut magic = [0; 4];
    storage.read_at(0, &mut magic)?;
    Ok(magic == *b"QFI\xfb")
}
