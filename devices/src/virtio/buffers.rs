//! A run of bytes scattered over guest memory.

use std::fmt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, VolatileSlice};

use super::Memory;

/// A piece of guest memory; not checked to exist until it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) address: GuestAddress,
    pub(crate) len: u32,
}

/// Pieces in order. In sum they are below 4 GiB (the queue sees to it).
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Buffers(Vec<Segment>);

/// Short: there may be hundreds of pieces.
impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes in {} pieces", self.len(), self.0.len())
    }
}

impl Buffers {
    pub(crate) fn push(&mut self, segment: Segment) {
        self.0.push(segment);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.0.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// Whether every byte is memory of the guest's.
    pub(crate) fn exist(&self, memory: &Memory) -> bool {
        let exists = |piece: &Segment| {
            piece.len == 0 || memory.check_range(piece.address, piece.len as usize)
        };
        self.0.iter().all(exists)
    }

    /// Whether no piece has an address or a length with a bit of `mask`.
    pub(crate) fn is_aligned(&self, mask: u64) -> bool {
        let aligned = |piece: &Segment| (piece.address.0 | u64::from(piece.len)) & mask == 0;
        self.0.iter().all(aligned)
    }

    /// The `len` bytes from `offset`, or as many of them as there are.
    pub(crate) fn part(&self, offset: u64, len: u64) -> Self {
        let (mut skip, mut left) = (offset, len);
        let mut part = Self::default();
        for piece in &self.0 {
            let size = u64::from(piece.len);
            let skipped = skip.min(size);
            let taken = (size - skipped).min(left);
            (skip, left) = (skip - skipped, left - taken);
            if taken > 0 {
                // An address that wraps around exists in no guest; saturation keeps it so.
                let address = GuestAddress(piece.address.0.saturating_add(skipped));
                part.push(Segment {
                    address,
                    len: taken as u32,
                });
            }
        }
        part
    }

    /// Copies guest memory at `offset` into `data`; returns how many bytes there were.
    pub(crate) fn read(
        &self,
        memory: &Memory,
        offset: u64,
        data: &mut [u8],
    ) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        for piece in self.part(offset, data.len() as u64).0 {
            let end = done + piece.len as usize;
            if let Some(target) = data.get_mut(done..end) {
                memory.read_slice(target, piece.address)?;
            }
            done = end;
        }
        Ok(done)
    }

    /// Copies `data` to guest memory at `offset`; returns how many bytes there was room for.
    pub(crate) fn write(
        &self,
        memory: &Memory,
        offset: u64,
        data: &[u8],
    ) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        for piece in self.part(offset, data.len() as u64).0 {
            let end = done + piece.len as usize;
            if let Some(source) = data.get(done..end) {
                memory.write_slice(source, piece.address)?;
            }
            done = end;
        }
        Ok(done)
    }

    /// The host's view of the bytes. A piece may be split where the guest's memory is.
    pub(crate) fn slices<'a>(
        &self,
        memory: &'a Memory,
    ) -> Result<Vec<VolatileSlice<'a>>, GuestMemoryError> {
        let slices = |piece: &Segment| {
            GuestMemoryBackend::get_slices(memory, piece.address, piece.len as usize)
        };
        self.0.iter().flat_map(slices).collect()
    }
}
