//! One disk: an image and what lies beneath it.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use crate::chain::{Format, Opener};
use crate::error::{Error, Result};
use crate::options::OpenOptions;
use crate::plan::Plan;
use crate::storage::Storage;

/// The backing file that an image's header records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The name as recorded, relative to the image's folder.
    pub name: String,
    /// The recorded format, if there is one.
    pub format: Option<Format>,
}

/// One disk: an image and what lies beneath it.
///
/// Methods take `&self` and may be called from several threads. Requests that overlap in time
/// and place may be ordered either way.
pub struct Image {
    size: u64,
}

fn later<T>() -> Result<T> {
    Err(Error::Unsupported {
        file: "image".into(),
        feature: "everything".into(),
        advice: "wait for it",
    })
}

impl Image {
    /// Opens the image at `path` and the chain beneath it.
    pub fn open(path: &Path, options: &OpenOptions, opener: &dyn Opener) -> Result<Self> {
        let _ = (path, options, opener);
        later()
    }

    /// Opens `storage`, known as `path` in messages, over `base`: what its header records as its
    /// backing file is not followed.
    pub fn open_over(
        path: &Path,
        storage: Arc<dyn Storage>,
        options: &OpenOptions,
        base: Option<Image>,
    ) -> Result<Self> {
        let _ = (path, storage, options, base);
        later()
    }

    /// The disk's size in bytes, a multiple of 512.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes in a cluster of the top image; 512 for a raw file.
    pub fn cluster_size(&self) -> u32 {
        512
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        true
    }

    /// What the top image's header records as its backing file.
    pub fn backing(&self) -> Option<&Backing> {
        None
    }

    /// Files in the chain, the top one first.
    pub fn depth(&self) -> usize {
        1
    }

    /// Length of the top image's file in bytes.
    pub fn file_len(&self) -> Result<u64> {
        later()
    }

    /// Bytes that the host keeps for the top image's file.
    pub fn allocated(&self) -> Result<u64> {
        later()
    }

    /// The files that extents name by index, the top one first. Empty if one of them is no file.
    pub fn files(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// Where `len` bytes at `offset` are to be read from. Tables may be loaded from disk.
    pub fn plan_read(&self, offset: u64, len: u64) -> Result<Plan> {
        let _ = (offset, len);
        later()
    }

    /// Where `len` bytes at `offset` can be overwritten in place.
    pub fn plan_write(&self, offset: u64, len: u64) -> Result<Plan> {
        let _ = (offset, len);
        later()
    }

    /// Fills `buf` from `offset` of the disk.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let _ = (offset, buf);
        later()
    }

    /// Writes `buf` at `offset` of the disk.
    pub fn write(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let _ = (offset, buf);
        later()
    }

    /// Makes a range read as zeros. With `unmap` its clusters are given back where whole;
    /// without, those that are allocated stay so.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        let _ = (offset, len, unmap);
        later()
    }

    /// The range's content is of no use any more: whole clusters are given back. They read as
    /// zeros, or as before where nothing was allocated or the format cannot say "zero" (version 2
    /// over a backing file).
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let _ = (offset, len);
        later()
    }

    /// Makes every write that has ended durable.
    pub fn flush(&self) -> Result<()> {
        later()
    }
}
