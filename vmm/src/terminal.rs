//! The terminal of an interactive console: raw while the guest has it, restored on every way out.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// The terminal as it was found. Read by a signal handler, so it is written once.
static FOUND: OnceLock<Found> = OnceLock::new();
/// The terminal is raw now.
static RAW: AtomicBool = AtomicBool::new(false);

struct Found {
    terminal: OwnedFd,
    state: Termios,
}

/// Signals that end a process when nothing is done about them, and can be caught.
const DEADLY: [libc::c_int; 20] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGABRT,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGUSR1,
    libc::SIGSEGV,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGTERM,
    libc::SIGSTKFLT,
    libc::SIGXCPU,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGSYS,
];

/// The process's terminal in raw mode. It is as before when this is dropped, and also when the
/// process panics, exits or dies by a signal that can be caught.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Makes the terminal behind `terminal` raw: every key reaches the guest, Ctrl-C too.
    /// One terminal per process: a second call must come after the drop and name the same one.
    ///
    /// # Errors
    /// It is no terminal, or it is raw already.
    pub fn enter(terminal: impl AsFd) -> io::Result<Self> {
        let terminal = terminal.as_fd();
        let state = tcgetattr(terminal)?;
        if RAW.swap(true, Ordering::SeqCst) {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let guard = Self(());
        if FOUND.get().is_none() {
            let found = Found {
                terminal: terminal.try_clone_to_owned()?,
                state: state.clone(),
            };
            // Only the holder of `RAW` gets here.
            let _ = FOUND.set(found);
            restore_at_exit();
        }
        let mut raw = state;
        raw.make_raw();
        tcsetattr(terminal, OptionalActions::Now, &raw)?;
        Ok(guard)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was found, if it is raw. Safe to call from a signal handler.
pub fn restore() {
    if !RAW.swap(false, Ordering::SeqCst) {
        return;
    }
    if let Some(found) = FOUND.get() {
        with_stop_signal_blocked(|| {
            // A terminal that hung up has nothing to restore.
            let _ = tcsetattr(&found.terminal, OptionalActions::Now, &found.state);
        });
    }
}

/// Runs `action` with SIGTTOU blocked: a background process may then set its terminal.
fn with_stop_signal_blocked(action: impl FnOnce()) {
    // SAFETY: a signal set is plain data; the calls below fill it.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    let mut before: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live signal set.
    unsafe { libc::sigemptyset(&raw mut set) };
    // SAFETY: as above, and SIGTTOU is a signal.
    unsafe { libc::sigaddset(&raw mut set, libc::SIGTTOU) };
    // SAFETY: both pointers are to live signal sets.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, &raw mut before) };
    action();
    // SAFETY: `before` was filled above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
}

fn restore_at_exit() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        // First, so that the message is readable.
        restore();
        before(info);
    }));
    extern "C" fn at_exit() {
        restore();
    }
    // SAFETY: `at_exit` takes and returns nothing and does not unwind.
    unsafe { libc::atexit(at_exit) };

    for signal in DEADLY {
        // SAFETY: an action is plain data, all zeros is the default one.
        let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: asks only, and writes to a live action.
        unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut before) };
        // What is ignored ends nothing. What has a handler is its owner's business, but for the
        // faults: Rust's runtime has one there, which reports stack overflows.
        let is_fault = signal == libc::SIGSEGV || signal == libc::SIGBUS;
        if before.sa_sigaction == libc::SIG_DFL || is_fault {
            set_handler(signal, on_deadly as *const () as usize);
        }
    }
}

/// Async-signal-safe.
fn set_handler(signal: libc::c_int, handler: libc::sighandler_t) {
    // SAFETY: an action is plain data; what matters is set below.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = libc::SA_ONSTACK;
    // SAFETY: the handler is the default or `on_deadly`, which has the signature of a handler
    // without SA_SIGINFO and calls only what is async-signal-safe.
    unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
}

/// Restores the terminal and lets the signal do what it does by default.
extern "C" fn on_deadly(signal: libc::c_int) {
    restore();
    set_handler(signal, libc::SIG_DFL);
    // The signal is blocked while its handler runs: this one strikes at the return.
    // SAFETY: raise is async-signal-safe.
    unsafe { libc::raise(signal) };
}

/// Ctrl-A, which begins an escape.
const CTRL_A: u8 = 1;

/// Finds the escapes in what a person types: Ctrl-A x ends the guest; Ctrl-A a, or Ctrl-A twice,
/// sends one Ctrl-A. Everything else passes, Ctrl-A before any other key too.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    after_ctrl_a: bool,
}

impl EscapeFilter {
    /// Appends to `output` what is for the guest. True: the person wants to end it, and what
    /// follows in `input` is dropped.
    #[must_use]
    pub fn feed(&mut self, input: &[u8], output: &mut Vec<u8>) -> bool {
        for &byte in input {
            if !std::mem::take(&mut self.after_ctrl_a) {
                if byte == CTRL_A {
                    self.after_ctrl_a = true;
                } else {
                    output.push(byte);
                }
                continue;
            }
            match byte {
                b'x' => return true,
                b'a' | CTRL_A => output.push(CTRL_A),
                other => output.extend([CTRL_A, other]),
            }
        }
        false
    }
}

#[cfg(test)]
#[path = "terminal_tests.rs"]
mod tests;
