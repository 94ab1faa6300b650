//! Locks, against QEMU's tools themselves.

use std::path::Path;
use std::process::Output;

use super::{Fixture, has_tools, run_tool, text, tool};
use crate::config::{Disk, Overlay};

/// `qemu-nbd` with an image, ended when dropped.
struct Nbd {
    pid: rustix::process::Pid,
}

impl Nbd {
    fn serve(fixture: &Fixture, image: &Path, more: &[&str]) -> Output {
        let (socket, pid) = (fixture.path("socket"), fixture.path("pid"));
        let fixed = [
            "--fork",
            "-t",
            "-f",
            "qcow2",
            "-k",
            text(&socket),
            "--pid-file",
            text(&pid),
        ];
        tool("qemu-nbd", &[&fixed, more, &[text(image)]].concat())
    }

    fn start(fixture: &Fixture, image: &Path, more: &[&str]) -> Self {
        let output = Self::serve(fixture, image, more);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let pid = std::fs::read_to_string(fixture.path("pid"))
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        Self {
            pid: rustix::process::Pid::from_raw(pid).unwrap(),
        }
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(self.pid, rustix::process::Signal::KILL);
    }
}

fn qemu_error(output: &Output) -> String {
    assert!(!output.status.success(), "QEMU was not refused");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn qemu_write(image: &Path) -> Output {
    tool(
        "qemu-io",
        &["-f", "qcow2", "-c", "write 0 512", text(image)],
    )
}

#[test]
fn readers_share_a_base_and_keep_writers_out() {
    if !has_tools() {
        return;
    }
    let fixture = Fixture::new();
    let path = fixture.path("base.qcow2");
    let ours = [
        fixture.open(fixture.base()).unwrap(),
        fixture.open(fixture.base()).unwrap(),
    ];
    run_tool(
        "qemu-io",
        &["-r", "-f", "qcow2", "-c", "read -P 0x5a 0 1M", text(&path)],
    );
    let theirs = Nbd::start(&fixture, &path, &["-r"]);

    let direct = Disk {
        overlay: Overlay::Direct,
        ..fixture.base()
    };
    let message = fixture.refusal(direct.clone());
    assert!(message.contains("another process (qemu-nbd "), "{message}");
    assert!(message.contains(") uses it"), "{message}");
    let error = qemu_error(&qemu_write(&path));
    assert!(error.contains("Failed to get \"write\" lock"), "{error}");
    let error = qemu_error(&tool(
        "qemu-img",
        &["resize", "-f", "qcow2", text(&path), "9M"],
    ));
    assert!(error.contains("lock"), "{error}");

    drop(ours);
    assert!(fixture.open(direct.clone()).is_err(), "QEMU still reads it");
    drop(theirs);
    eventually(|| fixture.open(direct.clone()).is_ok());
}

#[test]
fn a_writer_keeps_everyone_out() {
    if !has_tools() {
        return;
    }
    let fixture = Fixture::new();
    let path = fixture.path("base.qcow2");
    let direct = Disk {
        overlay: Overlay::Direct,
        ..fixture.base()
    };
    let ours = fixture.open(direct.clone()).unwrap();
    assert!(fixture.open(fixture.base()).is_err());
    assert!(fixture.open(direct.clone()).is_err());
    let error = qemu_error(&tool("qemu-img", &["info", text(&path)]));
    assert!(
        error.contains("Failed to get shared \"write\" lock"),
        "{error}"
    );
    qemu_error(&qemu_write(&path));
    qemu_error(&Nbd::serve(&fixture, &path, &["-r"]));
    drop(ours);

    let theirs = Nbd::start(&fixture, &path, &[]);
    let message = fixture.refusal(fixture.base());
    assert!(
        message.contains("another process (qemu-nbd ") && message.contains(") writes to it"),
        "{message}"
    );
    assert!(fixture.open(direct).is_err());
    drop(theirs);
    eventually(|| fixture.open(fixture.base()).is_ok());
}

#[test]
fn an_overlay_in_use_is_locked_as_its_base_is() {
    if !has_tools() {
        return;
    }
    let fixture = Fixture::new();
    let overlay = fixture.path("o.qcow2");
    let disk = Disk {
        overlay: Overlay::At(overlay.clone()),
        ..fixture.base()
    };
    for _ in ["made", "reused"] {
        let ours = fixture.open(disk.clone()).unwrap();
        qemu_error(&tool("qemu-img", &["check", text(&overlay)]));
        qemu_error(&qemu_write(&fixture.path("base.qcow2")));
        assert!(fixture.open(disk.clone()).is_err());
        drop(ours);
        // Programs that other tests start have our files until they run.
        eventually(|| fixture.open(disk.clone()).is_ok());
    }
    // Below an overlay that QEMU writes, the base can be shared and the overlay cannot.
    let _theirs = Nbd::start(&fixture, &overlay, &[]);
    fixture.open(fixture.base()).unwrap();
    assert!(fixture.open(disk).is_err());
    assert!(fixture.open(Disk::new(&overlay)).is_err());
}

/// Waits for what a killed process's end brings about.
fn eventually(condition: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !condition() {
        assert!(
            std::time::Instant::now() < deadline,
            "it did not come about"
        );
        std::thread::yield_now();
    }
}
