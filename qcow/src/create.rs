//! Making a new image.

mod layout;
mod options;

use std::path::Path;
use std::sync::Arc;

use crate::addr::Geometry;
use crate::chain::Format;
use crate::compress::Compression;
use crate::crypt::luks::{self, KeyCost};
use crate::crypt::secret::Secret;
use crate::error::{Error, Result};
use crate::extension::{BACKING_FORMAT, DATA_FILE_NAME, Extensions, LUKS_HEADER};
use crate::header::{
    COMPRESSION_TYPE, DATA_FILE, EXTENDED_L2, Encryption, Header, LAZY_REFCOUNTS, RAW_DATA,
};
use crate::host::Host;
use crate::image::Backing;
use crate::storage::Storage;
use layout::Layout;

/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Size of the disk in bytes, a multiple of 512. It may be larger than the backing file's:
    /// what lies past that reads as zeros. It may be smaller: the rest is hidden.
    pub size: u64,
    /// Version of the format: 2 (which QEMU calls `compat=0.10`) or 3 (`compat=1.1`).
    pub version: u32,
    /// Bytes in a cluster: a power of two from 512 to 2 MiB.
    pub cluster_size: u32,
    /// Width of a refcount: 1, 2, 4, 8, 16, 32 or 64. Version 2 has 16 only.
    pub refcount_bits: u32,
    /// How clusters are compressed that are written so. Version 2 has zlib only.
    pub compression: Compression,
    /// Writers may let refcounts be wrong while the image is open, and say so by its dirty bit.
    /// Version 3 only. Who opens it for writing after a crash counts all references first.
    pub lazy_refcounts: bool,
    /// Clusters of 32 parts that are allocated apart: version 3 only, with clusters of at least
    /// 16 KiB.
    pub extended_l2: bool,
    /// What is allocated from the beginning. Over a backing file there can be none, but with
    /// `extended_l2`.
    pub preallocation: Preallocation,
    /// Name and format of the backing file, as they are to be recorded.
    pub backing: Option<(String, Format)>,
    /// A file of its own for the guest's data: version 3 only.
    pub data_file: Option<DataFile>,
    /// How the guest's data is encrypted, if it is.
    pub encryption: Option<NewEncryption>,
}

/// What a new image has allocated from the beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing: the file grows as data is written.
    #[default]
    Off,
    /// Each cluster has its place. The file is as long as it will be, of holes.
    Metadata,
    /// The same, and the host has reserved the space.
    Falloc,
    /// The same, and zeros were written there.
    Full,
}

/// A file of its own for the guest's data. The image has the tables.
#[derive(Clone, Debug)]
pub struct DataFile {
    /// Its name as it is to be recorded, relative to the image's folder.
    pub name: String,
    /// It is to be a valid raw image at all times, which excludes a backing file. Each cluster
    /// has its place from the beginning, as with [`Preallocation::Metadata`].
    pub raw: bool,
    /// The file itself. Its content is replaced by zeros of the disk's size.
    pub storage: Arc<dyn Storage>,
}

/// How a new image is encrypted.
#[derive(Clone, Debug)]
pub enum NewEncryption {
    /// LUKS1, with AES-256 in XTS mode and a first password.
    Luks {
        /// The password.
        secret: Secret,
        /// How much work it is to try a password.
        cost: KeyCost,
    },
    /// As images had it before 2017: AES-128 with whatever password it is first written with. It
    /// is weak, and a wrong password is not noticed: only for programs that know nothing else.
    LegacyAes,
}

impl CreateOptions {
    /// Version 3, 64 KiB clusters, 16-bit refcounts, zlib, nothing allocated, no other file,
    /// not encrypted.
    pub fn new(size: u64) -> Self {
        CreateOptions {
            size,
            version: 3,
            cluster_size: 65536,
            refcount_bits: 16,
            compression: Compression::Zlib,
            lazy_refcounts: false,
            extended_l2: false,
            preallocation: Preallocation::Off,
            backing: None,
            data_file: None,
            encryption: None,
        }
    }
}

