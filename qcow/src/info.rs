//! What an image says of itself, without opening anything else.

use std::path::Path;
use std::sync::Arc;

use crate::bitmap::{self, Bitmap};
use crate::compress::Compression;
use crate::crypt::luks::{Luks, LuksInfo};
use crate::error::Result;
use crate::header::{self, CORRUPT, DIRTY, Encryption, LAZY_REFCOUNTS};
use crate::host::Host;
use crate::image::Backing;
use crate::snapshot::Snapshot;
use crate::snapshot::table::{Entry, Table};
use crate::storage::Storage;

/// What a qcow2 image says of itself: all that `qemu-img info` does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// Length of the file in bytes.
    pub file_len: u64,
    /// Bytes that the host keeps for the file.
    pub allocated: u64,
    /// Bytes in a cluster.
    pub cluster_size: u32,
    /// Version of the format: 2 (which QEMU calls `compat` 0.10) or 3 (1.1).
    pub version: u32,
    /// How its compressed clusters are compressed.
    pub compression: Compression,
    /// Width of a refcount.
    pub refcount_bits: u32,
    /// Writers may postpone refcounts.
    pub lazy_refcounts: bool,
    /// Refcounts are not to be trusted: it was not closed, or is open.
    pub dirty: bool,
    /// It is not to be written.
    pub corrupt: bool,
    /// Clusters have parts that are allocated apart.
    pub extended_l2: bool,
    /// The backing file as recorded; it was not looked for.
    pub backing: Option<Backing>,
    /// Name of the file with the guest's data, as recorded; it was not looked for.
    pub data_file: Option<String>,
    /// That file is a valid raw image.
    pub data_file_raw: bool,
    /// How the guest's data is encrypted.
    pub encryption: Option<EncryptionInfo>,
    /// The snapshots, in the order of their table.
    pub snapshots: Vec<Snapshot>,
    /// The bitmaps, in the order of their directory.
    pub bitmaps: Vec<Bitmap>,
}

/// How an image's data is encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EncryptionInfo {
    /// AES-128 with the password as its key: no protection worth the name.
    LegacyAes,
    /// LUKS, version 1.
    Luks(LuksInfo),
}

impl Info {
    /// Reads what the qcow2 image in `storage` says, known as `path` in messages. Neither backing
    /// file nor data file is opened, no key is tried and no table of the disk is read: time and
    /// memory do not depend on the disk's size, but on the snapshots and bitmaps.
    ///
    /// ```
    /// # use std::{path::Path, sync::Arc};
    /// # use cowshed_qcow::{CreateOptions, Format, Info, MemoryStorage, create};
    /// # fn main() -> cowshed_qcow::Result<()> {
    /// # let file = Arc::new(MemoryStorage::default());
    /// let backing = Some(("not-there.raw".into(), Format::Raw));
    /// let options = CreateOptions { backing, ..CreateOptions::new(1 << 40) };
    /// create(Path::new("disk.qcow2"), file.clone(), &options)?;
    /// let info = Info::read(Path::new("disk.qcow2"), file)?;
    /// assert_eq!(info.virtual_size, 1 << 40);
    /// assert_eq!(info.backing.unwrap().name, "not-there.raw");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// The file is no qcow2 image, or its header, snapshot table, bitmap directory or LUKS header
    /// is wrong or names what is not known.
    pub fn read(path: &Path, storage: Arc<dyn Storage>) -> Result<Self> {
        let host = Host {
            path: path.to_owned(),
            storage,
        };
        let header = header::read_unplaced(&host)?;
        let file_len = host.len()?;
        let snapshots = Table::read(&host, &header, file_len)?.entries;
        let describe = |entry: &Entry| entry.describe(header.size);
        Ok(Info {
            virtual_size: header.size,
            file_len,
            allocated: host.allocated()?,
            cluster_size: header.geometry.cluster() as u32,
            version: header.version,
            compression: header.compression,
            refcount_bits: 1 << header.refcount_order,
            lazy_refcounts: header.compatible & LAZY_REFCOUNTS != 0,
            dirty: header.incompatible & DIRTY != 0,
            corrupt: header.incompatible & CORRUPT != 0,
            extended_l2: header.geometry.is_extended(),
            backing: header.backing.clone(),
            data_file: header.data_file().map(str::to_owned),
            data_file_raw: header.has_raw_data(),
            encryption: match header.encryption {
                Encryption::None => None,
                Encryption::LegacyAes => Some(EncryptionInfo::LegacyAes),
                Encryption::Luks { offset, len } => {
                    Some(EncryptionInfo::Luks(Luks::describe(&host, offset, len)?))
                }
            },
            snapshots: snapshots.iter().map(describe).collect(),
            bitmaps: bitmap::list(&host, &header, file_len)?,
        })
    }
}
