//! Memory that may not grow without bound, and that plans take for a file.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{Format, Image, MemoryStorage, OpenOptions, Selector, Storage};

/// How long an image may get. A write past it is a broken promise of `max_file_size`.
const LIMIT: u64 = 8 << 20;
/// Largest cluster: an image may end inside one that is written.
const CLUSTER: u64 = 2 << 20;

pub(crate) struct Bounded {
    bytes: MemoryStorage,
    file: File,
    most: u64,
}

impl Bounded {
    pub(crate) fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Bounded {
            most: LIMIT.max(bytes.len() as u64) + CLUSTER,
            bytes: MemoryStorage::new(bytes),
            file: File::open("/dev/null").unwrap(),
        })
    }

    pub(crate) fn to_vec(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    fn bound(&self, offset: u64, len: u64) {
        let end = offset.checked_add(len).unwrap();
        assert!(end <= self.most, "{len} bytes at {offset:#x} are changed");
    }
}

impl Storage for Bounded {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.bytes.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.bound(offset, buf.len() as u64);
        self.bytes.write_at(offset, buf)
    }
    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.bound(offset, len);
        self.bytes.zero(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.bytes.punch(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        self.bytes.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.bound(0, len);
        self.bytes.set_len(len)
    }
    fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

fn options(read_only: bool) -> OpenOptions {
    OpenOptions {
        read_only,
        cache_bytes: 64 << 10,
        max_file_size: Some(LIMIT),
        ..OpenOptions::new(Format::Qcow2)
    }
}

/// Opens an image over whatever base it records: bytes that tell their place.
pub(crate) fn open(storage: &Arc<Bounded>, read_only: bool) -> cowshed_qcow::Result<Image> {
    open_with(storage, &options(read_only))
}

/// Opens a valid image's snapshot.
pub(crate) fn open_at(storage: &Arc<Bounded>, id: &str) -> Image {
    let options = OpenOptions {
        snapshot: Some(Selector::Id(id.into())),
        ..options(true)
    };
    open_with(storage, &options).unwrap()
}

fn open_with(storage: &Arc<Bounded>, options: &OpenOptions) -> cowshed_qcow::Result<Image> {
    let path = Path::new("fuzzed");
    let image = Image::open_over(path, storage.clone(), options, None)?;
    if image.backing().is_none() {
        return Ok(image);
    }
    let bytes = (0..50_001_u32).map(|i| (i / 512) as u8 | 1).collect();
    let raw = OpenOptions {
        read_only: true,
        ..OpenOptions::new(Format::Raw)
    };
    let base = Arc::new(MemoryStorage::new(bytes));
    let base = Image::open_over(Path::new("base"), base, &raw, None)?;
    Image::open_over(path, storage.clone(), options, Some(base))
}
