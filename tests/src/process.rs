//! Child processes with a deadline: no test hangs, and none waits longer than it must.

use std::io::Read;
use std::process::{Child, ExitStatus};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Waits until `child` ends; `None` once `limit` has passed and it has not.
///
/// # Panics
/// When the kernel has no pidfd (before 5.3) or the child was already waited for elsewhere.
pub fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).expect("pidfd_open");
    loop {
        if let Some(status) = child.try_wait().expect("wait for the child") {
            return Some(status);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        let timeout = Timespec::try_from(left).expect("a test's deadline");
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("poll a pidfd: {error}"),
        }
    }
}

/// Kills `child` with SIGKILL and reaps it.
pub fn kill(child: &mut Child) {
    // It may have ended by itself in between, which is as good.
    let _ = child.kill();
    let _ = child.wait();
}

/// Calls `probe` until it gives a value, a few times a second; panics with `what` after `limit`.
///
/// For what has no event to wait on, such as a file that a guest's write makes grow.
pub fn until<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(
            Instant::now() < deadline,
            "waited {limit:?} in vain: {what}"
        );
        std::thread::park_timeout(Duration::from_millis(50));
    }
}

/// Reads `source` to its end on a thread of its own, so that no child blocks on a full pipe.
pub fn drain(mut source: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        source
            .read_to_end(&mut bytes)
            .expect("read a child's output");
        bytes
    })
}
