//! Windows of a disk, handed out in order to a few threads.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};

/// Bytes that a thread takes at a time: enough for long requests, little beside memory.
pub(crate) const WINDOW: u64 = 2 << 20;

/// Hands out windows, and turns in their order.
pub(crate) struct Windows {
    size: u64,
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
    pub(crate) fn new(size: u64) -> Self {
        Windows {
            size,
            state: Mutex::default(),
            moved: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` on all windows, in `threads` threads, each with a buffer of its own. The first
    /// error ends it.
    pub(crate) fn run(
        &self,
        threads: usize,
        work: impl Fn(Range<u64>, &mut Vec<u8>) -> Result<()> + Sync,
    ) -> Result<()> {
        let worker = || {
            let mut buffer = Vec::new();
            while let Some(window) = self.take() {
                if let Err(error) = work(window, &mut buffer) {
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

    fn take(&self) -> Option<Range<u64>> {
        let mut state = self.state();
        let start = state.next;
        if start >= self.size || state.failed.is_some() {
            return None;
        }
        state.next = start + WINDOW;
        Some(start..(start + WINDOW).min(self.size))
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
