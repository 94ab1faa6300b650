//! How long a queue's thread polls before it sleeps.
//!
//! To be woken costs tens of microseconds where the processor has gone idle meanwhile, which is as
//! much as a fast disk takes for a request. So a thread polls as long as what it waited for lately
//! took, within a bound: the window doubles when something came within the bound and after the
//! window, and halves when nothing came within the bound. It is closed before a thread sleeps for
//! long, so that a disk without requests costs nothing.
//!
//! A thread that polls takes its processor from nobody but those who wait for one. On a host with
//! fewer processors than vCPUs and busy queues these may be the guest's own vCPUs: then what is
//! waited for comes late, if at all while the thread polls, and the window closes by that.

use std::time::Duration;

/// The window that a closed one opens to.
const FIRST: Duration = Duration::from_micros(4);

/// How long to poll.
#[derive(Debug)]
pub(super) struct PollWindow {
    most: Duration,
    now: Duration,
}

impl PollWindow {
    /// Closed, and never longer than `most`: zero keeps it so.
    pub(super) fn new(most: Duration) -> Self {
        Self {
            most,
            now: Duration::ZERO,
        }
    }

    pub(super) fn len(&self) -> Duration {
        self.now
    }

    /// Something came that was waited for so long, polling and sleeping.
    pub(super) fn adapt(&mut self, waited: Duration) {
        if waited > self.most {
            self.now /= 2;
            if self.now < FIRST {
                self.now = Duration::ZERO;
            }
        } else if waited > self.now {
            self.now = (self.now * 2).max(FIRST).min(self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Duration = Duration::from_micros(50);

    #[test]
    fn opens_for_what_comes_soon_and_closes_for_what_does_not() {
        let mut window = PollWindow::new(MOST);
        assert_eq!(window.len(), Duration::ZERO);
        let soon = Duration::from_micros(30);
        while window.len() < soon {
            let before = window.len();
            window.adapt(soon);
            assert!(window.len() > before);
        }
        let enough = window.len();
        assert!(enough <= MOST);
        window.adapt(soon);
        assert_eq!(window.len(), enough);
        for _ in 0..5 {
            window.adapt(Duration::from_secs(1));
        }
        assert_eq!(window.len(), Duration::ZERO);
    }

    #[test]
    fn never_opens_where_it_must_not() {
        let mut window = PollWindow::new(Duration::ZERO);
        window.adapt(Duration::ZERO);
        window.adapt(Duration::from_nanos(1));
        assert_eq!(window.len(), Duration::ZERO);
    }
}
