//! The nested host itself: it has a working `/dev/kvm` and reports each step's streams and status.

use std::process::Command;
use std::time::Duration;

use cowshed_tests::nested::{Host, Step, StepResult, is_available};
use tempfile::TempDir;

/// Makes a VM, runs real-mode instructions in it that write "ok" to a port, then halt.
const TINY_VMM: &str = include_str!("nested_host/tiny_vmm.c");

#[test]
fn runs_steps_and_a_virtual_machine() {
    if !is_available() {
        return;
    }
    let work = TempDir::new().unwrap();
    let source = work.path().join("tiny_vmm.c");
    let program = work.path().join("tiny_vmm");
    std::fs::write(&source, TINY_VMM).unwrap();
    // Dynamic, so that the host's closing over libraries is tested too.
    let built = Command::new("cc")
        .arg("-o")
        .arg(&program)
        .arg(&source)
        .status()
        .unwrap();
    assert!(built.success());

    let results = Host::new().program(&program, "/bin/tiny-vmm").run(&[
        Step::new("streams", "echo out; echo err >&2; exit 3"),
        Step::new("hang", "sleep 1000").limit(Duration::from_secs(1)),
        Step::new("vm", "tiny-vmm"),
    ]);

    assert_eq!(results[0].name, "streams");
    assert_eq!(results[0].status, 3);
    assert_eq!(results[0].stdout, "out\n");
    assert_eq!(results[0].stderr, "err\n");
    assert_eq!(results[1].status, StepResult::KILLED);
    assert_eq!(results[2].status, 0, "{}", results[2].stderr);
    assert_eq!(results[2].stdout, "ok\n");
}
