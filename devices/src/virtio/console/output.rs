//! What the guest writes, on its way to a host descriptor.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::Instant;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use vmm_sys_util::eventfd::EventFd;

use super::blocking::{ready, tail, wait};

/// Bytes that are held before the guest has to wait.
pub(super) const LIMIT: usize = 256 << 10;
/// Bytes that are held when the driver resets the device, which takes its buffers away.
pub(super) const LAST_LIMIT: usize = 4 << 20;
/// Most bytes in one write(2).
const CHUNK: usize = 64 << 10;

/// The host's end.
struct Sink {
    fd: OwnedFd,
    /// The descriptor is also read from: closing is not enough to tell its peer.
    shared: bool,
}

#[derive(Default)]
struct State {
    /// The host's end, until the writer has it.
    sink: Option<Sink>,
    buffer: VecDeque<u8>,
    /// Bytes ever taken from the guest.
    accepted: u64,
    /// Bytes of these that are written, or lost for good.
    settled: u64,
    /// No more will come.
    ended: bool,
    /// Writing failed, or there is nowhere to write to.
    dead: bool,
    /// Writing failed: nobody reads any more.
    broken: bool,
    /// The queues' thread waits for room.
    starved: bool,
}

/// A bounded buffer and the thread that empties it.
pub(super) struct Output {
    name: String,
    state: Mutex<State>,
    changed: Condvar,
    /// Wakes the thread that serves the queues.
    wake: EventFd,
}

impl Output {
    /// An output to `fd`, or to nowhere. `shared` says that `fd` is also read from.
    pub(super) fn new(name: &str, fd: Option<OwnedFd>, shared: bool, wake: EventFd) -> Self {
        let sink = fd.map(|fd| Sink { fd, shared });
        let state = State {
            dead: sink.is_none(),
            sink,
            ..State::default()
        };
        let name = name.to_owned();
        Self {
            name,
            state: Mutex::new(state),
            changed: Condvar::new(),
            wake,
        }
    }

    /// How many bytes fit, `limit` being the most that is held. When none do, the queues'
    /// thread is woken as soon as some will.
    pub(super) fn room(&self, limit: usize) -> usize {
        let mut state = self.state();
        if state.dead {
            return usize::MAX;
        }
        let room = limit.saturating_sub(state.buffer.len());
        state.starved = room == 0;
        room
    }

    /// Whether the host's end failed, as a pipe does that nobody reads any more.
    pub(super) fn is_broken(&self) -> bool {
        self.state().broken
    }

    /// Takes bytes over from the guest.
    pub(super) fn push(self: &Arc<Self>, data: &[u8]) {
        let mut state = self.state();
        state.accepted += data.len() as u64;
        if state.dead || state.ended {
            state.settled += data.len() as u64;
            return;
        }
        state.buffer.extend(data);
        self.start(&mut state);
    }

    /// Closes the host's end after what is in the buffer.
    pub(super) fn end(self: &Arc<Self>) {
        let mut state = self.state();
        state.ended = true;
        self.start(&mut state);
    }

    /// Waits until everything taken so far is written or lost; false if `deadline` came first.
    pub(super) fn settle(&self, deadline: Option<Instant>) -> bool {
        let mut state = self.state();
        let target = state.accepted;
        while state.settled < target {
            state = match wait(&self.changed, state, deadline) {
                Some(state) => state,
                None => return false,
            };
        }
        true
    }

    fn start(self: &Arc<Self>, state: &mut State) {
        if let Some(sink) = state.sink.take() {
            let this = Arc::clone(self);
            let thread = Builder::new().name(format!("{}-out", tail(&self.name)));
            if let Err(error) = thread.spawn(move || this.write_out(sink)) {
                tracing::warn!(port = self.name, %error, "cannot start the writer of a port");
                Self::kill(state);
            }
        }
        self.changed.notify_all();
    }

    fn kill(state: &mut State) {
        state.dead = true;
        state.buffer = VecDeque::new();
        state.settled = state.accepted;
    }

    /// The writer.
    fn write_out(&self, sink: Sink) {
        while let Some(chunk) = self.next_chunk() {
            let result = write_all(&sink.fd, &chunk);
            let mut state = self.state();
            match result {
                Ok(()) => state.settled += chunk.len() as u64,
                Err(error) => {
                    let port = &self.name;
                    // A reader that has enough goes, and that is nobody's failure.
                    if error.kind() == io::ErrorKind::BrokenPipe {
                        tracing::debug!(port, %error, "output is dropped from now on");
                    } else {
                        tracing::warn!(port, %error, "output is lost from now on");
                    }
                    Self::kill(&mut state);
                    state.broken = true;
                    self.changed.notify_all();
                    drop(state);
                    self.wake();
                    return;
                }
            }
            self.changed.notify_all();
        }
        if sink.shared {
            // Fails on what is no socket, where there is no other way to tell.
            let _ = shutdown(&sink.fd, Shutdown::Write);
        }
    }

    /// Waits for bytes to write; `None` when no more will come.
    fn next_chunk(&self) -> Option<Vec<u8>> {
        let mut state = self.state();
        while state.buffer.is_empty() {
            if state.ended {
                state.dead = true;
                return None;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let len = state.buffer.len().min(CHUNK);
        let chunk = state.buffer.drain(..len).collect();
        self.feed(&mut state);
        Some(chunk)
    }

    /// Wakes the queues' thread if it waits for room.
    fn feed(&self, state: &mut State) {
        if std::mem::take(&mut state.starved) {
            self.wake();
        }
    }

    fn wake(&self) {
        // Fails only when the counter is full: then it is awake already.
        let _ = self.wake.write(1);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn write_all(fd: &OwnedFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(len) => bytes = bytes.get(len..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            // Someone else who has the descriptor made it non-blocking.
            Err(Errno::AGAIN) => ready(fd, PollFlags::OUT)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
