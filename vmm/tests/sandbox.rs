//! The sandbox from inside: each attempt runs in a process of its own, which enters the sandbox as the
//! machine's process does and then tries what only an intruder would.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use cowshed::config;
use cowshed::host::Virtualization;
use cowshed::sandbox::{Sandbox, Thread};
use cowshed_devices::threads::Kind;

/// Names the attempt and the kind of thread, for the process that makes it.
const PROBE: &str = "COWSHED_PROBE";
/// Landlock and the privileges alone, without the thread's list of calls.
const UNCONFINED: &str = "unconfined";
const THREADS: [(&str, Thread); 5] = [
    ("main", Thread::Main),
    ("vcpu", Thread::Vcpu),
    ("disk", Thread::Device(Kind::Disk)),
    ("console", Thread::Device(Kind::Console)),
    ("entropy", Thread::Device(Kind::Entropy)),
];

type Attempt = (&'static str, fn() -> io::Result<()>);

/// What an intruder tries, by name.
const ATTEMPTS: [Attempt; 21] = [
    ("open", || File::open("/etc/passwd").map(drop)),
    ("create", || File::create("/tmp/cowshed-intruder").map(drop)),
    ("remove", || std::fs::remove_file("/tmp/cowshed-intruder")),
    ("list", || std::fs::read_dir("/").map(drop)),
    ("exec", || {
        call(libc::SYS_execve, [c"/bin/true".as_ptr() as i64, 0, 0])
    }),
    ("fork", || call(libc::SYS_fork, [0; 3])),
    ("clone", || {
        call(libc::SYS_clone, [i64::from(libc::SIGCHLD), 0, 0])
    }),
    ("connect", || TcpStream::connect("127.0.0.1:9").map(drop)),
    ("socket", || {
        call(libc::SYS_socket, [i64::from(libc::AF_UNIX), 1, 0])
    }),
    ("kill", || call(libc::SYS_kill, [parent(), 0, 0])),
    ("tgkill", || call(libc::SYS_tgkill, [parent(), parent(), 0])),
    ("ptrace", || {
        call(
            libc::SYS_ptrace,
            [i64::from(libc::PTRACE_ATTACH), parent(), 0],
        )
    }),
    ("peek", || {
        call(libc::SYS_process_vm_readv, [parent(), 0, 0])
    }),
    ("code", || {
        call(
            libc::SYS_mprotect,
            [page(), 4096, i64::from(libc::PROT_EXEC)],
        )
    }),
    ("map-code", || {
        call(
            libc::SYS_mmap,
            [0, 4096, i64::from(libc::PROT_READ | libc::PROT_EXEC)],
        )
    }),
    ("mount", || call(libc::SYS_mount, [0; 3])),
    ("setuid", || call(libc::SYS_setresuid, [1; 3])),
    ("keys", || call(libc::SYS_keyctl, [0; 3])),
    ("kvm", || call(libc::SYS_ioctl, [0, 0xae01, 0])),
    ("ring", || call(libc::SYS_io_uring_setup, [1, 0, 0])),
    // IORING_REGISTER_BUFFERS: disks have rings, but can do no more with them than they need.
    ("ring-register", || {
        call(libc::SYS_io_uring_register, [0, 0, 0])
    }),
];

fn call(number: libc::c_long, [a, b, c]: [i64; 3]) -> io::Result<()> {
    // SAFETY: the arguments are null, numbers, or point to what outlives the process.
    match unsafe {
        libc::syscall(
            number,
            a,
            b,
            c,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn parent() -> i64 {
    std::os::unix::process::parent_id().into()
}

/// A page of memory of its own.
fn page() -> i64 {
    let pages = Box::leak(vec![0_u8; 3 * 4096].into_boxed_slice());
    (pages.as_ptr() as i64 + 4095) & !4095
}

/// Not a test: the process that makes one attempt.
#[test]
#[ignore = "run by the tests below"]
fn probe() {
    let Ok(what) = std::env::var(PROBE) else {
        return;
    };
    let (attempt, thread) = what.split_once(' ').unwrap();
    let found = ATTEMPTS.iter().find(|(name, _)| *name == attempt);
    let thread = THREADS.iter().find(|(name, _)| *name == thread);
    let config = config::Sandbox {
        mode: config::SandboxMode::Require,
        ..config::Sandbox::default()
    };
    let sandbox = Sandbox::enter(&config, None, Virtualization::Emulated).unwrap();
    if let Some((_, thread)) = thread {
        sandbox.confine(*thread);
    }
    let result = match found {
        Some((_, attempt)) => attempt(),
        None => harmless().and_then(|()| match thread {
            Some((_, Thread::Main | Thread::Device(Kind::Console))) => end_of_a_port(),
            _ => Ok(()),
        }),
    };
    // SAFETY: ends the process, without what the test harness would do in this cage.
    unsafe { libc::_exit(result.map_or(REFUSED, |()| 0)) };
}

/// The status of an attempt that the kernel refused with an error.
const REFUSED: i32 = 3;

/// What every thread does.
fn harmless() -> io::Result<()> {
    let (mut reader, mut writer) = (io::stdin(), io::stdout());
    writer.write_all(b"")?;
    reader.read_exact(&mut [])?;
    let kept: Vec<Vec<u8>> = (0..64).map(|size| vec![1; size << 12]).collect();
    drop(kept);
    std::thread::sleep(std::time::Duration::from_nanos(1));
    let random = std::collections::HashMap::from([(1, 2)]);
    match random.get(&1) {
        Some(2) => Ok(()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// What a port of the console does at the end of its output: on a thread of its own it closes a socket for
/// writing.
fn end_of_a_port() -> io::Result<()> {
    // SAFETY: no socket has this number, which is all that is to be learnt.
    let shut = || unsafe { libc::shutdown(-1, libc::SHUT_WR) };
    match std::thread::spawn(shut).join() {
        Ok(-1) => Ok(()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn attempt(what: &str, thread: &str) -> ExitStatus {
    let output = Command::new(std::env::current_exe().expect("this test's program"))
        .args(["--exact", "probe", "--ignored", "--nocapture"])
        .env(PROBE, format!("{what} {thread}"))
        // One heap, as `cowshed` has.
        .env("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
        .output();
    output.expect("start it").status
}

fn host_has_it_all() -> bool {
    // SAFETY: asks for a version number.
    let has = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) > 0 };
    if !has {
        // Past the harness, which captures what passes.
        let _ = writeln!(io::stderr().lock(), "skipped: this kernel has no Landlock");
    }
    has
}

#[test]
fn every_thread_still_does_its_work() {
    if !host_has_it_all() {
        return;
    }
    for (thread, _) in THREADS {
        let status = attempt("nothing", thread);
        assert!(status.success(), "{thread}: {status}");
    }
}

#[test]
fn a_call_that_is_on_no_list_ends_the_process() {
    if !host_has_it_all() {
        return;
    }
    for (thread, _) in THREADS {
        for (what, _) in ATTEMPTS {
            let status = attempt(what, thread);
            assert_eq!(
                status.signal(),
                Some(libc::SIGSYS),
                "{what} on {thread}: {status}"
            );
        }
    }
}

#[test]
fn without_the_lists_files_and_other_processes_are_out_of_reach_all_the_same() {
    if !host_has_it_all() {
        return;
    }
    assert!(attempt("nothing", UNCONFINED).success());
    let attempts = [
        "open", "create", "list", "exec", "connect", "kill", "ptrace", "mount", "setuid",
    ];
    for what in attempts {
        let status = attempt(what, UNCONFINED);
        assert_eq!(status.code(), Some(REFUSED), "{what}: {status}");
    }
}
