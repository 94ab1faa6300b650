//! The command's streams, between its pipes and the VMM's ports.
//!
//! The command gets pipes rather than the ports themselves because a port opens once only, and
//! scripts do open `/dev/stderr` again.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use rustix::event::{PollFd, PollFlags};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use crate::Stop;
use crate::ports::Ports;

/// The driver's longest write.
const PIECE: usize = 32 << 10;

/// The ends of the pipes that the command gets.
pub(crate) struct ChildEnds {
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
}

/// The ends that this process keeps, joined to the ports.
pub(crate) struct Pumps {
    pub(crate) stdin: Pump,
    pub(crate) stdout: Pump,
    pub(crate) stderr: Pump,
}

/// Both.
pub(crate) struct Streams {
    pub(crate) child: ChildEnds,
    pub(crate) pumps: Pumps,
}

impl Streams {
    pub(crate) fn open(ports: &mut Ports) -> Result<Self, Stop> {
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(Stop::boot("make a pipe"));
        let ((stdin, feed), (out, stdout), (err, stderr)) = (pipe()?, pipe()?, pipe()?);
        for end in [&feed, &out, &err] {
            rustix::fs::fcntl_setfl(end, OFlags::NONBLOCK).map_err(Stop::boot("set up a pipe"))?;
        }
        Ok(Self {
            child: ChildEnds {
                stdin,
                stdout,
                stderr,
            },
            pumps: Pumps {
                stdin: Pump::new(ports.stdin.take(), Some(feed)),
                stdout: Pump::new(Some(out), ports.stdout.take()),
                stderr: Pump::new(Some(err), ports.stderr.take()),
            },
        })
    }
}

/// Moves bytes from one descriptor to another, neither of which blocks.
pub(crate) struct Pump {
    /// Both ends, until one has come to its end.
    ends: Option<(OwnedFd, OwnedFd)>,
    buffer: Vec<u8>,
    /// What was read and is not yet written.
    pending: Range<usize>,
}

impl Pump {
    fn new(from: Option<OwnedFd>, to: Option<OwnedFd>) -> Self {
        Self {
            ends: from.zip(to),
            buffer: vec![0; PIECE],
            pending: 0..0,
        }
    }

    /// What to wait for, unless it is over.
    pub(crate) fn waits_for(&self) -> Option<PollFd<'_>> {
        let (from, to) = self.ends.as_ref()?;
        Some(if self.pending.is_empty() {
            PollFd::from_borrowed_fd(from.as_fd(), PollFlags::IN)
        } else {
            PollFd::from_borrowed_fd(to.as_fd(), PollFlags::OUT)
        })
    }

    /// Moves what can be moved now, after waiting ended with `events`.
    pub(crate) fn advance(&mut self, events: PollFlags) {
        if events.is_empty() {
            return;
        }
        // Nobody reads any more. (A port says so by a hang-up, and would block.)
        let deaf = PollFlags::HUP | PollFlags::ERR;
        let done = (!self.pending.is_empty() && events.intersects(deaf)) || self.step().is_err();
        if done {
            self.close();
        }
    }

    /// Gives up: the command's writes then fail, or its reads end.
    pub(crate) fn close(&mut self) {
        self.ends = None;
    }

    /// `Err` at the end of either side.
    fn step(&mut self) -> Result<(), Errno> {
        let Some((from, to)) = &self.ends else {
            return Err(Errno::PIPE);
        };
        if self.pending.is_empty() {
            match rustix::io::read(from, &mut self.buffer[..]) {
                Ok(0) => return Err(Errno::PIPE),
                Ok(count) => self.pending = 0..count,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                Err(errno) => return Err(errno),
            }
        }
        match rustix::io::write(
            to,
            self.buffer.get(self.pending.clone()).unwrap_or_default(),
        ) {
            Ok(count) => self.pending.start = self.pending.end.min(self.pending.start + count),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        Ok(())
    }
}
