//! Signals to the program become events of the run.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use libc::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use rustix::event::{PollFd, PollFlags, poll};

/// The signals that are passed on or end the run in good order.
const FORWARDED: [libc::c_int; 4] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT];

/// The third SIGINT or SIGTERM within this time is meant for us: whoever sends them has seen that
/// the guest does not mind.
const INSISTENCE: Duration = Duration::from_secs(3);

/// Whether whoever sends signals insists.
#[derive(Default)]
pub(super) struct Patience {
    last_two: [Option<Instant>; 2],
}

impl Patience {
    /// Takes note of a signal that came at `now`; true when it is one too many.
    pub(super) fn ends_with(&mut self, number: u8, now: Instant) -> bool {
        if !matches!(number.into(), SIGINT | SIGTERM) {
            return false;
        }
        let [before, last] = self.last_two;
        self.last_two = [last, Some(now)];
        before.is_some_and(|before| now.duration_since(before) < INSISTENCE)
    }
}

/// The signals, blocked: they wait until somebody asks for them.
pub(crate) struct Signals(OwnedFd);

impl Signals {
    /// Blocks them. Call it before there is another thread or process: those inherit that; one that does
    /// not block them would be killed by them.
    pub(crate) fn block() -> io::Result<Self> {
        let wanted = FORWARDED.into_iter().filter(|signal| !is_ignored(*signal));
        let set = change_mask(libc::SIG_BLOCK, wanted)?;
        // SAFETY: reads the set, and makes a descriptor.
        match unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) }
        {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: new, and nobody else's.
            fd => Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) })),
        }
    }

    /// Waits for one and gives its number.
    pub(crate) fn wait(&self) -> u8 {
        loop {
            let mut ready = [PollFd::new(self, PollFlags::IN)];
            // An interrupted wait begins again.
            let _ = poll(&mut ready, None);
            if let Some(number) = self.next() {
                return number;
            }
        }
    }

    /// Ends the process as that signal does where nobody blocks it.
    pub(crate) fn end_with(&self, number: u8) -> ! {
        // Without that it ends with the status that a shell would give it.
        let _ = change_mask(libc::SIG_UNBLOCK, [number.into()]);
        // SAFETY: a signal that has come, so there is one of this number.
        unsafe { libc::raise(number.into()) };
        std::process::exit(128 + i32::from(number))
    }

    /// The number of one that has come.
    pub(super) fn next(&self) -> Option<u8> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        rustix::io::read(&self.0, &mut info).ok()?;
        // `ssi_signo`, the first field.
        let (number, _) = info.split_first_chunk()?;
        u32::from_ne_bytes(*number).try_into().ok()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Changes which signals this thread blocks, and gives the set of those.
fn change_mask(
    how: libc::c_int,
    signals: impl IntoIterator<Item = libc::c_int>,
) -> io::Result<libc::sigset_t> {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises what it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: initialised just now.
    let mut set = unsafe { set.assume_init() };
    for signal in signals {
        // SAFETY: a set of this function and a signal that exists.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    // SAFETY: the set is initialised; nobody asks for the old one.
    match unsafe { libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut()) } {
        0 => Ok(set),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Whether whoever started us wants the signal ignored, as `nohup` does and a shell in the
/// background. A blocked signal would arrive all the same.
fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = std::mem::MaybeUninit::uninit();
    // SAFETY: asks only, and writes to where it is told.
    if unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: the call that fills it succeeded.
    let action: libc::sigaction = unsafe { action.assume_init() };
    action.sa_sigaction == libc::SIG_IGN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_third_of_signals_in_quick_succession_is_one_too_many() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let int = SIGINT as u8;
        let mut patience = Patience::default();
        // One every two seconds: a program that is asked something from time to time.
        assert!([0, 2, 4, 6].map(|s| patience.ends_with(int, at(s))) == [false; 4]);
        assert!(!patience.ends_with(SIGHUP as u8, at(6)));
        assert!(patience.ends_with(SIGTERM as u8, at(6)));
    }
}
