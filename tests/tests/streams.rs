//! Standard input, output and error of the guest's command: binary-clean, apart, independent.

use std::io::{BufRead, BufReader, Read};
use std::time::Duration;

use cowshed_tests::cowshed::Cowshed;
use cowshed_tests::process;
use cowshed_tests::skip::kvm_is_here;
use rustix::process::Signal;

const TEN_MEGABYTES: usize = 10_000_000;

#[test]
fn ten_megabytes_through_each_stream() {
    if !kvm_is_here() {
        return;
    }
    // Every byte value, and no period that a lost or repeated buffer would keep.
    let input: Vec<u8> = (0..TEN_MEGABYTES)
        .map(|at| at.wrapping_mul(0x9e37_79b1).to_le_bytes()[2])
        .collect();
    // `tee` copies what comes in to both; neither can wait for the other's reader.
    let run = Cowshed::run()
        .stdin(input.clone())
        .script("tee /dev/stderr");
    let output = run.output().expect_status(0);
    assert!(
        output.stdout == input,
        "{} bytes on stdout differ",
        output.stdout.len()
    );
    assert!(
        output.stderr == input,
        "{} bytes on stderr differ",
        output.stderr.len()
    );
}

#[test]
fn a_blocked_reader_of_stdout_stalls_stdout_only() {
    if !kvm_is_here() {
        return;
    }
    let script = format!(
        "head -c {TEN_MEGABYTES} /dev/zero & \
         read -r line; echo \"stderr: $line\" >&2; wait; echo done >&2"
    );
    let mut run = Cowshed::run().script(&script).spawn();
    let mut stdin = run.take_stdin();
    let mut stdout = run.take_stdout();
    let mut stderr = BufReader::new(run.take_stderr());

    // Ten megabytes fit in no pipe and no queue: that writer is stuck until we read.
    std::io::Write::write_all(&mut stdin, b"hello\n").unwrap();
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    assert_eq!(line, "stderr: hello\n");

    let mut bytes = Vec::new();
    stdout.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), TEN_MEGABYTES);
    line.clear();
    stderr.read_line(&mut line).unwrap();
    assert_eq!(line, "done\n");
    let _ = run.wait().expect_status(0);
}

#[test]
fn sigterm_reaches_the_command() {
    if !kvm_is_here() {
        return;
    }
    let script = "trap 'echo caught; exit 7' TERM; echo ready; while :; do sleep 1; done";
    let mut run = Cowshed::run().script(script).spawn();
    let mut stdout = BufReader::new(run.take_stdout());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    run.signal(Signal::TERM);
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "caught\n");
    let _ = run.wait().expect_status(7);
}

#[test]
fn signals_in_quick_succession_end_a_run_whose_command_does_not_mind_them() {
    if !kvm_is_here() {
        return;
    }
    let script = "trap '' INT TERM; echo ready; while :; do sleep 1; done";
    let mut run = Cowshed::run().script(script).spawn();
    let mut line = String::new();
    let mut stdout = BufReader::new(run.take_stdout());
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    let rest = process::drain(stdout);
    // Of equal signals that wait for one process the kernel keeps one: so more than three.
    process::until("the run ends", Duration::from_secs(120), || {
        run.signal(Signal::TERM);
        rest.is_finished().then_some(())
    });
    let _ = run.wait().expect_status(128 + 15);
}

#[test]
fn a_reader_that_goes_away_ends_the_writer_by_sigpipe() {
    if !kvm_is_here() {
        return;
    }
    let mut run = Cowshed::run().command(["yes"]).spawn();
    let mut stdout = run.take_stdout();
    let mut first = [0; 2];
    stdout.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"y\n");
    drop(stdout);
    let _ = run.wait().expect_status(128 + 13);
}
