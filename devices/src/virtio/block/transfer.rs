//! Moving bytes between guest memory and a disk, with blocking calls: whatever is rare, and all of
//! it where there is no io_uring.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

use super::disk::{Disk, Extent, Plan};
use crate::virtio::Memory;
use crate::virtio::buffers::Buffers;

/// Most bytes that are planned and moved at a time: bounds plans and the bounce buffer.
pub(super) const CHUNK: u64 = 2 << 20;
/// Most pieces that one system call takes (IOV_MAX).
const MAX_PIECES: usize = 1024;
const ZEROS: [u8; 4096] = [0; 4096];

/// Moves data for one disk; owns the bounce buffer.
pub(super) struct Transfer<'a> {
    disk: &'a dyn Disk,
    files: Vec<BorrowedFd<'a>>,
    memory: &'a Memory,
    bounce: Vec<u8>,
}

/// A bounce buffer that is kept for the next request: one of a common size.
const KEPT: usize = 64 << 10;

impl<'a> Transfer<'a> {
    pub(super) fn new(disk: &'a dyn Disk, memory: &'a Memory) -> Self {
        Self {
            disk,
            files: disk.files(),
            memory,
            bounce: Vec::new(),
        }
    }

    /// Reads the disk at `offset` into all of `data`.
    pub(super) fn read(&mut self, offset: u64, data: &Buffers) -> io::Result<()> {
        self.chunks(offset, data, |this, offset, part| {
            match this.disk.plan_read(offset, part.len(), true)? {
                Plan::Fast(extents, pin) if aligned(this.disk, &extents, part) => {
                    let result = this.move_extents(&extents, part, Direction::Read, 0);
                    drop(pin);
                    result
                }
                _ => this.read_by_buffer(offset, part),
            }
        })
    }

    /// Writes all of `data` to the disk at `offset`.
    pub(super) fn write(&mut self, offset: u64, data: &Buffers) -> io::Result<()> {
        self.chunks(offset, data, |this, offset, part| {
            if !fits(this.disk.alignment(0), offset, part) {
                return this.write_by_buffer(offset, part);
            }
            match this.disk.plan_write(offset, part.len(), true)? {
                Plan::Fast(extents, pin) if aligned(this.disk, &extents, part) => {
                    let result = this.move_extents(&extents, part, Direction::Write, 0);
                    drop(pin);
                    result
                }
                Plan::Fill(extents, commit) if aligned(this.disk, &extents, part) => {
                    this.move_extents(&extents, part, Direction::Write, 0)?;
                    commit()
                }
                other => {
                    drop(other);
                    this.write_by_buffer(offset, part)
                }
            }
        })
    }

    fn chunks(
        &mut self,
        offset: u64,
        data: &Buffers,
        mut each: impl FnMut(&mut Self, u64, &Buffers) -> io::Result<()>,
    ) -> io::Result<()> {
        let len = data.len();
        let mut done = 0;
        while done < len {
            let part = data.part(done, CHUNK);
            each(self, offset + done, &part)?;
            done += part.len();
        }
        Ok(())
    }

    fn read_by_buffer(&mut self, offset: u64, data: &Buffers) -> io::Result<()> {
        self.bounce.resize(data.len() as usize, 0);
        self.disk.read(offset, &mut self.bounce)?;
        data.write(self.memory, 0, &self.bounce)
            .map_err(io::Error::other)?;
        self.trim();
        Ok(())
    }

    fn write_by_buffer(&mut self, offset: u64, data: &Buffers) -> io::Result<()> {
        self.bounce.resize(data.len() as usize, 0);
        data.read(self.memory, 0, &mut self.bounce)
            .map_err(io::Error::other)?;
        self.disk.write(offset, &self.bounce)?;
        self.trim();
        Ok(())
    }

    fn trim(&mut self) {
        if self.bounce.capacity() > KEPT {
            self.bounce = Vec::new();
        }
    }

    /// Moves all of `data` from or to these extents. `flags` are those of preadv2(2).
    pub(super) fn move_extents(
        &self,
        extents: &[Extent],
        data: &Buffers,
        direction: Direction,
        flags: libc::c_int,
    ) -> io::Result<()> {
        check(extents, self.files.len(), data.len(), direction)?;
        let mut done = 0;
        for extent in extents {
            let slices = data
                .part(done, extent.len())
                .slices(self.memory)
                .map_err(io::Error::other)?;
            done += extent.len();
            match *extent {
                Extent::File { file, offset, .. } => {
                    if let Some(file) = self.files.get(file) {
                        move_bytes(*file, offset, slices, direction, flags)?;
                    }
                }
                Extent::Zero { .. } => slices.iter().for_each(zero),
            }
        }
        Ok(())
    }
}

/// Where bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the file into guest memory.
    Read,
    /// From guest memory into the file.
    Write,
}

