//! What the monitor's process has open only because it is a copy: files that a shell, a build's job
//! server or a service had left open for cowshed, and what is the session's.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};

use rustix::fs::{Mode, OFlags, RawDir};

/// What is open now beside the standard streams. To be asked before anything is opened here.
///
/// # Errors
/// `/proc` is not there.
pub(crate) fn list() -> io::Result<Vec<RawFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open("/proc/self/fd", flags, Mode::empty())?;
    let mut buffer = [MaybeUninit::uninit(); 1024];
    let mut entries = RawDir::new(&folder, &mut buffer);
    let mut open = Vec::new();
    while let Some(entry) = entries.next() {
        let name = entry?.file_name().to_str().map(str::parse::<RawFd>);
        open.extend(name.into_iter().flatten());
    }
    open.retain(|&fd| fd > libc::STDERR_FILENO && fd != folder.as_raw_fd());
    Ok(open)
}

/// Closes them.
///
/// # Safety
/// Nothing in this process uses them any more, or lets them go.
pub(crate) unsafe fn close(files: &[RawFd]) {
    for &fd in files {
        // SAFETY: as the caller says.
        unsafe { libc::close(fd) };
    }
}
