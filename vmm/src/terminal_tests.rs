use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::LocalModes;

use super::*;

fn feed(inputs: &[&[u8]]) -> (Vec<u8>, bool) {
    let mut filter = EscapeFilter::default();
    let mut output = Vec::new();
    let ended = inputs.iter().any(|input| filter.feed(input, &mut output));
    (output, ended)
}

#[test]
fn escapes() {
    type Case<'a> = (&'a [&'a [u8]], &'a [u8], bool);
    let cases: [Case; 9] = [
        (&[b"plain\x03\xff"], b"plain\x03\xff", false),
        (&[b"ab\x01x"], b"ab", true),
        (&[b"ab\x01", b"xcd"], b"ab", true),
        (&[b"\x01a"], b"\x01", false),
        (&[b"\x01\x01"], b"\x01", false),
        (&[b"\x01\x01x"], b"\x01x", false),
        (&[b"\x01", b"\x01", b"\x01", b"x"], b"\x01", true),
        (&[b"\x01k"], b"\x01k", false),
        (&[b"\x01"], b"", false),
    ];
    for (input, output, ended) in cases {
        assert_eq!(feed(input), (output.to_vec(), ended), "{input:?}");
    }
}

/// Both ends of a new terminal.
fn pty() -> (OwnedFd, File) {
    let main = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&main).unwrap();
    unlockpt(&main).unwrap();
    let name = ptsname(&main, Vec::new()).unwrap();
    let user = File::options()
        .read(true)
        .write(true)
        .open(name.to_str().unwrap())
        .unwrap();
    (main, user)
}

fn is_raw(terminal: &File) -> bool {
    !tcgetattr(terminal)
        .unwrap()
        .local_modes
        .contains(LocalModes::ICANON)
}

const WAY_OUT: &str = "COWSHED_TEST_WAY_OUT";

/// Not a test of its own: what [`leave`] runs in a process of its own.
#[test]
fn child() {
    let Ok(way) = std::env::var(WAY_OUT) else {
        return;
    };
    let raw = RawMode::enter(io::stdin()).unwrap();
    assert_eq!(
        RawMode::enter(io::stdin()).unwrap_err().kind(),
        io::ErrorKind::ResourceBusy
    );
    eprintln!("raw");
    match way.as_str() {
        "drop" => drop(raw),
        "again" => {
            drop(raw);
            drop(RawMode::enter(io::stdin()).unwrap());
        }
        "exit" => std::process::exit(7),
        "panic" => panic!("on purpose"),
        "abort" => std::process::abort(),
        // SAFETY: none is claimed: the fault is what is wanted.
        "fault" => drop(unsafe { std::ptr::without_provenance::<u8>(64).read_volatile() }),
        _ => loop {
            std::thread::park();
        },
    }
}

/// Leaves a process whose terminal is raw in some way.
fn leave(way: &str, signal: Option<Signal>) -> ExitStatus {
    let (_main, user) = pty();
    let before = format!("{:?}", tcgetattr(&user).unwrap());
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "terminal::tests::child", "--nocapture"])
        .env(WAY_OUT, way)
        .stdin(user.try_clone().unwrap())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    errors.read_line(&mut line).unwrap();
    assert_eq!(line, "raw\n");
    if let Some(signal) = signal {
        assert!(is_raw(&user), "{way}");
        kill_process(Pid::from_child(&child), signal).unwrap();
    }
    let status = child.wait().unwrap();
    assert_eq!(before, format!("{:?}", tcgetattr(&user).unwrap()), "{way}");
    status
}

/// Whether this process was started with a signal ignored.
fn is_ignored(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = u64::from_str_radix(mask.unwrap().trim(), 16).unwrap();
    mask & 1 << (signal.as_raw() - 1) != 0
}

#[test]
fn the_terminal_is_restored_on_every_way_out() {
    assert_eq!(leave("drop", None).code(), Some(0));
    assert_eq!(leave("again", None).code(), Some(0));
    assert_eq!(leave("exit", None).code(), Some(7));
    assert_eq!(leave("panic", None).code(), Some(101));
    assert_eq!(leave("abort", None).signal(), Some(libc::SIGABRT));
    assert_eq!(leave("fault", None).signal(), Some(libc::SIGSEGV));
    for signal in [
        Signal::TERM,
        Signal::HUP,
        Signal::INT,
        Signal::QUIT,
        Signal::USR1,
        Signal::SEGV,
    ] {
        if is_ignored(signal) {
            // It is by a child, too, and ends nothing: in the background of a script, for one.
            eprintln!("skipped: {signal:?} is ignored here");
            continue;
        }
        assert_eq!(
            leave("signal", Some(signal)).signal(),
            Some(signal.as_raw()),
            "{signal:?}"
        );
    }
}
