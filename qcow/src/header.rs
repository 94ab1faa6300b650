//! The header: from its bytes to a [`Header`] whose every number was checked.

mod encode;
mod encryption;
mod parse;

use crate::addr::Geometry;
use crate::chain::Format;
use crate::compress::Compression;
use crate::extension::{DATA_FILE_NAME, Extensions};
use crate::image::Backing;

pub(crate) use encryption::Encryption;
pub(crate) use parse::{Refusal, read, read_unplaced};

/// Bit 0 of the incompatible features: refcounts are not to be trusted.
pub(crate) const DIRTY: u64 = 1 << 0;
/// Bit 1: not to be written.
pub(crate) const CORRUPT: u64 = 1 << 1;
/// Bit 2: the guest's data is in a file of its own.
pub(crate) const DATA_FILE: u64 = 1 << 2;
/// Bit 3: clusters are compressed by other than zlib.
pub(crate) const COMPRESSION_TYPE: u64 = 1 << 3;
/// Bit 4: L2 entries have 16 bytes and say which subclusters are there.
pub(crate) const EXTENDED_L2: u64 = 1 << 4;

/// Bit 0 of the compatible features: writers may postpone refcounts.
pub(crate) const LAZY_REFCOUNTS: u64 = 1 << 0;
/// Bit 1 of the autoclear features: the data file is a valid raw image.
pub(crate) const RAW_DATA: u64 = 1 << 1;

/// Largest L1 table in bytes.
pub(crate) const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes.
pub(crate) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Snapshots that an image can have.
pub(crate) const MAX_SNAPSHOTS: u32 = 65536;
pub(crate) const MAX_BACKING_NAME: u32 = 1023;
/// Bytes of a version 2 header, and the least of a version 3 header.
const V2_LENGTH: usize = 72;
const V3_LENGTH: usize = 104;

/// A header that was checked: offsets are aligned, tables within the format's limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) geometry: Geometry,
    /// Size of the disk in bytes, rounded down to 512 as QEMU does.
    pub(crate) size: u64,
    pub(crate) l1_offset: u64,
    pub(crate) l1_entries: usize,
    pub(crate) refcount_table_offset: u64,
    pub(crate) refcount_table_clusters: u64,
    /// A refcount has `1 << refcount_order` bits.
    pub(crate) refcount_order: u32,
    pub(crate) snapshots: u32,
    pub(crate) snapshots_offset: u64,
    pub(crate) incompatible: u64,
    pub(crate) compatible: u64,
    pub(crate) autoclear: u64,
    pub(crate) compression: Compression,
    pub(crate) encryption: Encryption,
    pub(crate) backing: Option<Backing>,
    /// Where in the first cluster the backing file's name is; 0 if there is none.
    pub(crate) name_offset: u64,
    /// What version 3 has from byte 104 on: the compression type, and fields that this crate does
    /// not know.
    pub(crate) tail: Vec<u8>,
    pub(crate) extensions: Extensions,
}

impl Header {
    /// The name of the file that has the guest's data, if that is not the image itself.
    pub(crate) fn data_file(&self) -> Option<&str> {
        let name = self.extensions.get(DATA_FILE_NAME);
        let external = self.incompatible & DATA_FILE != 0;
        external.then(|| {
            name.and_then(|name| str::from_utf8(name).ok())
                .unwrap_or_default()
        })
    }

    /// That file is to be a valid raw image.
    pub(crate) fn has_raw_data(&self) -> bool {
        self.incompatible & DATA_FILE != 0 && self.autoclear & RAW_DATA != 0
    }
}

/// Recorded name of a backing format, for messages and decisions.
fn backing_format(name: Option<&str>) -> Result<Option<Format>, String> {
    match name {
        None | Some("") => Ok(None),
        Some(name) => Format::from_name(name)
            .map(Some)
            .ok_or_else(|| name.to_owned()),
    }
}
