//! The system calls of each kind of thread: all that is left to a guest which has taken one over.
//!
//! No list has a call that opens, makes or names a file, runs a program, makes a process or a socket,
//! signals or traces another process, or makes memory executable.

use cowshed_devices::threads::Kind;
use kvm_bindings::{
    kvm_debugregs, kvm_fpu, kvm_guest_debug, kvm_ioeventfd, kvm_irq_routing, kvm_irqfd, kvm_msrs,
    kvm_regs, kvm_sregs, kvm_translation, kvm_vcpu_events, kvm_xsave,
};
use libc::*;
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

use super::Thread;
use super::seccomp::{Allowed, SET_MODE_FILTER};
use crate::host::Virtualization;

// linux/io_uring.h
const IORING_REGISTER_FILES: u64 = 2;
const IORING_REGISTER_ENABLE_RINGS: u64 = 12;
/// The type of all of KVM's requests.
const KVMIO: c_uint = 0xae;

/// What a thread may call. Threads inherit the list of the one that made them, on top of their own: the
/// main thread's has all that it hands on, and a vCPU's is made before the main thread is confined.
pub(super) fn of(thread: Thread, host: Virtualization) -> Allowed {
    let mut allowed = Allowed::new();
    any_thread(&mut allowed);
    match thread {
        Thread::Main => {
            for kind in [Kind::Disk, Kind::Console, Kind::Entropy] {
                device(&mut allowed, kind);
            }
            make_threads(&mut allowed);
            machine_ioctls(&mut allowed);
            // The session's orders.
            all(&mut allowed, &[SYS_recvfrom, SYS_sendto]);
            // What confines the threads that it makes.
            one_of(&mut allowed, SYS_seccomp, 0, &[SET_MODE_FILTER.into()]);
        }
        Thread::Vcpu => {
            all(&mut allowed, &[SYS_eventfd2]);
            // Endings are told to the session.
            all(&mut allowed, &[SYS_sendto]);
            machine_ioctls(&mut allowed);
            vcpu_ioctls(&mut allowed, host);
        }
        Thread::Device(kind) => device(&mut allowed, kind),
    }
    allowed
}

/// What the language's and the C library's runtimes need on every thread, to its end.
fn any_thread(allowed: &mut Allowed) {
    // Files that are open, and waiting for them.
    all(
        allowed,
        &[
            SYS_read, SYS_readv, SYS_write, SYS_writev, SYS_close, SYS_poll, SYS_ppoll,
        ],
    );
    let commands = [F_DUPFD_CLOEXEC, F_GETFD, F_GETFL].map(|command| command as u64);
    one_of(allowed, SYS_fcntl, 1, &commands);
    // Memory, but for code.
    all(allowed, &[SYS_brk, SYS_munmap, SYS_mremap, SYS_madvise]);
    with_bits(allowed, SYS_mmap, 2, PROT_EXEC, 0);
    with_bits(allowed, SYS_mprotect, 2, PROT_EXEC, 0);
    // Locks, time, randomness for hash tables.
    all(
        allowed,
        &[
            SYS_futex,
            SYS_sched_yield,
            SYS_clock_gettime,
            SYS_clock_nanosleep,
            SYS_nanosleep,
            SYS_getrandom,
        ],
    );
    // Signals: being kicked out of the guest, and ending by abort, which signals the process itself.
    all(
        allowed,
        &[
            SYS_rt_sigaction,
            SYS_rt_sigprocmask,
            SYS_rt_sigreturn,
            SYS_restart_syscall,
            SYS_sigaltstack,
            SYS_getpid,
            SYS_gettid,
        ],
    );
    one_of(allowed, SYS_tgkill, 0, &[std::process::id().into()]);
    // A thread's beginning and end.
    all(
        allowed,
        &[
            SYS_rseq,
            SYS_set_robust_list,
            SYS_sched_getaffinity,
            SYS_exit,
            SYS_exit_group,
        ],
    );
    one_of(allowed, SYS_prctl, 0, &[PR_SET_NAME as u64]);
}

fn device(allowed: &mut Allowed, kind: Kind) {
    match kind {
        Kind::Disk => {
            image_files(allowed);
            io_uring(allowed);
            make_threads(allowed);
        }
        // Its ports have threads, which close sockets for writing when a port's output has ended.
        Kind::Console => {
            make_threads(allowed);
            all(allowed, &[SYS_shutdown]);
        }
        Kind::Entropy => {}
    }
}

