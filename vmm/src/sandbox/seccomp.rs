//! Installs lists of system calls as seccomp filters.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, SeccompRule, TargetArch, sock_filter};

/// What may be called: by number, under one of the rules, or whatever the arguments are if there is none.
pub(super) type Allowed = BTreeMap<i64, Vec<SeccompRule>>;

// linux/seccomp.h
pub(super) const SET_MODE_FILTER: libc::c_uint = 1;
const GET_ACTION_AVAIL: libc::c_uint = 2;
/// Without it, old kernels slow a confined thread down to protect it from itself.
const SPEC_ALLOW: libc::c_uint = 1 << 2;
const RET_KILL_PROCESS: u32 = 0x8000_0000;
const RET_ERRNO: u32 = 0x0005_0000;
// linux/bpf_common.h
const LOAD_WORD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

/// Whether the kernel can end a process for a call.
pub(super) fn is_available() -> bool {
    let action = RET_KILL_PROCESS;
    // SAFETY: reads an action from a live variable and does nothing else.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, GET_ACTION_AVAIL, 0, &raw const action) };
    result == 0
}

/// Lets the calling thread, and those that it makes, do what is allowed. Any other call ends the process.
///
/// The thread must have given up new privileges.
pub(super) fn install(allowed: &Allowed) -> io::Result<()> {
    let program = compile(allowed.clone()).map_err(io::Error::other)?;
    let program = libc::sock_fprog {
        len: program.len().try_into().map_err(io::Error::other)?,
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the kernel copies the program, which lives until the call returns; `sock_filter` has the
    // kernel's layout.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            SET_MODE_FILTER,
            SPEC_ALLOW,
            &raw const program,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn compile(allowed: Allowed) -> Result<BpfProgram, seccompiler::BackendError> {
    let filter = SeccompFilter::new(
        allowed,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    // The flags of clone3 are in memory, where no filter can look. The C library takes clone when the
    // kernel seems to have no clone3.
    let instruction = |code, k, jf| sock_filter { code, jt: 0, jf, k };
    let mut program = vec![
        instruction(LOAD_WORD, 0, 0),
        instruction(JUMP_IF_EQUAL, libc::SYS_clone3 as u32, 1),
        instruction(RETURN, RET_ERRNO | libc::ENOSYS as u32, 0),
    ];
    program.extend(BpfProgram::try_from(filter)?);
    Ok(program)
}
