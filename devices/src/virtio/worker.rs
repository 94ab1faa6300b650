//! A device's thread, and how it ends.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::threads::{Kind, Threads};

/// Tells a thread to end.
pub(crate) struct Stop {
    event: EventFd,
    flag: Arc<AtomicBool>,
}

impl Stop {
    /// Whether the thread is to end: cheap enough to ask before each request.
    pub(crate) fn is_set(&self) -> bool {
        self.flag.load(Ordering::SeqCst)
    }

    /// Becomes readable, and stays so, when the thread is to end.
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }
}

/// A thread that ends soon after it is told to. Dropping it tells it and waits.
pub(crate) struct Worker {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts `work` on a thread of that name; `work` returns when its argument is set.
    pub(crate) fn spawn(
        threads: &dyn Threads,
        kind: Kind,
        name: String,
        work: impl FnOnce(Stop) + Send + 'static,
    ) -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let flag = Arc::<AtomicBool>::default();
        let theirs = Stop {
            event: event.try_clone()?,
            flag: Arc::clone(&flag),
        };
        let thread = threads.spawn(kind, name, Box::new(move || work(theirs)))?;
        Ok(Self {
            stop: Stop { event, flag },
            thread: Some(thread),
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.flag.store(true, Ordering::SeqCst);
        // Written once and read by nobody, the counter cannot be full.
        let _ = self.stop.event.write(1);
        if let Some(thread) = self.thread.take()
            && let Err(panic) = thread.join()
            && !std::thread::panicking()
        {
            // A bug in the thread is a bug here: it is not to be hidden by a reset.
            std::panic::resume_unwind(panic);
        }
    }
}
