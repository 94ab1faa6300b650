//! The monitor's process, seen from the session.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::process::{
    Pid, Signal, WaitOptions, WaitStatus, getpid, getppid, kill_process,
    set_parent_process_death_signal, waitpid,
};

use super::link::{self, Link, Order, Told};

/// A process that ends, at the latest, when this is dropped or the session's process dies.
pub(crate) struct Process {
    pid: Option<Pid>,
}

impl Process {
    /// Runs `monitor` in a process of its own, and gives our end of the link to it.
    ///
    /// It is a copy of this one, so everything that is open here is open there. To be called before
    /// there are other threads: a copy has only the thread that made it.
    ///
    /// # Errors
    /// The host has no process or no file descriptor left.
    pub(crate) fn start(
        monitor: impl FnOnce(Link<Told, Order>),
    ) -> io::Result<(Self, Link<Order, Told>)> {
        let session = getpid();
        let (ours, theirs) = link::pair()?;
        // SAFETY: nothing but the heap is shared with threads that the copy would not have, and the C
        // library keeps its heap usable across a fork.
        match unsafe { libc::fork() } {
            0 => {
                drop(ours);
                // Fails for a number that is no signal only.
                let _ = set_parent_process_death_signal(Some(Signal::KILL));
                let whole = getppid() == Some(session)
                    && catch_unwind(AssertUnwindSafe(|| monitor(theirs))).is_ok();
                // SAFETY: ends the process without running what belongs to the session.
                unsafe { libc::_exit(if whole { 0 } else { 1 }) }
            }
            pid => match Pid::from_raw(pid).filter(|_| pid > 0) {
                Some(pid) => Ok((Self { pid: Some(pid) }, ours)),
                None => Err(io::Error::last_os_error()),
            },
        }
    }

    /// Waits for its end and says how that came, in words that follow "the machine's process".
    pub(crate) fn wait(mut self) -> String {
        match self.reap().and_then(|status| status.terminating_signal()) {
            // The kernel's audit message has the thread's name and the number of the call.
            Some(libc::SIGSYS) => "was ended by its sandbox, for a system call that it never makes: either \
                 its guest has broken into it, or this is a bug in cowshed. The host's kernel log has \
                 thread and call: journalctl -k --grep type=1326".into(),
            Some(libc::SIGKILL) => "was killed (signal 9): did the host run out of memory?".into(),
            Some(signal) => {
                format!("was ended by signal {signal}: this is a bug in cowshed, please report it")
            }
            None => "ended early: this is a bug in cowshed, please report it".into(),
        }
    }

    /// Ends it, which has said its last, without waiting for the kernel to take its machine down.
    pub(crate) fn leave(mut self) {
        if let Some(pid) = self.pid.take() {
            // Not waited for, so the number is its own.
            let _ = kill_process(pid, Signal::KILL);
        }
    }

    fn reap(&mut self) -> Option<WaitStatus> {
        let pid = self.pid.take()?;
        loop {
            match waitpid(Some(pid), WaitOptions::empty()) {
                Err(rustix::io::Errno::INTR) => {}
                ended => return ended.ok().flatten().map(|(_, status)| status),
            }
        }
    }
}

/// Closes the standard streams of the monitor's process, which has nothing more to say on them.
pub(super) fn close_streams() {
    for stream in 0..=2 {
        // SAFETY: whoever still writes to a standard stream hears that it is closed, as of any stream
        // that a parent had closed. No file is opened any more that would get its number.
        unsafe { libc::close(stream) };
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(pid) = self.pid {
            // Not waited for yet, so the number is still its own.
            let _ = kill_process(pid, Signal::KILL);
            self.reap();
        }
    }
}
