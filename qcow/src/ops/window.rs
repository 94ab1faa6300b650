//! Windows of a disk, handed out in order to a few threads.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};

/// Bytes that a thread takes at a time, if clusters are not larger: enough for long requests, and
/// what was just read is still near the processor. (Linux 6.18 with ext4 on a virtual machine
/// writes 2 MiB at a time five times slower than 1 MiB.)
const WINDOW: u64 = 1 << 20;

/// Where the kernel copies to and from at full speed: elsewhere it takes half as long again.
const ALIGNMENT: usize = 4096;

/// A thread's memory, kept from window to window.
pub(crate) struct Buffer(Vec<u8>);

impl Buffer {
    /// `len` bytes of what it has, grown if needed: whatever was left there.
    pub(crate) fn get(&mut self, len: u64) -> &mut [u8] {
        let len = len as usize;
        if self.0.len() < len + ALIGNMENT {
            self.0 = vec![0; len + ALIGNMENT];
        }
        let start = self.0.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        self.0.get_mut(start..start + len).unwrap_or_default()
    }

    /// The same as two halves of `len` bytes each.
    pub(crate) fn pair(&mut self, len: u64) -> (&mut [u8], &mut [u8]) {
        let second = (len as usize).next_multiple_of(ALIGNMENT);
        let (first, second) = self.get(second as u64 + len).split_at_mut(second);
        (first.get_mut(..len as usize).unwrap_or_default(), second)
    }
}

/// A part of a disk.
pub(crate) struct Window {
    pub(crate) range: Range<u64>,
    /// There is nothing in it, however long it is.
    pub(crate) empty: bool,
}

impl Window {
    pub(crate) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// Hands out windows, and turns in their order.
pub(crate) struct Windows {
    size: u64,
    window: u64,
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Default)]
struct State {
    /// Where the next window begins.
    next: u64,
    /// Where the window begins whose turn it is.
    turn: u64,
    failed: Option<Error>,
}

impl Windows {
    /// None of them ends within a cluster of `cluster` bytes, a power of two.
    pub(crate) fn new(size: u64, cluster: u32) -> Self {
        Windows {
            size,
            window: WINDOW.max(cluster.into()),
            state: Mutex::default(),
            moved: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` on all windows, in `threads` threads, each with a buffer of its own. The first
    /// error ends it. `nothing_until` says how far there is nothing from somewhere on: that is one
    /// window, so that the time is bounded by what there is, and not by the disk's size.
    pub(crate) fn run(
        &self,
        threads: usize,
        nothing_until: impl Fn(u64) -> Result<u64> + Sync,
        work: impl Fn(Window, &mut Buffer) -> Result<()> + Sync,
    ) -> Result<()> {
        let worker = || {
            let mut buffer = Buffer(Vec::new());
            while let Some(window) = self.take(&nothing_until) {
                if let Err(error) = window.and_then(|window| work(window, &mut buffer)) {
                    self.state().failed.get_or_insert(error);
                    self.moved.notify_all();
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(worker);
            }
            worker();
        });
        self.state().failed.take().map_or(Ok(()), Err)
    }

    fn take(&self, nothing_until: impl Fn(u64) -> Result<u64>) -> Option<Result<Window>> {
        let mut state = self.state();
        let start = state.next;
        if start >= self.size || state.failed.is_some() {
            return None;
        }
        let until = match nothing_until(start) {
            Ok(until) => until,
            Err(error) => return Some(Err(error)),
        };
        let empty = (until.min(self.size) - start) / self.window * self.window;
        state.next = if until >= self.size {
            self.size
        } else {
            start.saturating_add(empty.max(self.window)).min(self.size)
        };
        Some(Ok(Window {
            range: start..state.next,
            empty: state.next <= until,
        }))
    }

    /// Runs `work` when it has been run for all windows before this one. Of no effect after a
    /// failure.
    pub(crate) fn in_turn(
        &self,
        window: &Range<u64>,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut state = self.state();
        while state.turn < window.start && state.failed.is_none() {
            state = self
                .moved
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.failed.is_some() {
            return Ok(());
        }
        drop(state);
        work()?;
        self.state().turn = window.end;
        self.moved.notify_all();
        Ok(())
    }
}
