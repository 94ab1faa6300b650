//! The devices' threads, made by the monitor's main thread on behalf of the vCPUs'.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use cowshed_devices::threads::{Kind, Threads};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::sandbox::{self, Sandbox};

/// Threads that were asked for, until the main thread makes them.
pub(super) struct Workers {
    /// None once no more are made.
    wanted: Mutex<Option<VecDeque<Wanted>>>,
    wake: EventFd,
}

struct Wanted {
    kind: Kind,
    name: String,
    work: Box<dyn FnOnce() + Send>,
    made: SyncSender<io::Result<JoinHandle<()>>>,
}

impl Workers {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            wanted: Mutex::new(Some(VecDeque::new())),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Readable while threads are wanted.
    pub(super) fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Makes the threads that are wanted, each confined to what its kind does.
    pub(super) fn serve(&self, sandbox: Sandbox) {
        // "Would block": somebody else's wake-up was for these, too.
        let _ = self.wake.read();
        let wanted = self.wanted().as_mut().map(std::mem::take);
        for Wanted {
            kind,
            name,
            work,
            made,
        } in wanted.into_iter().flatten()
        {
            tracing::debug!(?kind, name, "a device starts a thread");
            let confined = move || {
                sandbox.confine(sandbox::Thread::Device(kind));
                work();
            };
            let thread = thread::Builder::new().name(name).spawn(confined);
            // Whoever asked waits for the answer.
            let _ = made.send(thread);
        }
    }

    /// From now on nobody waits for a thread that the main thread, busy with the end, would not make.
    pub(super) fn close(&self) {
        *self.wanted() = None;
    }

    fn wanted(&self) -> MutexGuard<'_, Option<VecDeque<Wanted>>> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Threads for Workers {
    fn spawn(
        &self,
        kind: Kind,
        name: String,
        work: Box<dyn FnOnce() + Send>,
    ) -> io::Result<JoinHandle<()>> {
        let (made, answer) = sync_channel(1);
        let ending = || io::Error::other("the machine is being stopped");
        self.wanted()
            .as_mut()
            .ok_or_else(ending)?
            .push_back(Wanted {
                kind,
                name,
                work,
                made,
            });
        self.wake.write(1)?;
        answer.recv().map_err(|_| ending())?
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_thread_is_made_by_whoever_serves_and_by_nobody_after_the_end() {
        let workers = Arc::new(Workers::new().unwrap());
        let asks = |name: &'static str| {
            let workers = workers.clone();
            thread::spawn(move || workers.spawn(Kind::Disk, name.into(), Box::new(|| {})))
        };
        let first = asks("first");
        while !first.is_finished() {
            workers.serve(Sandbox::off());
            thread::yield_now();
        }
        let made = first.join().unwrap().unwrap();
        assert_eq!(made.thread().name(), Some("first"));
        made.join().unwrap();

        let waits = asks("waits");
        while workers.wanted().as_ref().unwrap().is_empty() {
            thread::yield_now();
        }
        workers.close();
        for refused in [waits, asks("late")] {
            let error = refused.join().unwrap().unwrap_err();
            assert_eq!(error.to_string(), "the machine is being stopped");
        }
    }
}