impl CreateOptions {
    /// Bytes of the new image's file.
    pub(crate) fn file_len(&self) -> Result<u64, String> {
        let geometry = self.geometry()?;
        self.check()?;
        Ok(Layout::new(geometry, self)?.file_len())
    }
}

/// Writes a new image to `storage`, known as `path` in messages, whose content is replaced, and
/// makes it durable. The disk reads as zeros, or as its backing file. The header comes last: a
/// crash leaves a file that is no image at all. Memory is bounded whatever the size.
pub fn create(path: &Path, storage: Arc<dyn Storage>, options: &CreateOptions) -> Result<()> {
    let host = Host {
        path: path.to_owned(),
        storage,
    };
    let wrong = |reason: String| Error::Options {
        file: path.to_owned(),
        reason,
    };
    let geometry = options.geometry().map_err(wrong)?;
    options.check().map_err(wrong)?;
    let layout = Layout::new(geometry, options).map_err(wrong)?;
    let mut header = header(geometry, options, &layout);
    let bytes = header.encode().map_err(wrong)?;

    cut(&host)?;
    host.set_len(layout.file_len())?;
    layout.write_tables(&host)?;
    if let Some(NewEncryption::Luks { secret, cost }) = &options.encryption {
        luks::create(&host, layout.luks(), secret, *cost)?;
    }
    let (data, place) = match &options.data_file {
        None => (host.clone(), layout.data()),
        Some(file) => {
            let data = Host {
                path: path.with_file_name(&file.name),
                storage: Arc::clone(&file.storage),
            };
            cut(&data)?;
            data.set_len(options.size)?;
            (data, 0..options.size)
        }
    };
    options.preallocation.reserve(&data, place)?;
    if options.data_file.is_some() {
        data.sync()?;
    }
    host.sync()?;
    host.write(0, &bytes)?;
    host.sync()
}

/// The header of a new image.
fn header(geometry: Geometry, options: &CreateOptions, layout: &Layout) -> Header {
    let mut extensions = Extensions::default();
    let (mut incompatible, mut autoclear) = (0, 0);
    if let Some(data_file) = &options.data_file {
        extensions.set(DATA_FILE_NAME, Some(data_file.name.clone().into()));
        incompatible |= DATA_FILE;
        autoclear |= if data_file.raw { RAW_DATA } else { 0 };
    }
    if options.extended_l2 {
        incompatible |= EXTENDED_L2;
    }
    if options.compression != Compression::Zlib {
        incompatible |= COMPRESSION_TYPE;
    }
    let backing = options.backing.clone().map(|(name, format)| {
        extensions.set(BACKING_FORMAT, Some(format.name().into()));
        let format = Some(format);
        Backing { name, format }
    });
    let encryption = match &options.encryption {
        None => Encryption::None,
        Some(NewEncryption::LegacyAes) => Encryption::LegacyAes,
        Some(NewEncryption::Luks { .. }) => {
            let (offset, len) = (layout.luks(), luks::new_len());
            let pointer = [offset.to_be_bytes(), len.to_be_bytes()].concat();
            extensions.set(LUKS_HEADER, Some(pointer));
            Encryption::Luks { offset, len }
        }
    };
    Header {
        version: options.version,
        geometry,
        size: options.size,
        l1_offset: layout.l1(),
        l1_entries: layout.l1_entries as usize,
        refcount_table_offset: layout.refcount_table(),
        refcount_table_clusters: layout.table,
        refcount_order: options.refcount_bits.trailing_zeros(),
        snapshots: 0,
        snapshots_offset: 0,
        incompatible,
        compatible: if options.lazy_refcounts {
            LAZY_REFCOUNTS
        } else {
            0
        },
        autoclear,
        compression: options.compression,
        encryption,
        backing,
        name_offset: 0,
        tail: if options.version >= 3 {
            vec![0; 8]
        } else {
            Vec::new()
        },
        extensions,
    }
}

/// Cuts all that a file has. One that has nothing is left alone: after such a cut ext4 writes a file
/// out when it is closed, which takes longer than to make an image.
fn cut(host: &Host) -> Result<()> {
    match host.len()? {
        0 => Ok(()),
        _ => host.set_len(0),
    }
}
