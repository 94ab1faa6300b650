//! The statuses that need no guest.

use std::io::Write;
use std::process::{Command, Output};

fn cowshed(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cowshed"))
        .args(args)
        .output()
        .expect("cowshed starts")
}

#[test]
fn wrong_usage_is_status_120_and_reported() {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report.json");
    let option = format!("--report={}", report.display());
    for args in [
        &["run", "--bad"] as &[&str],
        &["run", "--cpus", "0"],
        &["run", "--"],
    ] {
        let mut args = args.to_vec();
        args.insert(1, &option);
        let output = cowshed(&args);
        assert_eq!(output.status.code(), Some(120), "{args:?}");
        assert!(!output.stderr.is_empty(), "{args:?}");
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
        assert_eq!(
            (&json["reason"], &json["status"]),
            (&"usage".into(), &120.into())
        );
        std::fs::remove_file(&report).unwrap();
    }
    assert_eq!(cowshed(&["fly"]).status.code(), Some(120));
    assert_eq!(cowshed(&[]).status.code(), Some(120));
}

#[test]
fn help_and_version_are_no_errors() {
    for args in [
        &["--help"] as &[&str],
        &["run", "--help"],
        &["doctor", "-h"],
        &["--version"],
    ] {
        let output = cowshed(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(
            !output.stdout.is_empty() && output.stderr.is_empty(),
            "{args:?}"
        );
    }
}

#[test]
fn doctor_speaks_json() {
    let output = cowshed(&["doctor", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let ok = json["ok"].as_bool().unwrap();
    assert_eq!(output.status.code(), Some(if ok { 0 } else { 1 }));
    assert!(json["checks"].as_array().unwrap().len() >= 5);
}

#[test]
fn an_error_that_nobody_reads_ends_the_run_all_the_same() {
    let (_unread, mut full) = std::io::pipe().unwrap();
    let size = rustix::pipe::fcntl_getpipe_size(&full).unwrap();
    full.write_all(&vec![b'.'; size]).unwrap();
    // With 124 if it does not end.
    let mut run = Command::new("timeout");
    run.args(["60", env!("CARGO_BIN_EXE_cowshed"), "run", "absent.qcow2"]);
    let status = run.stderr(full).status().unwrap();
    assert_eq!(status.code(), Some(125));
}
