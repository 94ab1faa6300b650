//! The monitor's process, seen from the session.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, WaitStatus, getpid, getppid, kill_process, pidfd_open,
    set_parent_process_death_signal, waitpid,
};

use super::link::{self, Link, Order, Told};

/// How long one that has closed its link may take to end. One that a guest has taken over need not end
/// at all.
const LAST_STEPS: Duration = Duration::from_secs(10);

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

    /// Says how it ended, which has closed its link, in words that follow "the machine's process".
    pub(crate) fn wait(self) -> String {
        self.wait_for(LAST_STEPS)
    }

    fn wait_for(mut self, limit: Duration) -> String {
        if !self.ends_within(limit) {
            return self.end_mad();
        }
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

    /// Ends it, which is out of its mind, and says so in such words.
    pub(crate) fn end_mad(self) -> String {
        drop(self);
        "said something that makes no sense: either its guest has broken into it, or this is a bug in \
         cowshed"
            .into()
    }

    /// Ends it, which has said its last, without waiting for the kernel to take its machine down.
    pub(crate) fn leave(mut self) {
        if let Some(pid) = self.pid.take() {
            // Not waited for, so the number is its own.
            let _ = kill_process(pid, Signal::KILL);
        }
    }

    /// Waits for its end, but no longer than `limit`. It is to be reaped still.
    fn ends_within(&self, limit: Duration) -> bool {
        let Some(pidfd) = self
            .pid
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
        else {
            return false;
        };
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap_or_default();
            match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
                Err(Errno::INTR) => {}
                ready => return ready.is_ok_and(|ready| ready > 0),
            }
        }
    }

    fn reap(&mut self) -> Option<WaitStatus> {
        let pid = self.pid.take()?;
        loop {
            match waitpid(Some(pid), WaitOptions::empty()) {
                Err(Errno::INTR) => {}
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

#[cfg(test)]
impl From<std::process::Child> for Process {
    fn from(child: std::process::Child) -> Self {
        Self {
            pid: Some(Pid::from_child(&child)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn one_that_ends_has_its_own_status_and_one_that_does_not_is_killed() {
        let mut shell = Command::new("sh");
        let ended = shell.args(["-c", "kill -SYS $$"]).spawn().unwrap();
        assert!(Process::from(ended).wait().contains("by its sandbox"));
        let deaf = Command::new("sleep").arg("600").spawn().unwrap();
        let limit = Duration::from_millis(1);
        assert!(Process::from(deaf).wait_for(limit).contains("no sense"));
    }
}
