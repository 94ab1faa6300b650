//! The ring of one queue (io_uring(7)): reads, writes and syncs of the disk's files, and the events
//! that wake the queue's thread.
//!
//! An operation moves all of its bytes or counts as not done: what comes short, fails or is
//! interrupted is done again with blocking calls, which know what to make of it. So there is
//! nothing here but the common case. A sync that failed is the exception: nobody may try it again.
//!
//! What a ring does goes past seccomp filters. So each is made before the process is confined, as a
//! [`Blank`] that is restricted to reads, writes, syncs and polls of registered files; afterwards a
//! blank can get its files and be enabled, but nobody can make a ring that may do more.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::types::{Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use vm_memory::VolatileSlice;
use vmm_sys_util::eventfd::EventFd;

use super::disk::Disk;
use super::transfer::Direction;
use crate::virtio::Memory;

/// Operations that one system call hands over.
const ENTRIES: u32 = 256;
/// Operations in flight: as many completions as the kernel keeps, but for those of the wakers.
const MAX_IN_FLIGHT: usize = 2 * ENTRIES as usize - 16;
/// Most pieces that one operation takes (IOV_MAX).
const MAX_PIECES: usize = 1024;
/// Most bytes that operations are merged up to: more spares no work, makes the disk do less at once,
/// and past 1 MiB the kernel hands an operation to a thread of its own.
const MAX_MERGED: u64 = 256 << 10;
/// `user_data` from here on is a waker's, below it an operation's.
const WAKERS: u64 = 1 << 32;

/// Where the bytes of a part of a request go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) direction: Direction,
    /// Index into [`Disk::files`].
    pub(super) file: usize,
    /// Byte offset in that file.
    pub(super) offset: u64,
    /// Length in bytes.
    pub(super) len: u64,
}

impl Target {
    fn is_followed_by(&self, next: &Self) -> bool {
        self.direction == next.direction
            && self.file == next.file
            && self.offset.checked_add(self.len) == Some(next.offset)
            && self.len + next.len <= MAX_MERGED
    }
}

/// Neighbouring parts of requests that are moved together, or a sync, which moves nothing.
struct Operation {
    target: Target,
    vectors: Vec<libc::iovec>,
    /// The requests, one entry a part.
    requests: Vec<usize>,
}

/// A ring that is no disk's yet, and disabled: any thread can make it, before it is confined.
pub(super) struct Blank(IoUring);

impl Blank {
    /// # Errors
    /// The kernel has no io_uring (5.13 or later), or this process may not use it.
    pub(super) fn new() -> io::Result<Self> {
        let ring = build()?;
        // The youngest of what is used here is a poll that goes on; it came with these tags.
        if !ring.params().is_feature_resource_tagging() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        ring.submitter()
            .register_restrictions(&mut restrictions())?;
        Ok(Self(ring))
    }
}

/// A ring with the files of one disk.
pub(super) struct Ring {
    ring: IoUring,
    /// By the low half of their `user_data`; the vectors of those in flight stay where they are.
    operations: Vec<Operation>,
    free: Vec<usize>,
    in_flight: usize,
    /// The newest operation, which the kernel has not seen: its neighbour can still join it.
    newest: Option<usize>,
    files: usize,
    wakers: usize,
    // Outlive what is in flight.
    _disk: Arc<dyn Disk>,
    _memory: Memory,
}

impl Ring {
    /// A ring of the thread that calls, which is the only one that can use it. `wakers` end a
    /// [`wait`](Self::wait) whenever they are signalled.
    ///
    /// # Errors
    /// The kernel takes no more files or has no memory.
    pub(super) fn new(
        Blank(ring): Blank,
        disk: &Arc<dyn Disk>,
        memory: &Memory,
        wakers: &[&EventFd],
    ) -> io::Result<Self> {
        let files = disk.files();
        let descriptors: Vec<RawFd> = files
            .iter()
            .map(AsRawFd::as_raw_fd)
            .chain(wakers.iter().map(|waker| waker.as_raw_fd()))
            .collect();
        let submitter = ring.submitter();
        submitter.register_files(&descriptors)?;
        submitter.register_enable_rings()?;
        let mut ring = Self {
            ring,
            operations: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
            newest: None,
            files: files.len(),
            wakers: wakers.len(),
            _disk: Arc::clone(disk),
            _memory: memory.clone(),
        };
        for waker in 0..ring.wakers {
            ring.watch(waker)?;
        }
        Ok(ring)
    }

