use super::*;

fn every_outcome() -> Vec<(Outcome, u8, &'static str)> {
    let text = || "why".to_owned();
    vec![
        (Outcome::Exited(0), 0, "exited"),
        (Outcome::Exited(121), 121, "exited"),
        (Outcome::Signaled(15), 143, "signaled"),
        (Outcome::Signaled(255), 255, "signaled"),
        (Outcome::PoweredOff, 0, "powered_off"),
        (Outcome::Reset, 0, "reset"),
        (Outcome::Escaped, 0, "escaped"),
        (Outcome::Usage(text()), 120, "usage"),
        (Outcome::BootFailed(text()), 121, "boot_failed"),
        (
            Outcome::EndedWithoutStatus(text()),
            122,
            "ended_without_status",
        ),
        (Outcome::Panic(text()), 123, "panic"),
        (Outcome::Timeout(Duration::from_secs(2)), 124, "timeout"),
        (Outcome::VmmError(text()), 125, "vmm_error"),
    ]
}

#[test]
fn outcomes_have_statuses_and_reasons() {
    for (outcome, status, reason) in every_outcome() {
        assert_eq!(
            (outcome.status(), outcome.reason()),
            (status, reason),
            "{outcome:?}"
        );
        assert_eq!(outcome.failed(), status != 0, "{outcome:?}");
    }
}

#[test]
fn failures_of_its_own_have_a_message() {
    for (outcome, status, _) in every_outcome() {
        let own = !matches!(outcome, Outcome::Exited(_)) && status != 0;
        assert_eq!(outcome.message().is_some(), own, "{outcome:?}");
    }
    assert_eq!(
        Outcome::Panic(String::new()).message().unwrap(),
        "the guest panicked"
    );
    let timeout = Outcome::Timeout(Duration::from_millis(1500));
    assert_eq!(
        timeout.message().unwrap(),
        "the run took longer than --timeout 1.5s"
    );
}

fn report() -> Report {
    Report {
        outcome: Outcome::Exited(3),
        measures: Measures {
            first_instruction: Some(Duration::from_micros(4321)),
            pid1: None,
            end: Some(Duration::from_secs(2)),
            bytes_read: 5,
            bytes_written: 6,
            overlay_size: Some(7),
        },
    }
}

#[test]
fn the_report_is_json() {
    let json: serde_json::Value = serde_json::from_str(&report().to_json()).unwrap();
    assert_eq!(
        json,
        serde_json::json!({
            "reason": "exited",
            "status": 3,
            "message": null,
            "first_instruction_ms": 4.321,
            "pid1_ms": null,
            "end_ms": 2000.0,
            "bytes_read": 5,
            "bytes_written": 6,
            "overlay_size": 7,
            "version": env!("CARGO_PKG_VERSION"),
        })
    );
}

#[test]
fn the_report_replaces_the_last_one_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("report.json");
    std::fs::write(&path, "x".repeat(100_000)).unwrap();
    report().write(&path).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), report().to_json());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);

    let error = report()
        .write(&folder.path().join("absent/report.json"))
        .unwrap_err();
    assert!(chain(&error).ends_with("report.json: No such file or directory (os error 2)"));
    assert!(report().write(folder.path()).is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_report_may_go_to_a_device() {
    report().write(Path::new("/dev/null")).unwrap();
    assert!(!Path::new("/dev/null").metadata().unwrap().is_file());
}

#[test]
fn nothing_commands_the_terminal() {
    assert_eq!(printable("a\u{1b}[2J\tb\nc\r\u{9b}"), "a[2J\tb\nc");
}
