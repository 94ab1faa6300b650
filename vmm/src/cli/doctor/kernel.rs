//! What the host's kernel offers besides KVM. cowshed runs without any of it.

use std::fs;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use super::Check;

pub(super) fn checks() -> Vec<Check> {
    vec![io_uring(), landlock()]
}

fn io_uring() -> Check {
    match set_up_ring() {
        Ok(_ring) => Check::ok("io_uring", "available"),
        Err(error) => {
            let setting = fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
            let remedy = match (error.raw_os_error(), setting.as_deref().map(str::trim)) {
                (Some(libc::EPERM), Ok("1" | "2")) => "sudo sysctl kernel.io_uring_disabled=0",
                (Some(libc::EPERM), _) => "a seccomp filter forbids it: ask who runs the container",
                _ => "run Linux 5.10 or newer as the host",
            };
            Check::note(
                "io_uring",
                format!("not available ({error}): disks are slower"),
                remedy,
            )
        }
    }
}

fn set_up_ring() -> io::Result<OwnedFd> {
    // `struct io_uring_params`: 120 bytes, all zeros for no wishes.
    let mut params = [0_u64; 15];
    // SAFETY: the kernel reads and writes 120 bytes at `params`, which lives across the call.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1_u32, params.as_mut_ptr()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it. It fits: the
    // kernel's descriptors are C ints.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn landlock() -> Check {
    // LANDLOCK_CREATE_RULESET_VERSION
    let flags = 1_u32;
    // SAFETY: with this flag the call reads nothing and returns a number.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0_usize,
            flags,
        )
    };
    if version >= 1 {
        return Check::ok("Landlock", format!("ABI {version}"));
    }
    let error = io::Error::last_os_error();
    let remedy = match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => {
            "it is built in but off: add landlock to the host kernel's argument lsm="
        }
        _ => "run a host kernel with CONFIG_SECURITY_LANDLOCK (Debian's has it)",
    };
    Check::note("Landlock", format!("not available ({error})"), remedy)
}
