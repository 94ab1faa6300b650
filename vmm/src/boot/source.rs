use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// Bytes for a guest: in a file, from which they go straight to guest memory, or in memory.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// A regular file. Its offset is moved.
    File(&'a File),
    /// Bytes that were made or unpacked here.
    Bytes(&'a [u8]),
}

impl Source<'_> {
    /// Length in bytes. What has none, such as a pipe, is an error.
    pub(super) fn len(&self) -> io::Result<u64> {
        match self {
            Self::File(file) => {
                let metadata = file.metadata()?;
                if !metadata.is_file() {
                    return Err(io::Error::other("it is not a regular file"));
                }
                Ok(metadata.len())
            }
            Self::Bytes(bytes) => Ok(bytes.len() as u64),
        }
    }

    /// Fills `buf` from `offset` on.
    pub(super) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Self::File(file) => file.read_exact_at(buf, offset),
            Self::Bytes(bytes) => {
                let found = slice(bytes, offset, buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
                buf.copy_from_slice(found);
                Ok(())
            }
        }
    }

    /// Copies `len` bytes from `offset` to guest memory at `address`, with no buffer between.
    pub(super) fn copy_to(
        &self,
        offset: u64,
        len: usize,
        memory: &GuestMemoryMmap,
        address: u64,
    ) -> Result<(), GuestMemoryError> {
        match self {
            Self::File(file) => {
                let mut file: &File = file;
                file.seek(SeekFrom::Start(offset))
                    .map_err(GuestMemoryError::IOError)?;
                memory.read_exact_volatile_from(GuestAddress(address), &mut file, len)
            }
            Self::Bytes(bytes) => {
                let found = slice(bytes, offset, len).ok_or_else(|| {
                    GuestMemoryError::IOError(io::ErrorKind::UnexpectedEof.into())
                })?;
                memory.write_slice(found, GuestAddress(address))
            }
        }
    }
}

fn slice(bytes: &[u8], offset: u64, len: usize) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    bytes.get(start..start.checked_add(len)?)
}
