//! Where an image's bytes live.

mod file;
mod memory;

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

pub use file::FileStorage;
pub use memory::MemoryStorage;

/// Tells one file from another, whatever its names: `st_dev` and `st_ino`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Device number.
    pub device: u64,
    /// Inode number on that device.
    pub inode: u64,
}

impl std::fmt::Debug for dyn Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Storage")
    }
}

/// A flat, growing run of bytes: a file, or what stands in for one.
///
/// Methods take `&self` and may be called from several threads; overlapping calls may be ordered
/// either way. A write is durable after the next [`sync`](Storage::sync) that began after it ended.
#[allow(clippy::len_without_is_empty)] // `len` asks the system and may fail; nobody asks for empty.
pub trait Storage: Send + Sync {
    /// Fills `buf` from `offset`. Bytes past the end are zeros.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Writes `buf` at `offset`, growing the storage if needed.
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()>;
    /// Makes a range read as zeros, growing the storage if needed.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Gives a range back to the host. It reads as zeros afterwards, and the length stays.
    /// Fails with [`io::ErrorKind::Unsupported`] where the host cannot.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes every write that has ended durable. After a failure it is not known what is.
    fn sync(&self) -> io::Result<()>;
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Cuts or grows (with zeros) to `len` bytes.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Reserves the host's space for a range, so that writes there do not fail for want of it, and
    /// grows the storage if needed; the content stays. Fails with [`io::ErrorKind::Unsupported`]
    /// where the host cannot. A storage that has no holes only grows.
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.saturating_add(len);
        if self.len()? < end {
            self.set_len(end)?;
        }
        Ok(())
    }
    /// Asks the host for a range's space before it is written, because that is cheaper than piece by
    /// piece; length and content stay. Nothing follows from a failure.
    fn reserve(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Bytes that the host keeps for it: less than the length where it has holes.
    fn allocated(&self) -> io::Result<u64> {
        self.len()
    }
    /// The first run of bytes at or past `offset` that is kept, `None` if there is no more: what
    /// lies before it is a hole, and reads as zeros.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let len = self.len()?;
        Ok((offset < len).then_some(offset..len))
    }
    /// Copies `len` bytes at `from` of a file to `offset`, growing the storage if needed: the host
    /// does it, and where its file system can, both then share the blocks. Fails where the host
    /// cannot; it is not known then what the range has.
    fn copy_from(
        &self,
        offset: u64,
        source: BorrowedFd<'_>,
        from: u64,
        len: u64,
    ) -> io::Result<()> {
        let _ = (offset, source, from, len);
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Whether [`copy_from`](Storage::copy_from) shares blocks here, if the source has the same
    /// file system.
    fn shares_blocks(&self) -> bool {
        false
    }
    /// The file, if it is one: extents of a plan can then be read and written through it.
    fn file(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Whether [`sync`](Storage::sync) is an fdatasync(2) of [`file`](Storage::file), and nothing else:
    /// then the caller may do that itself, and goes by what [`synced`](Storage::synced) says.
    fn syncs_file(&self) -> bool {
        false
    }
    /// Learns how it went when the caller has synced [`file`](Storage::file), and says what
    /// [`sync`](Storage::sync) would have said.
    fn synced(&self, result: io::Result<()>) -> io::Result<()> {
        result
    }
    /// What loop detection compares. `None` if nothing else can name the same storage.
    fn identity(&self) -> io::Result<Option<Identity>> {
        Ok(None)
    }
}
