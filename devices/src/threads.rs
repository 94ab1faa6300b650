//! Threads that devices ask for: whoever makes them can confine each to what its work needs.

use std::io;
use std::thread::JoinHandle;

/// What a device's thread does, which says what it may ask of the host's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Moves bytes between guest memory and the files of an image.
    Disk,
    /// Moves bytes between guest memory and the console's ports, and makes the ports' own threads.
    Console,
    /// Fills guest memory with random bytes.
    Entropy,
}

/// Makes threads. A device is activated on a vCPU's thread, whose confinement its own would inherit.
pub trait Threads: Send + Sync {
    /// Runs `work` on a new thread of that name (at most 15 bytes of it are shown).
    ///
    /// # Errors
    /// The host has no thread left, or the machine is being stopped.
    fn spawn(
        &self,
        kind: Kind,
        name: String,
        work: Box<dyn FnOnce() + Send>,
    ) -> io::Result<JoinHandle<()>>;
}
