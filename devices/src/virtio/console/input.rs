//! What the guest reads, on its way from a host descriptor.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;

use rustix::event::PollFlags;
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;

use super::blocking::{ready, tail};

/// Most bytes in one read(2), and most that are held.
const CHUNK: usize = 64 << 10;

#[derive(Default)]
struct State {
    /// The host's end, until the reader has it.
    source: Option<OwnedFd>,
    buffer: Vec<u8>,
    /// How much of the buffer the guest has got.
    given: usize,
    /// The guest waits for bytes.
    wanted: bool,
    /// No more will come.
    ended: bool,
}

impl State {
    fn pending(&self) -> &[u8] {
        self.buffer.get(self.given..).unwrap_or_default()
    }
}

/// The thread that reads, and what it has read: one read ahead of the guest, and none before
/// the guest asks.
pub(super) struct Input {
    name: String,
    state: Mutex<State>,
    changed: Condvar,
    /// Wakes the thread that serves the queues.
    wake: EventFd,
}

impl Input {
    pub(super) fn new(name: &str, source: OwnedFd, wake: EventFd) -> Self {
        let state = State {
            source: Some(source),
            ..State::default()
        };
        Self {
            name: name.to_owned(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            wake,
        }
    }

    /// Whether the guest has got everything there will ever be.
    pub(super) fn is_over(&self) -> bool {
        let state = self.state();
        state.ended && state.pending().is_empty()
    }

    /// Whether there are bytes for the guest. If not, they are asked for, and the queues'
    /// thread is woken when they or the end have come.
    pub(super) fn poll(self: &Arc<Self>) -> bool {
        let mut state = self.state();
        if !state.pending().is_empty() {
            return true;
        }
        if !state.ended && !state.wanted {
            state.wanted = true;
            if let Some(source) = state.source.take() {
                let this = Arc::clone(self);
                let thread = Builder::new().name(format!("{}-in", tail(&self.name)));
                if let Err(error) = thread.spawn(move || this.read_in(&source)) {
                    tracing::warn!(port = self.name, %error, "cannot start the reader of a port");
                    state.ended = true;
                }
            }
            self.changed.notify_all();
        }
        false
    }

    /// Offers the bytes that are there to `taker`, which returns how many it has taken.
    pub(super) fn give<E>(&self, taker: impl FnOnce(&[u8]) -> Result<usize, E>) -> Result<(), E> {
        let mut state = self.state();
        let taken = taker(state.pending())?;
        state.given += taken;
        if state.pending().is_empty() {
            state.buffer.clear();
            state.given = 0;
        }
        Ok(())
    }

    /// Lets the reader go, as soon as its read(2) returns.
    pub(super) fn close(&self) {
        self.state().ended = true;
        self.changed.notify_all();
    }

    /// The reader.
    fn read_in(&self, source: &OwnedFd) {
        let mut buffer = vec![0; CHUNK];
        while self.is_wanted() {
            let len = match rustix::io::read(source, &mut buffer) {
                Ok(len) => len,
                Err(Errno::INTR) => continue,
                // Someone else who has the descriptor made it non-blocking.
                Err(Errno::AGAIN) if ready(source, PollFlags::IN).is_ok() => continue,
                Err(error) => {
                    tracing::debug!(port = self.name, %error, "input ends");
                    0
                }
            };
            let mut state = self.state();
            state.wanted = false;
            state.ended |= len == 0;
            state
                .buffer
                .extend_from_slice(buffer.get(..len).unwrap_or_default());
            // Fails only when the counter is full: then it is awake already.
            let _ = self.wake.write(1);
        }
    }

    /// Waits until the guest wants bytes; false when nobody will any more.
    fn is_wanted(&self) -> bool {
        let mut state = self.state();
        while !state.wanted && !state.ended {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        !state.ended
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
