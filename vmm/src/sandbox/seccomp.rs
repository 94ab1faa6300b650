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
const RET_ALLOW: u32 = 0x7fff_0000;
/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
// linux/audit.h
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
// linux/bpf_common.h
const LOAD_WORD: u16 = 0x20;
const JUMP: u16 = 0x05;
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
pub(super) fn install(allowed: Allowed) -> io::Result<()> {
    let program = compile(allowed).map_err(io::Error::other)?;
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

/// Calls without rules are compared first, an instruction each: the kernel's work to take a program in
/// grows with its length, and threads wait for it when a machine starts. The rest is the library's.
fn compile(allowed: Allowed) -> Result<BpfProgram, seccompiler::BackendError> {
    let (plain, ruled): (Allowed, Allowed) =
        allowed.into_iter().partition(|(_, rules)| rules.is_empty());
    let filter = SeccompFilter::new(
        ruled,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    let instruction = |code, k, jt, jf| sock_filter { code, jt, jf, k };
    let mut program = vec![
        instruction(LOAD_WORD, ARCHITECTURE, 0, 0),
        instruction(JUMP_IF_EQUAL, AUDIT_ARCH_X86_64, 1, 0),
        instruction(RETURN, RET_KILL_PROCESS, 0, 0),
        instruction(LOAD_WORD, NUMBER, 0, 0),
        // The flags of clone3 are in memory, where no filter can look. The C library takes clone when
        // the kernel seems to have no clone3.
        instruction(JUMP_IF_EQUAL, libc::SYS_clone3 as u32, 0, 1),
        instruction(RETURN, RET_ERRNO | libc::ENOSYS as u32, 0, 0),
    ];
    debug_assert!(plain.len() < 255);
    // From each of them to the instruction that allows, past those that follow it and one jump.
    for (call, after) in plain.keys().zip((1..=plain.len()).rev()) {
        program.push(instruction(JUMP_IF_EQUAL, *call as u32, after as u8, 0));
    }
    program.push(instruction(JUMP, 1, 0, 0));
    program.push(instruction(RETURN, RET_ALLOW, 0, 0));
    program.extend(BpfProgram::try_from(filter)?);
    Ok(program)
}