/// Images, whose files are open.
fn image_files(allowed: &mut Allowed) {
    all(
        allowed,
        &[
            SYS_pread64,
            SYS_pwrite64,
            SYS_preadv,
            SYS_pwritev,
            SYS_preadv2,
            SYS_pwritev2,
            SYS_lseek,
            SYS_fsync,
            SYS_fdatasync,
            SYS_fallocate,
            SYS_ftruncate,
            // Sizes. A path can be asked about, too, which Landlock does not prevent.
            SYS_fstat,
            SYS_newfstatat,
            SYS_statx,
        ],
    );
}

/// Rings that were made and restricted before: seccomp does not see what they do, so none is made here.
fn io_uring(allowed: &mut Allowed) {
    all(allowed, &[SYS_io_uring_enter, SYS_eventfd2]);
    let register = [IORING_REGISTER_FILES, IORING_REGISTER_ENABLE_RINGS];
    one_of(allowed, SYS_io_uring_register, 1, &register);
}

/// Threads, not processes.
fn make_threads(allowed: &mut Allowed) {
    with_bits(allowed, SYS_clone, 0, CLONE_THREAD, CLONE_THREAD);
}

/// Interrupts and doorbells follow what the guest programs.
fn machine_ioctls(allowed: &mut Allowed) {
    let requests = [
        to_kvm::<kvm_irqfd>(0x76),
        to_kvm::<kvm_ioeventfd>(0x79),
        to_kvm::<kvm_irq_routing>(0x6a),
    ];
    one_of(allowed, SYS_ioctl, 1, &requests);
}

fn vcpu_ioctls(allowed: &mut Allowed, host: Virtualization) {
    // KVM_RUN, and where the guest was when it cannot go on.
    let run = kvm(_IOC_NONE, 0x80, 0);
    one_of(allowed, SYS_ioctl, 1, &[run, from_kvm::<kvm_regs>(0x81)]);
    if host == Virtualization::Hardware {
        return;
    }
    // What the fallback does.
    let requests = [
        to_kvm::<kvm_regs>(0x82),
        from_kvm::<kvm_sregs>(0x83),
        to_kvm::<kvm_sregs>(0x84),
        kvm(_IOC_READ | _IOC_WRITE, 0x85, size_of::<kvm_translation>()),
        to_kvm::<kvm_msrs>(0x89),
        from_kvm::<kvm_fpu>(0x8c),
        to_kvm::<kvm_fpu>(0x8d),
        to_kvm::<kvm_guest_debug>(0x9b),
        from_kvm::<kvm_vcpu_events>(0x9f),
        to_kvm::<kvm_vcpu_events>(0xa0),
        from_kvm::<kvm_debugregs>(0xa1),
        to_kvm::<kvm_debugregs>(0xa2),
        from_kvm::<kvm_xsave>(0xa4),
        to_kvm::<kvm_xsave>(0xa5),
    ];
    one_of(allowed, SYS_ioctl, 1, &requests);
}

/// A request of `linux/kvm.h`.
fn kvm(direction: u32, number: u32, size: usize) -> u64 {
    ioctl_expr(direction, KVMIO, number, size as u32)
}

fn to_kvm<T>(number: u32) -> u64 {
    kvm(_IOC_WRITE, number, size_of::<T>())
}

fn from_kvm<T>(number: u32) -> u64 {
    kvm(_IOC_READ, number, size_of::<T>())
}

/// Allows calls, whatever their arguments.
fn all(allowed: &mut Allowed, calls: &[c_long]) {
    allowed.extend(calls.iter().map(|call| (*call, Vec::new())));
}

/// Allows a call if argument `index`, of which the kernel looks at 32 bits, has one of these values.
fn one_of(allowed: &mut Allowed, call: c_long, index: u8, values: &[u64]) {
    let rules = values.iter().filter_map(|value| rule(index, Eq, *value));
    allowed.entry(call).or_default().extend(rules);
}

/// Allows a call if the bits of `mask` in argument `index` are `bits`.
fn with_bits(allowed: &mut Allowed, call: c_long, index: u8, mask: c_int, bits: c_int) {
    let rule = rule(index, MaskedEq(mask as u64), bits as u64);
    allowed.entry(call).or_default().extend(rule);
}

/// `None` for an argument that no call has.
fn rule(index: u8, operator: SeccompCmpOp, value: u64) -> Option<SeccompRule> {
    let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value);
    SeccompRule::new(vec![condition.ok()?]).ok()
}
