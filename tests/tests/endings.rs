//! Guests that end in other ways than by their command's end.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;

use cowshed_tests::cowshed::{Cowshed, Output};
use cowshed_tests::skip::kvm_is_here;
use cowshed_tests::{base, report};
use tempfile::TempDir;

/// Boots a base of its own to the program `init` as PID 1, without a command.
fn run_init(init: &str) -> Output {
    let work = TempDir::new().expect("a temporary folder");
    let base = base::make(work.path());
    Cowshed::run()
        .option("--cmdline", format!("init=/inits/{init}"))
        .arg(base)
        .output()
}

/// Runs `script` in the default guest; gives the output and the report's reason.
fn run_script(script: &str, options: &[&str]) -> (Output, String) {
    let work = TempDir::new().expect("a temporary folder");
    let path: &Path = &work.path().join("report.json");
    let run = options.iter().fold(Cowshed::run(), Cowshed::arg);
    let output = run.option("--report", path).script(script).output();
    (
        output,
        report::read(path)["reason"]
            .as_str()
            .expect("a reason")
            .to_owned(),
    )
}

#[test]
fn a_panic_under_a_command_ends_it() {
    if !kvm_is_here() {
        return;
    }
    // The kernel panics rather than choose a process to kill when no memory is left.
    let script = "echo 2 >/proc/sys/vm/panic_on_oom; tail /dev/zero";
    let (output, reason) = run_script(script, &["--memory=128M"]);
    let output = output.expect_status(123);
    assert_eq!(reason, "panic");
    assert!(
        output.stderr().contains("ut of memory"),
        "{}",
        output.stderr()
    );
}

#[test]
fn a_panic_without_a_command_ends_at_once_and_shows_the_console() {
    if !kvm_is_here() {
        return;
    }
    // PID 1 ends: the kernel panics.
    let output = run_init("end").expect_status(123);
    assert!(
        output.stderr().contains("Attempted to kill init"),
        "{}",
        output.stderr()
    );
}

#[test]
fn a_hang_ends_by_its_timeout() {
    if !kvm_is_here() {
        return;
    }
    let (output, reason) = run_script("while :; do :; done", &["--timeout=60"]);
    let _ = output.expect_status(124);
    assert_eq!(reason, "timeout");
}

#[test]
fn a_reboot_under_a_command_is_an_end_without_a_status() {
    if !kvm_is_here() {
        return;
    }
    let (output, reason) = run_script("echo last words; reboot -f", &[]);
    let output = output.expect_status(122);
    assert_eq!(reason, "ended_without_status");
    // What the command wrote is not lost with the guest.
    assert_eq!(output.stdout(), "last words\n");
}

#[test]
fn a_power_off_under_a_command_is_an_end_without_a_status() {
    if !kvm_is_here() {
        return;
    }
    let (output, reason) = run_script("echo last words; poweroff -f", &[]);
    let output = output.expect_status(122);
    assert_eq!(reason, "ended_without_status");
    assert_eq!(output.stdout(), "last words\n");
}

#[test]
fn a_reboot_without_a_command_ends_with_0() {
    if kvm_is_here() {
        let _ = run_init("reboot").expect_status(0);
    }
}

#[test]
fn a_console_without_a_terminal_takes_piped_input_until_the_power_off() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().expect("a temporary folder");
    let base = base::make(work.path());
    let mut run = Cowshed::run()
        .option("--cmdline", "init=/inits/echo")
        .arg(base)
        .spawn();
    let mut console = BufReader::new(run.take_stdout());
    // Like any serial port, this one loses what comes before the guest has opened it.
    let mut line = String::new();
    while !line.contains("ready") {
        line.clear();
        assert!(
            console.read_line(&mut line).expect("read the console") > 0,
            "no 'ready'"
        );
    }
    run.take_stdin()
        .write_all(b"hello\n")
        .expect("write a line");
    let mut rest = String::new();
    console.read_to_string(&mut rest).expect("read the console");
    assert!(rest.contains("answer: hello"), "{rest}");
    let _ = run.wait().expect_status(0);
}
