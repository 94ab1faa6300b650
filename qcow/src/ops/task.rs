//! Watching and stopping long work.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// Long work as seen from other threads: how far it is, and whether it is to stop.
#[derive(Debug, Default)]
pub struct Task {
    total: AtomicU64,
    done: AtomicU64,
    stopped: AtomicBool,
    /// Bytes a second, 0: as many as can be.
    rate: u64,
    began: OnceLock<Instant>,
}

/// How long a stop may go unnoticed where the rate is limited.
const TICK: Duration = Duration::from_millis(100);

impl Task {
    /// One that does at most `rate` bytes of the disk a second, whatever is there; 0: no limit.
    pub fn with_rate(rate: u64) -> Self {
        Task {
            rate,
            ..Self::default()
        }
    }

    /// Bytes of the disk that the work is about; 0 before it is known.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Bytes of them that are done with.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Makes the work end soon, with [`Error::Stopped`]. Safe in a signal handler.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    pub(crate) fn begin(&self, total: u64) {
        self.began.get_or_init(Instant::now);
        self.done.store(0, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }

    /// Counts bytes, or says that the work is to end.
    pub(crate) fn advance(&self, bytes: u64) -> Result<()> {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        loop {
            if self.stopped.load(Ordering::Relaxed) {
                return Err(Error::Stopped);
            }
            let early = self.early(done);
            if early.is_zero() {
                return Ok(());
            }
            std::thread::sleep(early.min(TICK));
        }
    }

    /// How long it is until `done` bytes are not too many.
    fn early(&self, done: u64) -> Duration {
        let took = self.began.get_or_init(Instant::now).elapsed();
        let due = match self.rate {
            0 => Duration::ZERO,
            rate => Duration::from_secs_f64(done as f64 / rate as f64),
        };
        due.saturating_sub(took)
    }
}
