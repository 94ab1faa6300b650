//! Waiting for the command: its streams, its signals, its end, and everybody else's.

use alloc::vec::Vec;

use cowshed_guest_protocol::FromGuest;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

use crate::control::Control;
use crate::relay::Pumps;
use crate::{Stop, raw};

/// How long processes that the command left behind have between SIGTERM and SIGKILL: this many
/// waits of [`STEP`].
const GRACE: u32 = 20;
const STEP: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// Runs until the command has ended, no other process is left, and all their output is with the
/// VMM. How the command ended.
pub(crate) fn to_the_end(
    child: Pid,
    control: &mut Control,
    pumps: Pumps,
) -> Result<FromGuest<'static>, Stop> {
    let signals = raw::child_signals().map_err(Stop::boot("watch the command"))?;
    let mut watch = Watch {
        child,
        control,
        pumps,
        signals,
        listening: true,
        ended: None,
        alone: false,
    };
    watch.forward_signals();
    let ended = loop {
        if let Some(ended) = watch.ended {
            break ended;
        }
        watch.wait(None);
    };
    watch.pumps.stdin.close();
    watch.listening = false;
    watch.dismiss_others();
    while watch.pumps.stdout.waits_for().is_some() || watch.pumps.stderr.waits_for().is_some() {
        watch.wait(None);
    }
    Ok(message(ended))
}

struct Watch<'c> {
    child: Pid,
    control: &'c mut Control,
    pumps: Pumps,
    /// Readable when a child has ended.
    signals: OwnedFd,
    /// Whether the VMM may still say something.
    listening: bool,
    ended: Option<WaitStatus>,
    /// Whether no other process is left.
    alone: bool,
}

impl Watch<'_> {
    /// Waits until something happens, and deals with it.
    fn wait(&mut self, timeout: Option<&Timespec>) {
        let listening = if self.listening {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        let pumps = [&self.pumps.stdin, &self.pumps.stdout, &self.pumps.stderr];
        let mut fds = Vec::with_capacity(5);
        fds.push(PollFd::from_borrowed_fd(
            self.signals.as_fd(),
            PollFlags::IN,
        ));
        if self.listening {
            fds.push(PollFd::from_borrowed_fd(self.control.fd(), listening));
        }
        fds.extend(pumps.into_iter().filter_map(|pump| pump.waits_for()));
        if poll(&mut fds, timeout).is_err() {
            return;
        }
        let mut events = fds.iter().map(PollFd::revents);
        let signaled = events.next().unwrap_or(PollFlags::empty());
        let spoken = if self.listening { events.next() } else { None };
        let mut moved = [PollFlags::empty(); 3];
        for (moved, pump) in moved.iter_mut().zip(pumps) {
            if pump.waits_for().is_some() {
                *moved = events.next().unwrap_or(PollFlags::empty());
            }
        }
        drop(fds);
        let [stdin, stdout, stderr] = moved;
        self.pumps.stdin.advance(stdin);
        self.pumps.stdout.advance(stdout);
        self.pumps.stderr.advance(stderr);
        if spoken.is_some_and(|events| !events.is_empty()) {
            self.listening = self.control.receive().unwrap_or(false);
            self.forward_signals();
        }
        if !signaled.is_empty() {
            self.reap();
        }
    }

    fn forward_signals(&mut self) {
        loop {
            match self.control.signal() {
                Ok(Some(number)) => {
                    if let Some(signal) = Signal::from_named_raw(number.into()) {
                        let _ = rustix::process::kill_process_group(self.child, signal);
                    }
                }
                Ok(None) => return,
                Err(_) => {
                    self.listening = false;
                    return;
                }
            }
        }
    }

    /// Collects every child that has ended.
    fn reap(&mut self) {
        let mut drained = [0; 128];
        while rustix::io::read(&self.signals, &mut drained[..]).is_ok() {}
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == self.child => self.ended = Some(status),
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(Errno::INTR) => {}
                Err(_) => {
                    self.alone = true;
                    return;
                }
            }
        }
    }

    /// Ends every process that the command left behind.
    fn dismiss_others(&mut self) {
        self.reap();
        // The group of the first process is, to `kill`, everybody but it.
        let everybody = Pid::INIT;
        let _ = rustix::process::kill_process_group(everybody, Signal::TERM);
        for _ in 0..GRACE {
            if self.alone {
                return;
            }
            self.wait(Some(&STEP));
        }
        while !self.alone {
            let _ = rustix::process::kill_process_group(everybody, Signal::KILL);
            self.wait(Some(&STEP));
        }
    }
}

fn message(status: WaitStatus) -> FromGuest<'static> {
    match (status.exit_status(), status.terminating_signal()) {
        (_, Some(number)) => FromGuest::Signaled {
            number: u8::try_from(number).unwrap_or(0),
        },
        (code, None) => FromGuest::Exited {
            code: code.and_then(|c| u8::try_from(c).ok()).unwrap_or(0),
        },
    }
}
