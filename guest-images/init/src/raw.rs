//! The system calls that `rustix` does not have.

use alloc::ffi::CString;
use alloc::vec::Vec;
use core::arch::asm;
use core::ffi::{CStr, c_char};
use core::marker::PhantomData;

use rustix::fd::{AsRawFd, FromRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::Pid;

const SIGCHLD_MASK: u64 = 1 << (17 - 1);

/// # Safety
/// As for the system call.
unsafe fn syscall4(number: isize, arguments: [usize; 4]) -> Result<usize, Errno> {
    let mut result = number;
    let [a, b, c, d] = arguments;
    // SAFETY: the kernel clobbers rcx, r11 and rax only; the caller answers for the arguments.
    unsafe {
        asm!("syscall", inlateout("rax") result, in("rdi") a, in("rsi") b, in("rdx") c,
            in("r10") d, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    match usize::try_from(result) {
        Ok(value) => Ok(value),
        Err(_) => Err(Errno::from_raw_os_error(
            i32::try_from(-result).unwrap_or(i32::MAX),
        )),
    }
}

/// Makes a second process; `None` in it.
pub(crate) fn fork() -> Result<Option<Pid>, Errno> {
    const FORK: isize = 57;
    // SAFETY: this process has one thread, so its copy is whole.
    let pid = unsafe { syscall4(FORK, [0; 4]) }?;
    Ok(i32::try_from(pid).ok().and_then(Pid::from_raw))
}

/// Becomes another program; returns only on a failure.
pub(crate) fn execve(path: &CStr, argv: &Pointers<'_>, environment: &Pointers<'_>) -> Errno {
    const EXECVE: isize = 59;
    let arguments = [
        path.as_ptr().addr(),
        argv.0.as_ptr().addr(),
        environment.0.as_ptr().addr(),
    ];
    let [path, argv, environment] = arguments;
    // SAFETY: the strings and the lists, which end with a null pointer, live through the call.
    let result = unsafe { syscall4(EXECVE, [path, argv, environment, 0]) };
    result.err().unwrap_or(Errno::NOEXEC)
}

/// A list of C strings as `execve` wants it.
pub(crate) struct Pointers<'s>(Vec<*const c_char>, PhantomData<&'s CString>);

impl<'s> Pointers<'s> {
    pub(crate) fn new(strings: &'s [CString]) -> Self {
        let each = strings.iter().map(|string| string.as_ptr());
        Self(each.chain([core::ptr::null()]).collect(), PhantomData)
    }
}

/// Ends this process.
pub(crate) fn exit(status: u8) -> ! {
    const EXIT_GROUP: isize = 231;
    loop {
        // SAFETY: it does not return.
        let _ = unsafe { syscall4(EXIT_GROUP, [status.into(), 0, 0, 0]) };
    }
}

/// Blocks `SIGCHLD`, for [`child_signals`], or lets it through again.
pub(crate) fn block_child_signal(block: bool) -> Result<(), Errno> {
    const RT_SIGPROCMASK: isize = 14;
    const SIG_BLOCK: usize = 0;
    const SIG_UNBLOCK: usize = 1;
    let how = if block { SIG_BLOCK } else { SIG_UNBLOCK };
    let mask: *const u64 = &SIGCHLD_MASK;
    // SAFETY: the mask lives through the call, and its size is that of the kernel's.
    unsafe { syscall4(RT_SIGPROCMASK, [how, mask.addr(), 0, size_of::<u64>()]) }.map(drop)
}

/// A descriptor that is readable while a blocked `SIGCHLD` is pending.
pub(crate) fn child_signals() -> Result<OwnedFd, Errno> {
    const SIGNALFD4: isize = 289;
    const SFD_NONBLOCK_CLOEXEC: usize = 0o4000 | 0o2_000_000;
    let mask: *const u64 = &SIGCHLD_MASK;
    let arguments = [
        usize::MAX,
        mask.addr(),
        size_of::<u64>(),
        SFD_NONBLOCK_CLOEXEC,
    ];
    // SAFETY: the mask lives through the call, and its size is that of the kernel's.
    let fd = unsafe { syscall4(SIGNALFD4, arguments) }?;
    let fd = i32::try_from(fd).map_err(|_| Errno::BADF)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets the loopback interface up.
pub(crate) fn loopback_up() -> Result<(), Errno> {
    const IOCTL: isize = 16;
    const SIOCSIFFLAGS: usize = 0x8914;
    const IFF_UP: i16 = 1;

    /// `struct ifreq` of `linux/if.h`.
    #[repr(C)]
    struct InterfaceRequest {
        name: [u8; 16],
        flags: i16,
        rest: [u8; 22],
    }

    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    let mut request = InterfaceRequest {
        name: [0; 16],
        flags: IFF_UP,
        rest: [0; 22],
    };
    request.name[..2].copy_from_slice(b"lo");
    let request: *const InterfaceRequest = &raw const request;
    let socket = usize::try_from(socket.as_raw_fd()).map_err(|_| Errno::BADF)?;
    // SAFETY: the request lives through the call and is as large as the kernel's.
    unsafe { syscall4(IOCTL, [socket, SIOCSIFFLAGS, request.addr(), 0]) }.map(drop)
}
