//! The VMM's virtio-console ports, found by name.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use cowshed_guest_protocol::{CONTROL_PORT, Failure, Reason, STDERR_PORT, STDIN_PORT, STDOUT_PORT};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Dir, Mode, OFlags};
use rustix::io::Errno;

use crate::Stop;
use crate::kernel_args::read_file;

/// The driver announces ports one by one, after it was loaded.
const ATTEMPTS: u32 = 10_000;
const PAUSE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

/// The four ports, open, all without blocking but control.
pub(crate) struct Ports {
    pub(crate) control: OwnedFd,
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
}

impl Ports {
    /// Waits until they are all there.
    pub(crate) fn find() -> Result<Self, Stop> {
        let mut last = Errno::NOENT;
        for _ in 0..ATTEMPTS {
            match Self::look() {
                Ok(ports) => return Ok(ports),
                Err(errno) => last = errno,
            }
            pause();
        }
        Err(Stop {
            failure: Failure::Boot,
            message: format!(
                "the VMM's virtio-console ports did not appear: {}",
                Reason(last)
            ),
        })
    }

    fn look() -> Result<Self, Errno> {
        let names = names()?;
        let path = |wanted: &str| {
            let found = names.iter().find(|(name, _)| name == wanted);
            found
                .map(|(_, device)| format!("/dev/{device}"))
                .ok_or(Errno::NOENT)
        };
        let (control, stdin) = (path(CONTROL_PORT)?, path(STDIN_PORT)?);
        let (stdout, stderr) = (path(STDOUT_PORT)?, path(STDERR_PORT)?);
        let streams = OFlags::NONBLOCK;
        Ok(Self {
            control: connected(open(&control, OFlags::RDWR)?),
            stdin: Some(open(&stdin, OFlags::RDONLY | streams)?),
            stdout: Some(connected(open(&stdout, OFlags::WRONLY | streams)?)),
            stderr: Some(connected(open(&stderr, OFlags::WRONLY | streams)?)),
        })
    }
}

/// Waits until the VMM has opened its end, before which a read would find an end of file.
fn connected(port: OwnedFd) -> OwnedFd {
    for _ in 0..ATTEMPTS {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut fds = [PollFd::from_borrowed_fd(port.as_fd(), PollFlags::empty())];
        let polled = rustix::event::poll(&mut fds, Some(&now));
        let hung_up = fds.iter().any(|fd| fd.revents().contains(PollFlags::HUP));
        if polled.is_ok() && !hung_up {
            break;
        }
        pause();
    }
    port
}

pub(crate) fn pause() {
    let _ = rustix::thread::nanosleep(&PAUSE);
}

fn open(path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::open(
        path,
        flags | OFlags::CLOEXEC | OFlags::NOCTTY,
        Mode::empty(),
    )
}

/// The names of ports and their devices.
fn names() -> Result<Vec<(String, String)>, Errno> {
    let class = "/sys/class/virtio-ports";
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut names = Vec::new();
    for entry in Dir::new(rustix::fs::open(class, flags, Mode::empty())?)? {
        let entry = entry?;
        let device = entry.file_name().to_string_lossy().into_owned();
        if let Ok(name) = read_file(&format!("{class}/{device}/name")) {
            names.push((String::from_utf8_lossy(&name).trim_ascii().into(), device));
        }
    }
    Ok(names)
}
