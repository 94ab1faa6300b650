//! Moving bytes between guest memory and a disk, with blocking calls.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

use super::disk::{Disk, Extent, Plan};
use crate::virtio::Memory;
use crate::virtio::buffers::Buffers;

/// Most bytes that are planned and moved at a time: bounds plans and the bounce buffer.
const CHUNK: u64 = 2 << 20;
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
            match this.disk.plan_read(offset, part.len())? {
                Plan::Fast(extents, pin) => {
                    let result = this.move_extents(&extents, part, Direction::Read);
                    drop(pin);
                    result
                }
                Plan::Slow => {
                    this.bounce.resize(part.len() as usize, 0);
                    this.disk.read(offset, &mut this.bounce)?;
                    part.write(this.memory, 0, &this.bounce)
                        .map_err(io::Error::other)?;
                    Ok(())
                }
            }
        })
    }

    /// Writes all of `data` to the disk at `offset`.
    pub(super) fn write(&mut self, offset: u64, data: &Buffers) -> io::Result<()> {
        self.chunks(offset, data, |this, offset, part| {
            match this.disk.plan_write(offset, part.len())? {
                Plan::Fast(extents, pin) => {
                    let result = this.move_extents(&extents, part, Direction::Write);
                    drop(pin);
                    result
                }
                Plan::Slow => {
                    this.bounce.resize(part.len() as usize, 0);
                    part.read(this.memory, 0, &mut this.bounce)
                        .map_err(io::Error::other)?;
                    this.disk.write(offset, &this.bounce)
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

    fn move_extents(
        &self,
        extents: &[Extent],
        data: &Buffers,
        direction: Direction,
    ) -> io::Result<()> {
        let mut done = 0;
        for extent in extents {
            let (Extent::File { len, .. } | Extent::Zero { len }) = *extent;
            let slices = data
                .part(done, len)
                .slices(self.memory)
                .map_err(io::Error::other)?;
            match (*extent, direction) {
                (Extent::File { file, offset, .. }, _) => {
                    let file = self
                        .files
                        .get(file)
                        .ok_or_else(|| bad_plan("no such file"))?;
                    move_bytes(*file, offset, slices, direction)?;
                }
                (Extent::Zero { .. }, Direction::Read) => slices.iter().for_each(zero),
                (Extent::Zero { .. }, Direction::Write) => {
                    return Err(bad_plan("write to zeros"));
                }
            }
            done = done.saturating_add(len);
        }
        if done == data.len() {
            Ok(())
        } else {
            Err(bad_plan("extents do not fit the request"))
        }
    }
}

#[derive(Clone, Copy)]
enum Direction {
    /// From the file into guest memory.
    Read,
    /// From guest memory into the file.
    Write,
}

/// A disk broke its contract: better an error for the guest than wrong bytes.
fn bad_plan(problem: &'static str) -> io::Error {
    io::Error::other(format!("disk plan is wrong: {problem}"))
}

/// Moves all bytes of `slices` from or to `file` at `offset`. What lies past the file's end
/// reads as zeros.
fn move_bytes(
    file: BorrowedFd<'_>,
    mut offset: u64,
    slices: Vec<VolatileSlice<'_>>,
    direction: Direction,
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
        let moved = call(file, offset, &vectors, direction)?;
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

/// One preadv(2) or pwritev(2), again after a signal.
fn call(
    file: BorrowedFd<'_>,
    offset: u64,
    vectors: &[libc::iovec],
    direction: Direction,
) -> io::Result<usize> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // At most `MAX_PIECES`.
    let count = vectors.len() as libc::c_int;
    loop {
        let moved = match direction {
            // SAFETY: each vector names mapped guest memory that the caller holds on to for the
            // call. The guest may change it meanwhile: nothing in Rust borrows it.
            Direction::Read => unsafe {
                libc::preadv(file.as_raw_fd(), vectors.as_ptr(), count, offset)
            },
            // SAFETY: as above.
            Direction::Write => unsafe {
                libc::pwritev(file.as_raw_fd(), vectors.as_ptr(), count, offset)
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

fn zero(slice: &VolatileSlice<'_>) {
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
