//! A device's thread, and how it ends.

use std::io;
use std::thread::{Builder, JoinHandle};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A thread that ends soon after its stop event is signalled. Dropping it waits for that.
pub(crate) struct Worker {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts `work` on a thread of that name; `work` returns when its argument is readable.
    pub(crate) fn spawn(
        name: String,
        work: impl FnOnce(EventFd) + Send + 'static,
    ) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let stopped = stop.try_clone()?;
        let thread = Builder::new().name(name).spawn(move || work(stopped))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Written once and read by nobody, the counter cannot be full.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a device's thread panicked");
        }
    }
}