/// What these extents and the memory beside them must be multiples of: 1 if they all lie in the page
/// cache.
pub(super) fn alignment(disk: &dyn Disk, extents: &[Extent]) -> u64 {
    let of = |extent: &Extent| match *extent {
        Extent::File { file, .. } => disk.alignment(file),
        Extent::Zero { .. } => 1,
    };
    extents.iter().map(of).max().unwrap_or(1)
}

/// Whether a file that wants multiples of `unit` may take `data` at `offset` of the disk as it is.
pub(super) fn fits(unit: u64, offset: u64, data: &Buffers) -> bool {
    let mask = unit.saturating_sub(1);
    mask == 0 || (offset | data.len()) & mask == 0 && data.is_aligned(mask)
}

/// Whether the disk's files take I/O between these extents and `data` as it is. What they do not
/// take goes through a buffer, and [`Disk::read`] or [`Disk::write`].
pub(super) fn aligned(disk: &dyn Disk, extents: &[Extent], data: &Buffers) -> bool {
    let mask = alignment(disk, extents).saturating_sub(1);
    let odd = |extent: &Extent| match *extent {
        Extent::File { offset, len, .. } => (offset | len) & mask != 0,
        Extent::Zero { len } => len & mask != 0,
    };
    mask == 0 || data.is_aligned(mask) && !extents.iter().any(odd)
}

/// Whether a disk that has so many files kept its contract: extents cover `len` bytes, and nothing
/// is written to zeros. If not, an error for the guest is better than wrong bytes.
pub(super) fn check(
    extents: &[Extent],
    files: usize,
    len: u64,
    direction: Direction,
) -> io::Result<()> {
    let mut covered = 0_u64;
    for extent in extents {
        covered = covered.saturating_add(extent.len());
        let problem = match *extent {
            Extent::File { file, .. } if file >= files => "no such file",
            Extent::Zero { .. } if direction == Direction::Write => "write to zeros",
            _ => continue,
        };
        return Err(io::Error::other(format!("disk plan is wrong: {problem}")));
    }
    if covered == len {
        Ok(())
    } else {
        let problem = "disk plan is wrong: extents do not fit the request";
        Err(io::Error::other(problem))
    }
}

/// Moves all bytes of `slices` from or to `file` at `offset`. What lies past the file's end
/// reads as zeros.
fn move_bytes(
    file: BorrowedFd<'_>,
    mut offset: u64,
    slices: Vec<VolatileSlice<'_>>,
    direction: Direction,
    flags: libc::c_int,
) -> io::Result<()> {
    let mut slices = slices.as_slice();
    // How much of the first slice is done.
    let mut skip = 0;
    while let Some(first) = slices.first() {
        let first = first.offset(skip).map_err(io::Error::other)?;
        let rest = slices.iter().skip(1).take(MAX_PIECES - 1);
        // The guards keep the mapping's address valid for the call.
        let guards: Vec<_> = std::iter::once(&first)
            .chain(rest)
            .map(|s| s.ptr_guard_mut())
            .collect();
        let vectors: Vec<_> = guards
            .iter()
            .map(|guard| libc::iovec {
                iov_base: guard.as_ptr().cast(),
                iov_len: guard.len(),
            })
            .collect();
        let moved = call(file, offset, &vectors, direction, flags)?;
        drop(guards);
        if moved == 0 {
            return match direction {
                Direction::Read => {
                    zero(&first);
                    slices.iter().skip(1).for_each(zero);
                    Ok(())
                }
                Direction::Write => Err(io::ErrorKind::WriteZero.into()),
            };
        }
        offset = offset.saturating_add(moved as u64);
        skip += moved;
        while let Some((first, rest)) = slices.split_first()
            && skip >= first.len()
        {
            skip -= first.len();
            slices = rest;
        }
    }
    Ok(())
}

/// One preadv2(2) or pwritev2(2), again after a signal.
fn call(
    file: BorrowedFd<'_>,
    offset: u64,
    vectors: &[libc::iovec],
    direction: Direction,
    flags: libc::c_int,
) -> io::Result<usize> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // At most `MAX_PIECES`.
    let count = vectors.len() as libc::c_int;
    loop {
        let moved = match direction {
            // SAFETY: each vector names mapped guest memory that the caller holds on to for the
            // call. The guest may change it meanwhile: nothing in Rust borrows it.
            Direction::Read => unsafe {
                libc::preadv2(file.as_raw_fd(), vectors.as_ptr(), count, offset, flags)
            },
            // SAFETY: as above.
            Direction::Write => unsafe {
                libc::pwritev2(file.as_raw_fd(), vectors.as_ptr(), count, offset, flags)
            },
        };
        match usize::try_from(moved) {
            Ok(moved) => return Ok(moved),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// Fills guest memory with zeros.
pub(super) fn zero(slice: &VolatileSlice<'_>) {
    let mut rest = *slice;
    while !rest.is_empty() {
        let len = rest.len().min(ZEROS.len());
        rest.copy_from(&ZEROS[..len]);
        match rest.offset(len) {
            Ok(next) => rest = next,
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests;
