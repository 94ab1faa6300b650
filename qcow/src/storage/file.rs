//! A file or block device of the host.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::{FallocateFlags, copy_file_range, fallocate, fstatfs, ioctl_ficlone, seek};
use rustix::io::Errno;

use super::{Identity, Storage};

/// `statfs.f_type` of a file system in memory (statfs(2)).
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;
/// The same of ext4, and of ext2 and ext3.
const EXT4_MAGIC: rustix::fs::FsWord = 0xef53;
/// Bytes from which on a reservation is worth its call.
const LARGE: usize = 256 << 10;

static ZEROS: [u8; 65536] = [0; 65536];

/// A file or block device of the host. Opening and locking it is the caller's work.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    /// The same file for callers that do their own I/O.
    handle: Option<File>,
    durable: bool,
    reserves: bool,
    /// Large writes reserve their space first.
    writes_anew: bool,
    /// The error of the first sync that failed. The kernel has dropped what it could not write
    /// and would call the next sync a success, which is no sign that the data is there.
    failed: OnceLock<i32>,
    /// A run of data that was found. To look for a hole costs as much as the run is long, with some
    /// file systems. It may be out of date: zeros of a new hole are then called data.
    data: Mutex<Range<u64>>,
}

impl FileStorage {
    /// Takes an open file.
    pub fn new(file: File) -> Self {
        FileStorage {
            file,
            handle: None,
            durable: true,
            reserves: false,
            writes_anew: false,
            failed: OnceLock::new(),
            data: Mutex::default(),
        }
    }

    /// The same for a file that is of no use after a crash, such as an unlinked one:
    /// [`sync`](Storage::sync) does nothing.
    pub fn without_sync(file: File) -> Self {
        FileStorage {
            durable: false,
            ..Self::new(file)
        }
    }

    /// For a file that is written from nothing: large writes reserve their space first where that
    /// makes them faster. That is on ext4, where else each block of a write has its own reservation.
    pub fn from_nothing(self) -> Self {
        let on_ext4 = fstatfs(&self.file).is_ok_and(|fs| fs.f_type == EXT4_MAGIC);
        FileStorage {
            writes_anew: on_ext4,
            ..self
        }
    }

    /// Gives [`file`](Storage::file) another handle on the same file: one that was opened for
    /// direct I/O, say, or that has no locks.
    pub fn with_handle(self, handle: File) -> Self {
        FileStorage {
            handle: Some(handle),
            ..self
        }
    }

    /// Lets [`reserve`](Storage::reserve) ask the host for space, unless the file is in memory. Small
    /// writes at random places cost less then, and those that never come cost space: that is for
    /// a file that does not live long.
    pub fn reserving(self) -> Self {
        let in_memory = fstatfs(&self.file).is_ok_and(|fs| fs.f_type == TMPFS_MAGIC);
        FileStorage {
            reserves: !in_memory,
            ..self
        }
    }

    /// The run of data that was found last.
    fn data(&self) -> MutexGuard<'_, Range<u64>> {
        self.data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn grow_to(&self, len: u64) -> io::Result<()> {
        if self.len()? < len {
            self.set_len(len)
        } else {
            Ok(())
        }
    }
}

fn unsupported(errno: Errno) -> bool {
    errno == Errno::OPNOTSUPP || errno == Errno::NOSYS || errno == Errno::NODEV
}

fn error(errno: Errno) -> io::Error {
    if unsupported(errno) {
        io::ErrorKind::Unsupported.into()
    } else {
        errno.into()
    }
}

