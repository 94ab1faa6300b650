//! Making a new image.

use crate::chain::Format;
use crate::error::{Error, Result};
use crate::storage::Storage;

/// What a new image is to be. It is always version 3.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Size of the disk in bytes, a multiple of 512.
    pub size: u64,
    /// Bytes in a cluster: a power of two from 512 to 2 MiB.
    pub cluster_size: u32,
    /// Width of a refcount: 1, 2, 4, 8, 16, 32 or 64.
    pub refcount_bits: u32,
    /// Name and format of the backing file, as they are to be recorded.
    pub backing: Option<(String, Format)>,
}

impl CreateOptions {
    /// 64 KiB clusters, 16-bit refcounts, no backing file.
    pub fn new(size: u64) -> Self {
        CreateOptions {
            size,
            cluster_size: 65536,
            refcount_bits: 16,
            backing: None,
        }
    }
}

/// Writes an empty image to `storage`, whose content is replaced, and makes it durable.
pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    let _ = (storage, options);
    Err(Error::Options {
        file: "image".into(),
        reason: "not there yet".into(),
    })
}
