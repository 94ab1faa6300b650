//! The pseudo file systems, and what a command expects in `/dev`.

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_remount};

use crate::{Stop, raw};

const PLAIN: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NOEXEC)
    .union(MountFlags::NODEV);

/// Mounts what this program needs; the initramfs may be an empty one.
pub(crate) fn early() -> Result<(), Stop> {
    for (kind, target, flags) in [
        ("devtmpfs", "/dev", MountFlags::NOSUID),
        ("proc", "/proc", PLAIN),
        ("sysfs", "/sys", PLAIN),
    ] {
        mount_on(kind, target, flags, c"").map_err(Stop::boot(kind))?;
    }
    // Descriptors 0 to 2 are taken, so that no pipe gets a number that a command's stream has.
    loop {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty());
        let null = null.map_err(Stop::boot("open /dev/null"))?;
        if rustix::fd::AsRawFd::as_raw_fd(&null) > 2 {
            return Ok(());
        }
        core::mem::forget(null);
    }
}

/// Mounts what a command expects, where the root has a place for it.
pub(crate) fn late() -> Result<(), Stop> {
    let tmpfs = MountFlags::NOSUID | MountFlags::NODEV;
    for (kind, target, flags, options) in [
        ("tmpfs", "/run", tmpfs, c"mode=755"),
        ("tmpfs", "/dev/shm", tmpfs, c"mode=1777"),
        (
            "devpts",
            "/dev/pts",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            c"ptmxmode=666,mode=620",
        ),
    ] {
        match mount_on(kind, target, flags, options) {
            // A read-only root without the folder, a kernel without the file system.
            Ok(()) | Err(Errno::NOENT | Errno::ROFS | Errno::NODEV) => {}
            Err(errno) => return Err(Stop::boot(target)(errno)),
        }
    }
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        let _ = rustix::fs::symlink(target, link);
    }
    // A kernel without a network has no loopback either.
    let _ = raw::loopback_up();
    Ok(())
}

fn mount_on(
    kind: &str,
    target: &str,
    flags: MountFlags,
    options: &core::ffi::CStr,
) -> Result<(), Errno> {
    match rustix::fs::mkdir(target, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    match mount(kind, target, kind, flags, options) {
        // The kernel mounted it already.
        Err(Errno::BUSY) => Ok(()),
        result => result,
    }
}

/// Brings everything to the disk, and the root file system to a clean state if it lets us.
pub(crate) fn flush() {
    rustix::fs::sync();
    let _ = mount_remount("/", MountFlags::RDONLY, "");
}