impl Storage for FileStorage {
    fn read_at(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match self.file.read_at(buf, offset) {
                Ok(0) => {
                    buf.fill(0);
                    return Ok(());
                }
                Ok(n) => {
                    buf = buf.get_mut(n..).unwrap_or_default();
                    offset = offset.saturating_add(n as u64);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        if self.writes_anew && buf.len() >= LARGE {
            // The write says what is wrong if this fails.
            let _ = fallocate(
                &self.file,
                FallocateFlags::KEEP_SIZE,
                offset,
                buf.len() as u64,
            );
        }
        self.file.write_all_at(buf, offset)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        *self.data() = 0..0;
        match fallocate(&self.file, FallocateFlags::ZERO_RANGE, offset, len) {
            Ok(()) => return Ok(()),
            Err(errno) if unsupported(errno) => {}
            Err(errno) => return Err(errno.into()),
        }
        self.grow_to(offset.saturating_add(len))?;
        match self.punch(offset, len) {
            Err(e) if e.kind() == io::ErrorKind::Unsupported => {}
            done => return done,
        }
        let mut done = 0;
        while done < len {
            let part = (len - done).min(ZEROS.len() as u64);
            self.write_at(offset.saturating_add(done), &ZEROS[..part as usize])?;
            done += part;
        }
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        *self.data() = 0..0;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, offset, len).map_err(error)
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        fallocate(&self.file, FallocateFlags::empty(), offset, len).map_err(error)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        if !self.reserves {
            return Err(io::ErrorKind::Unsupported.into());
        }
        fallocate(&self.file, FallocateFlags::KEEP_SIZE, offset, len).map_err(error)
    }

    fn sync(&self) -> io::Result<()> {
        if !self.durable {
            return Ok(());
        }
        match self.failed.get() {
            Some(code) => Err(io::Error::from_raw_os_error(*code)),
            None => self.synced(self.file.sync_data()),
        }
    }

    fn len(&self) -> io::Result<u64> {
        let metadata = self.file.metadata()?;
        if metadata.file_type().is_block_device() {
            // Nothing here uses the file's position, so that moving it is harmless.
            return (&self.file).seek(SeekFrom::End(0));
        }
        Ok(metadata.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        *self.data() = 0..0;
        self.file.set_len(len)
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks().saturating_mul(512))
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let known = self.data().clone();
        if known.contains(&offset) {
            return Ok(Some(offset..known.end));
        }
        // Nothing here uses the file's position, so that moving it is harmless.
        match seek(&self.file, rustix::fs::SeekFrom::Data(offset)) {
            Ok(start) => {
                let end = seek(&self.file, rustix::fs::SeekFrom::Hole(start))?;
                *self.data() = start..end;
                Ok(Some(start..end))
            }
            Err(Errno::NXIO) => Ok(None),
            // A block device, or a file system that does not know: all of it is data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                let len = self.len()?;
                Ok((offset < len).then_some(offset..len))
            }
            Err(errno) => Err(errno.into()),
        }
    }

    fn copy_from(
        &self,
        mut offset: u64,
        source: BorrowedFd<'_>,
        mut from: u64,
        len: u64,
    ) -> io::Result<()> {
        let end = from.saturating_add(len);
        while from < end {
            let left = usize::try_from(end - from).unwrap_or(usize::MAX);
            let (read, write) = (Some(&mut from), Some(&mut offset));
            match copy_file_range(source, read, &self.file, write, left) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                // It has moved both offsets.
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn shares_blocks(&self) -> bool {
        // That a file is to be a clone of itself is done if it is empty, refused if it is not, and
        // not understood where there are no clones.
        matches!(
            ioctl_ficlone(&self.file, &self.file),
            Ok(()) | Err(Errno::INVAL)
        )
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.handle.as_ref().unwrap_or(&self.file).as_fd())
    }

    fn syncs_file(&self) -> bool {
        self.durable
    }

    fn synced(&self, result: io::Result<()>) -> io::Result<()> {
        if let Err(error) = &result {
            let code = error.raw_os_error();
            self.failed
                .get_or_init(|| code.unwrap_or(Errno::IO.raw_os_error()));
        }
        match self.failed.get() {
            Some(code) => Err(io::Error::from_raw_os_error(*code)),
            None => Ok(()),
        }
    }

    fn identity(&self) -> io::Result<Option<Identity>> {
        let metadata = self.file.metadata()?;
        Ok(Some(Identity {
            device: metadata.dev(),
            inode: metadata.ino(),
        }))
    }
}
