//! The default guest runs a command, and its status is `cowshed`'s.

use cowshed_tests::cowshed::Cowshed;
use cowshed_tests::report;
use cowshed_tests::skip::kvm_is_here;
use tempfile::TempDir;

#[test]
fn status_0_with_the_streams_apart_and_no_terminal() {
    if !kvm_is_here() {
        return;
    }
    // Not one of the three streams is a terminal here, nor is one in the guest.
    let script = "tty -s && exit 9; cat; echo to stderr >&2; uname -s";
    let output = Cowshed::run()
        .stdin("to stdin\n")
        .script(script)
        .output()
        .expect_status(0);
    assert_eq!(output.stdout(), "to stdin\nLinux\n");
    assert_eq!(output.stderr(), "to stderr\n");
}

#[test]
fn status_1_is_the_commands_own_and_the_report_says_so() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().unwrap();
    let path = work.path().join("report.json");
    let _ = Cowshed::run()
        .option("--report", &path)
        .command(["false"])
        .output()
        .expect_status(1);
    let report = report::read(&path);
    assert_eq!(report["reason"], "exited", "{report}");
    assert_eq!(report["status"], 1, "{report}");
    let times = ["first_instruction_ms", "pid1_ms", "end_ms"].map(|key| report[key].as_f64());
    assert!(times.is_sorted() && times[0] > Some(0.0), "{report}");
}

#[test]
fn status_127_for_a_command_that_is_not_there() {
    if !kvm_is_here() {
        return;
    }
    let output = Cowshed::run()
        .command(["/no/such/command"])
        .output()
        .expect_status(127);
    assert!(
        output.stderr().contains("/no/such/command"),
        "{}",
        output.stderr()
    );
}

#[test]
fn a_signal_is_128_and_its_number() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().unwrap();
    let path = work.path().join("report.json");
    let run = Cowshed::run()
        .option("--report", &path)
        .script("kill -KILL $$");
    let _ = run.output().expect_status(128 + 9);
    assert_eq!(report::read(&path)["reason"], "signaled");
}
