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
const JUMP_IF_AT_LEAST: u16 = 0x35;
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
    let program = compile(allowed)?;
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

/// A binary search by number tells calls that are allowed from those that are not; the library's
/// program decides those with rules. When the kernel takes a program in it compiles it, and walks it
/// once for each call that there is; threads wait for that when a machine starts. So it is short.
fn compile(allowed: Allowed) -> io::Result<BpfProgram> {
    let steps = steps(&allowed);
    let ruled = allowed.into_iter().filter(|(_, rules)| !rules.is_empty());
    let filter = SeccompFilter::new(
        ruled.collect(),
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    );
    let filter = filter.and_then(BpfProgram::try_from);
    // Jumps go forward: from the last instruction to the first, all know where their targets are.
    let mut reversed = filter.map_err(io::Error::other)?;
    reversed.reverse();
    let rules = reversed.len();
    for answer in [Answer::Ruled, Answer::Missing, Answer::Allow, Answer::Kill] {
        reversed.push(answer.instruction(reversed.len() - rules));
    }
    let kill = reversed.len() - 1;
    let search = search(&steps, rules, &mut reversed)?;
    debug_assert_eq!(search, reversed.len() - 1);
    reversed.push(instruction(LOAD_WORD, NUMBER, 0, 0));
    let other = jump(&reversed, kill)?;
    reversed.push(instruction(JUMP_IF_EQUAL, AUDIT_ARCH_X86_64, 0, other));
    reversed.push(instruction(LOAD_WORD, ARCHITECTURE, 0, 0));
    reversed.reverse();
    Ok(reversed)
}

/// What becomes of a call.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// As its arguments are.
    Ruled,
    Missing,
    Allow,
    Kill,
}

impl Answer {
    /// Its instruction, which has `behind` others between itself and the rules.
    fn instruction(self, behind: usize) -> sock_filter {
        match self {
            Answer::Ruled => instruction(JUMP, behind as u32, 0, 0),
            Answer::Missing => instruction(RETURN, RET_ERRNO | libc::ENOSYS as u32, 0, 0),
            Answer::Allow => instruction(RETURN, RET_ALLOW, 0, 0),
            Answer::Kill => instruction(RETURN, RET_KILL_PROCESS, 0, 0),
        }
    }
}

/// The answers in the order of the calls' numbers, each from a number on.
fn steps(allowed: &Allowed) -> Vec<(u32, Answer)> {
    let mut answers: BTreeMap<u32, Answer> = allowed
        .iter()
        .map(|(call, rules)| match rules.is_empty() {
            true => (*call as u32, Answer::Allow),
            false => (*call as u32, Answer::Ruled),
        })
        .collect();
    // Its flags are in memory, where no filter can look. The C library takes clone when the kernel
    // seems to have no clone3.
    answers.insert(libc::SYS_clone3 as u32, Answer::Missing);
    let mut steps = vec![(0, Answer::Kill)];
    for (call, answer) in answers {
        steps.push((call, answer));
        steps.push((call + 1, Answer::Kill));
    }
    // Of those that begin at one number the last counts; one that changes nothing is none.
    steps.reverse();
    steps.dedup_by_key(|(from, _)| *from);
    steps.reverse();
    steps.dedup_by_key(|(_, answer)| *answer);
    steps
}

/// Where in the reversed program the search among these steps begins; answers follow `rules`.
fn search(steps: &[(u32, Answer)], rules: usize, reversed: &mut BpfProgram) -> io::Result<usize> {
    match steps {
        [] => Err(io::ErrorKind::InvalidInput.into()),
        [(_, answer)] => Ok(rules + *answer as usize),
        _ => {
            let (low, high) = steps.split_at(steps.len() / 2);
            let below = search(low, rules, reversed)?;
            let above = search(high, rules, reversed)?;
            let (below, above) = (jump(reversed, below)?, jump(reversed, above)?);
            let from = high.first().map_or(0, |(from, _)| *from);
            reversed.push(instruction(JUMP_IF_AT_LEAST, from, above, below));
            Ok(reversed.len() - 1)
        }
    }
}

/// How far the next instruction jumps to get to `target`.
fn jump(reversed: &BpfProgram, target: usize) -> io::Result<u8> {
    let over = reversed.len() - 1 - target;
    over.try_into().map_err(io::Error::other)
}

fn instruction(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use cowshed_devices::threads::Kind;

    use super::*;
    use crate::host::Virtualization;
    use crate::sandbox::{Thread, calls};

    /// What a program says of a call before its rules.
    fn answer(program: &BpfProgram, architecture: u32, call: u32) -> Answer {
        let (mut at, mut loaded) = (0, 0);
        loop {
            let one = &program[at];
            at += 1;
            let holds = match one.code {
                JUMP_IF_EQUAL => loaded == one.k,
                _ => loaded >= one.k,
            };
            match (one.code, one.k) {
                (LOAD_WORD, ARCHITECTURE) => loaded = architecture,
                (LOAD_WORD, NUMBER) => loaded = call,
                (JUMP_IF_AT_LEAST | JUMP_IF_EQUAL, _) if holds => at += usize::from(one.jt),
                (JUMP_IF_AT_LEAST | JUMP_IF_EQUAL, _) => at += usize::from(one.jf),
                (JUMP, _) => return Answer::Ruled,
                (RETURN, RET_ALLOW) => return Answer::Allow,
                (RETURN, RET_KILL_PROCESS) => return Answer::Kill,
                (RETURN, _) => return Answer::Missing,
                _ => panic!("no such instruction: {one:?}"),
            }
        }
    }

    #[test]
    fn each_call_has_its_answer() {
        for thread in [Thread::Main, Thread::Vcpu, Thread::Device(Kind::Disk)] {
            let allowed = calls::of(thread, Virtualization::Emulated);
            let program = compile(allowed.clone()).unwrap();
            for call in 0..1000 {
                let expected = match allowed.get(&call.into()) {
                    _ if i64::from(call) == libc::SYS_clone3 => Answer::Missing,
                    None => Answer::Kill,
                    Some(rules) if rules.is_empty() => Answer::Allow,
                    Some(_) => Answer::Ruled,
                };
                let found = answer(&program, AUDIT_ARCH_X86_64, call);
                assert!(found == expected, "{thread:?}: call {call}");
                let found = answer(&program, 0x4000_0003, call);
                assert!(found == Answer::Kill, "{thread:?}: call {call} of i386");
            }
        }
    }

    #[test]
    fn rules_follow_the_search() {
        let allowed = calls::of(Thread::Vcpu, Virtualization::Emulated);
        let program = compile(allowed).unwrap();
        let jumps = program
            .iter()
            .enumerate()
            .filter(|(_, one)| one.code == JUMP);
        let (first, ruled) = jumps.clone().next().unwrap();
        let rules = first + 1 + ruled.k as usize;
        // The library's programs begin so.
        assert_eq!(
            (program[rules].code, program[rules].k),
            (LOAD_WORD, ARCHITECTURE)
        );
    }
}