    /// Whether that many operations can be added.
    pub(super) fn has_room(&self, operations: usize) -> bool {
        self.in_flight + operations <= MAX_IN_FLIGHT
    }

    /// How many files [`Target::file`] can name.
    pub(super) fn files(&self) -> usize {
        self.files
    }

    /// Adds a part of a request: `target.len` bytes between a file and `slices`, which are of the
    /// memory that this ring was made with. The kernel gets to know of it in
    /// [`submit`](Self::submit) or [`wait`](Self::wait).
    pub(super) fn add(
        &mut self,
        request: usize,
        target: Target,
        slices: &[VolatileSlice<'_>],
    ) -> io::Result<()> {
        let joins = |newest: &Operation| {
            newest.target.is_followed_by(&target)
                && newest.vectors.len() + slices.len() <= MAX_PIECES
        };
        let newest = self.newest.and_then(|at| self.operations.get_mut(at));
        if let Some(newest) = newest.filter(|newest| joins(newest)) {
            newest.target.len += target.len;
            newest.requests.push(request);
            newest.vectors.extend(slices.iter().map(vector));
            return Ok(());
        }
        self.hand_over()?;
        let at = self.begin(request, target);
        self.operations[at]
            .vectors
            .extend(slices.iter().map(vector));
        self.newest = Some(at);
        Ok(())
    }

    /// Adds a request that makes durable what was written to a file before: fdatasync(2).
    pub(super) fn sync(&mut self, request: usize, file: usize) -> io::Result<()> {
        self.hand_over()?;
        let nothing = Target {
            direction: Direction::Write,
            file,
            offset: 0,
            len: 0,
        };
        let at = self.begin(request, nothing);
        let entry = opcode::Fsync::new(Fixed(file as u32)).flags(FsyncFlags::DATASYNC);
        self.push(entry.build().user_data(at as u64))
    }

    /// Gives an operation its number.
    fn begin(&mut self, request: usize, target: Target) -> usize {
        let at = self.free.pop().unwrap_or(self.operations.len());
        if at == self.operations.len() {
            self.operations.push(Operation {
                target,
                vectors: Vec::new(),
                requests: Vec::new(),
            });
        }
        let operation = &mut self.operations[at];
        operation.target = target;
        operation.requests.push(request);
        self.in_flight += 1;
        at
    }

    /// Lets the kernel begin what was added. What it can do at once is complete then.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        self.hand_over()?;
        let queue = self.ring.submission();
        let idle = queue.is_empty() && !queue.taskrun();
        drop(queue);
        if idle { Ok(()) } else { self.enter(0, None) }
    }

