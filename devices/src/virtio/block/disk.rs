//! What the block device asks of a disk: *where* bytes are. Moving them is the device's work.

use std::any::Any;
use std::io;
use std::os::fd::BorrowedFd;

/// What a guest is told of a disk.
#[derive(Clone, Debug)]
pub struct Geometry {
    /// Size in bytes, a multiple of 512.
    pub size: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Preferred block size in bytes (a cluster): a power of two, at least 512.
    pub block_size: u32,
    /// Bytes that can be given back at a time: a power of two, at least 512.
    pub discard_size: u32,
    /// Serial number, at most 20 bytes of ASCII.
    pub serial: String,
}

/// A run of a request's bytes, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// `len` bytes at `offset` of `files()[file]`. What lies past the file's end reads as zeros.
    File {
        /// Index into [`Disk::files`].
        file: usize,
        /// Byte offset in that file.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// `len` bytes that read as zeros. Never in a write plan.
    Zero {
        /// Length in bytes.
        len: u64,
    },
}

impl Extent {
    /// Length in bytes.
    pub(super) fn len(&self) -> u64 {
        let (Self::File { len, .. } | Self::Zero { len }) = *self;
        len
    }
}

/// Keeps what a plan's extents name from being freed or moved: drop it after the last
/// completion of the plan's I/O.
pub type Pin = Box<dyn Any + Send>;

/// To be called after the last completion of a plan's I/O if that wrote all bytes; it is dropped if
/// not. It may change tables, and an error means that the bytes are lost.
pub type Commit = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// How a request's bytes can be moved.
pub enum Plan {
    /// Directly between guest memory and these extents, which cover the request exactly.
    Fast(Vec<Extent>, Pin),
    /// The same for a write to a place that the disk has no name for yet: nobody reads there until
    /// [`Commit`] is called.
    Fill(Vec<Extent>, Commit),
    /// Through [`Disk::read`] or [`Disk::write`]: copy on write, compression.
    Slow,
}

/// A virtual disk. Methods take `&self` and may be called from several threads.
///
/// Offsets and lengths are bytes, multiples of 512, and inside the geometry's size: the device
/// checks them once, where it parses the request.
pub trait Disk: Send + Sync {
    /// What the guest is told. Constant while the disk is attached.
    fn geometry(&self) -> &Geometry;
    /// The files that extents name by index. Constant while the disk is attached.
    fn files(&self) -> Vec<BorrowedFd<'_>>;
    /// What I/O on one of [`files`](Self::files) must be a multiple of, in the file and in memory: a
    /// power of two in bytes; 1 if the host's page cache is between. Constant while the disk is
    /// attached.
    fn alignment(&self, _file: usize) -> u64 {
        1
    }
    /// Where `len` bytes at `offset` are to be read from. `Slow` also where that has to be loaded
    /// first, unless the caller can wait.
    fn plan_read(&self, offset: u64, len: u64, can_wait: bool) -> io::Result<Plan>;
    /// Where `len` bytes at `offset` can be written; `Slow` if anything must be read or transformed
    /// for it. All extents are of the first of [`files`](Self::files). The rest is as with reads.
    fn plan_write(&self, offset: u64, len: u64, can_wait: bool) -> io::Result<Plan>;
    /// Reads by way of a buffer.
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Writes by way of a buffer.
    fn write(&self, offset: u64, buf: &[u8]) -> io::Result<()>;
    /// Zeroes a range; with `unmap` its storage may be given back.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;
    /// Tells that a range's content is of no use any more. It reads as zeros or as before.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes every completed write durable.
    fn flush(&self) -> io::Result<()>;
    /// Whether [`flush`](Self::flush) would be nothing but an fdatasync(2) of the first of
    /// [`files`](Self::files). Who begins that now instead tells [`synced`](Self::synced).
    fn needs_sync_only(&self) -> bool {
        false
    }
    /// Ends a flush that was a sync: what [`flush`](Self::flush) would have said.
    fn synced(&self, result: io::Result<()>) -> io::Result<()> {
        result
    }
}
