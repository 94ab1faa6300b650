//! The qcow2 format: backing chains and copy-on-write, and nothing of virtio or KVM.
//!
//! An [`Image`] is one disk: a qcow2 or raw file and the chain of files beneath it. Only the top
//! file is ever written. It is read and written by way of buffers, or a [`Plan`] says where the
//! bytes are and the caller moves them with its own I/O: the format says where, the device how.
//!
//! # What holds
//!
//! - **Base untouched**: backing files are opened for reading only, by an [`Opener`] that the caller
//!   supplies, and as the [`ReferencePolicy`] allows. A data file is opened in the same way, and is
//!   none of the chain's other files.
//! - **Crash safe**: wherever a crash comes, the image has leaked clusters at worst, and every byte
//!   that a [`flush`](Image::flush) covered reads back. Tables are written in order: data, new
//!   tables and refcount increments, a sync, the refcount table, a sync, L2 and L1 entries, a
//!   sync, refcount decrements. A freed cluster is reused only after that, and after every
//!   request that began before has ended (see [`Pin`]).
//! - **Refuse, never guess**: what is unknown or wrong is an [`Error`] that names file, field,
//!   offset, value and what was expected. Formats are named, never probed.
//! - **Bounded**: tables are cached up to [`OpenOptions::cache_bytes`]; L1 tables (32 MiB each,
//!   256 MiB a chain) and refcount tables (8 MiB) are in memory whole, within the format's limits,
//!   and 8 bytes for each table of the file that is written.
//!
//! An image with lazy refcounts has its dirty bit set while it is written; whatever image has it set
//! gets new refcounts as it is opened for writing.
//!
//! # Example
//!
//! ```
//! use std::path::Path;
//! use std::sync::Arc;
//!
//! use cowshed_qcow::{CreateOptions, Format, Image, MemoryStorage, OpenOptions, create};
//!
//! # fn main() -> cowshed_qcow::Result<()> {
//! // A base, here raw bytes in memory, is only read.
//! let bytes = Arc::new(MemoryStorage::new(vec![7; 1 << 20]));
//! let raw = OpenOptions { read_only: true, ..OpenOptions::new(Format::Raw) };
//! let base = Image::open_over(Path::new("base.raw"), bytes, &raw, None)?;
//!
//! // Its overlay is larger, and takes all writes.
//! let overlay = Arc::new(MemoryStorage::default());
//! let backing = Some(("base.raw".into(), Format::Raw));
//! let options = CreateOptions { backing, ..CreateOptions::new(2 << 20) };
//! create(Path::new("overlay"), overlay.clone(), &options)?;
//! let qcow2 = OpenOptions::new(Format::Qcow2);
//! let disk = Image::open_over(Path::new("overlay"), overlay, &qcow2, Some(base))?;
//! disk.write(4096, b"moo")?;
//! disk.flush()?;
//!
//! let mut bytes = [0; 5];
//! disk.read(4095, &mut bytes)?;
//! assert_eq!(&bytes, b"\x07moo\x07");
//! disk.read(1 << 20, &mut bytes)?;
//! assert_eq!(bytes, [0; 5], "past the base's end");
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod addr;
mod alloc;
mod alone;
mod amend;
mod bitmap;
mod cache;
mod chain;
mod check;
mod commit;
mod compress;
mod content;
mod create;
mod crypt;
mod data;
mod decompressed;
mod downgrade;
mod empty;
mod entry;
mod error;
mod extension;
mod flush;
mod header;
mod holes;
mod host;
mod image;
mod info;
mod key_slots;
mod l1;
mod layer;
mod lookup;
mod map;
mod metadata;
pub mod ops;
mod options;
mod pack;
mod pin;
mod plan;
mod preallocate;
mod prepare;
mod qcow2;
mod refcount;
mod reference;
mod resize;
mod snapshot;
pub mod storage;
mod sync;
mod way;
mod write;
mod writing;
mod zero;

use std::io;

pub use amend::AmendOptions;
pub use bitmap::Bitmap;
pub use chain::{Format, Opener, ReferencePolicy};
pub use check::{CheckOptions, CheckReport, Finding, Problem, Repair, check, repair};
pub use compress::{CompressedCluster, Compression, Compressor};
pub use create::{CreateOptions, DataFile, NewEncryption, Preallocation, create};
pub use crypt::luks::{KeyCost, KeySlot, LuksInfo};
pub use crypt::secret::Secret;
pub use error::{Error, Reference, Result, Violation};
pub use image::{Backing, Image};
pub use info::{EncryptionInfo, Info};
pub use map::MapEntry;
pub use options::OpenOptions;
pub use pin::Pin;
pub use plan::{Extent, Fill, Plan};
pub use resize::ResizeOptions;
pub use snapshot::{NewSnapshot, Selector, Snapshot};
pub use storage::{FileStorage, MemoryStorage, Storage};

/// Whether `storage` begins with qcow2's magic number. Ask it only of a file that a person named:
/// what a guest can write may pretend to be anything.
pub fn is_qcow2(storage: &dyn Storage) -> io::Result<bool> {
    let mut magic = [0; 4];
    storage.read_at(0, &mut magic)?;
    Ok(magic == *b"QFI\xfb")
}