    /// Submits, and waits for a completion, a waker or the end of `timeout`.
    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.hand_over()?;
        self.enter(1, timeout)
    }

    /// Waits for all that is in flight. After an error the kernel may be at it for good.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        while self.in_flight > 0 {
            self.wait(None)?;
            // Only a waker fails there, and nobody is to be woken any more.
            let _ = self.completed(|_, _| {});
        }
        Ok(())
    }

    /// Whether there is something for [`submit`](Self::submit) and [`completed`](Self::completed)
    /// to find: as much of it as can be seen without a call.
    pub(super) fn has_news(&mut self) -> bool {
        self.ring.submission().taskrun() || !self.ring.completion().is_empty()
    }

    /// Tells of each part that is completed: its request, and whether its bytes were moved. Where
    /// they were not, nobody knows which of them were.
    pub(super) fn completed(
        &mut self,
        mut tell: impl FnMut(usize, io::Result<()>),
    ) -> io::Result<()> {
        loop {
            let next = self.ring.completion().next();
            let Some(entry) = next else {
                return Ok(());
            };
            let Some(at) = entry.user_data().checked_sub(WAKERS) else {
                self.complete(entry.user_data() as usize, entry.result(), &mut tell);
                continue;
            };
            if entry.result() < 0 {
                return Err(io::Error::from_raw_os_error(-entry.result()));
            }
            if !cqueue::more(entry.flags()) {
                self.watch(at as usize)?;
            }
        }
    }

    fn complete(&mut self, at: usize, result: i32, tell: &mut impl FnMut(usize, io::Result<()>)) {
        let Some(operation) = self.operations.get_mut(at) else {
            return;
        };
        for request in operation.requests.drain(..) {
            tell(
                request,
                match u64::try_from(result) {
                    Ok(moved) if moved == operation.target.len => Ok(()),
                    Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
                    Err(_) => Err(io::Error::from_raw_os_error(-result)),
                },
            );
        }
        operation.vectors.clear();
        self.free.push(at);
        self.in_flight -= 1;
    }

    /// Puts the newest operation on the submission queue.
    fn hand_over(&mut self) -> io::Result<()> {
        let Some(at) = self.newest.take() else {
            return Ok(());
        };
        let Operation {
            target, vectors, ..
        } = &self.operations[at];
        let file = Fixed(target.file as u32);
        let (first, count) = (vectors.as_ptr(), vectors.len() as u32);
        let entry = match (target.direction, vectors.as_slice()) {
            (Direction::Read, [only]) => {
                opcode::Read::new(file, only.iov_base.cast(), only.iov_len as u32)
                    .offset(target.offset)
                    .build()
            }
            (Direction::Write, [only]) => {
                opcode::Write::new(file, only.iov_base.cast(), only.iov_len as u32)
                    .offset(target.offset)
                    .build()
            }
            (Direction::Read, _) => opcode::Readv::new(file, first, count)
                .offset(target.offset)
                .build(),
            (Direction::Write, _) => opcode::Writev::new(file, first, count)
                .offset(target.offset)
                .build(),
        };
        self.push(entry.user_data(at as u64))
    }

    fn watch(&mut self, waker: usize) -> io::Result<()> {
        let file = Fixed((self.files + waker) as u32);
        // It tells of each signal, so that nobody needs to read the event to be told of the next.
        let entry = opcode::PollAdd::new(file, libc::POLLIN as u32).multi(true);
        self.push(entry.build().user_data(WAKERS + waker as u64))
    }

    fn push(&mut self, entry: squeue::Entry) -> io::Result<()> {
        if self.ring.submission().is_full() {
            self.enter(0, None)?;
        }
        // SAFETY: the kernel has taken an operation's vectors when its submission returns, and until
        // then they stay where they are. They name guest memory, and it goes to registered files:
        // both are kept until `drop` has seen the last completion. The guest may change its memory
        // meanwhile: nothing in Rust borrows it.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.map_err(io::Error::other)
    }

    fn enter(&mut self, want: usize, timeout: Option<Duration>) -> io::Result<()> {
        let submitter = self.ring.submitter();
        let entered = match timeout {
            Some(timeout) => {
                let timeout = Timespec::from(timeout);
                submitter.submit_with_args(want, &SubmitArgs::new().timespec(&timeout))
            }
            None => submitter.submit_and_wait(want),
        };
        match entered {
            Ok(_) => Ok(()),
            // Completions first, or a signal, or the time is over; or the kernel has no memory for
            // more just now, and what it has not taken is still on the submission queue.
            Err(error) => match error.raw_os_error() {
                Some(libc::EBUSY | libc::EINTR | libc::ETIME | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }
}

impl Drop for Ring {
    /// Guest memory and files are the kernel's until it is done with them: for ever, if nobody can
    /// say when that is.
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            tracing::error!(%error, "cannot wait for a disk: its memory is never given back");
            std::mem::forget((Arc::clone(&self._disk), self._memory.clone()));
        }
    }
}

/// A disabled ring. Its completions are prepared when its thread asks for them, where the kernel
/// can do so (6.1 or later).
fn build() -> io::Result<IoUring> {
    let built = IoUring::builder()
        .setup_r_disabled()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(ENTRIES);
    match built {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().setup_r_disabled().build(ENTRIES)
        }
        built => built,
    }
}

/// All that the ring may be used for once it is enabled.
fn restrictions() -> [Restriction; 9] {
    let fixed = squeue::Flags::FIXED_FILE.bits();
    [
        Restriction::register_op(ENABLE_RINGS),
        Restriction::sqe_op(opcode::Read::CODE),
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Write::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_op(opcode::PollAdd::CODE),
        Restriction::sqe_flags_allowed(fixed),
        Restriction::sqe_flags_required(fixed),
    ]
}

/// `IORING_REGISTER_ENABLE_RINGS`.
const ENABLE_RINGS: u8 = 12;

fn vector(slice: &VolatileSlice<'_>) -> libc::iovec {
    let guard = slice.ptr_guard_mut();
    libc::iovec {
        iov_base: guard.as_ptr().cast(),
        iov_len: guard.len(),
    }
}

#[cfg(test)]
mod tests;
