//! The sandbox of a real run, from outside: what its process may still do, and what becomes of a run
//! whose process is killed.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cowshed_tests::cowshed::{Cowshed, Running};
use cowshed_tests::skip::{self, kvm_is_here};
use cowshed_tests::{image, process, report};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A run of a guest that says hello and halts, with a base under a throwaway overlay as its disk.
struct Idle {
    work: TempDir,
    run: Running,
    /// The machine's process.
    monitor: i32,
}

impl Idle {
    fn start(options: &[&str]) -> Self {
        let work = TempDir::new().expect("a temporary folder");
        let guest = work.path().join("guest");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/bench/guest.S");
        let built = Command::new("cc")
            .args([
                "-DIDLE",
                "-nostdlib",
                "-static",
                "-no-pie",
                "-Wl,--build-id=none",
            ])
            .arg("-o")
            .args([guest.as_path(), Path::new(source)])
            .status();
        assert!(built.expect("start cc").success());
        let base = work.path().join("base.qcow2");
        image::create(&base, "16M");
        let run = options.iter().fold(Cowshed::run(), Cowshed::arg);
        let mut run = run
            .option("--kernel", guest)
            .option("--disk", base)
            .option("--report", work.path().join("report.json"))
            .option("--keep-overlay", work.path().join("kept.qcow2"))
            .spawn();
        let mut hello = String::new();
        let mut console = BufReader::new(run.take_stdout());
        console.read_line(&mut hello).expect("read the console");
        assert_eq!(hello, "hello\n");
        let pid = run.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let monitor = children.expect("its children").trim().parse();
        Self {
            work,
            run,
            monitor: monitor.expect("one child"),
        }
    }

    fn proc(&self, file: &str) -> PathBuf {
        Path::new("/proc").join(self.monitor.to_string()).join(file)
    }

    /// The value of `field` in the status of each thread, by the thread's name. A kernel's thread, which
    /// KVM has among them, has its own.
    fn threads(&self, field: &str) -> Vec<(String, String)> {
        let tasks = fs::read_dir(self.proc("task")).expect("its threads");
        let mut threads: Vec<(String, String)> = tasks
            .map(|task| fs::read_to_string(task.expect("a thread").path().join("status")))
            .map(|status| {
                let status = status.expect("its status");
                let value = |field: &str| {
                    let line = status.lines().find_map(|line| line.strip_prefix(field));
                    line.expect(field).trim_start_matches(':').trim().to_owned()
                };
                (value("Name"), value(field))
            })
            .filter(|(name, _)| !name.starts_with("kvm-"))
            .collect();
        threads.sort();
        threads
    }

    fn kill(&self, signal: Signal) {
        let pid = Pid::from_raw(self.monitor).expect("a process");
        kill_process(pid, signal).expect("send a signal");
    }
}

#[test]
fn every_thread_is_confined_and_the_base_is_open_for_reading_only() {
    if !kvm_is_here() {
        return;
    }
    // As a shell leaves files open for what it starts.
    let left_open = tempfile::tempfile().expect("a file");
    fcntl_setfd(&left_open, FdFlags::empty()).expect("leave it open");
    let left_open = fs::read_link(format!("/proc/self/fd/{}", left_open.as_raw_fd()));
    let left_open = left_open.expect("a link");
    let idle = Idle::start(&["--sandbox=require"]);
    let names: Vec<String> = idle
        .threads("Pid")
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert!(names.contains(&"vcpu0".to_owned()), "{names:?}");
    let none = "0000000000000000";
    let expected = [
        ("Seccomp", "2"),
        ("NoNewPrivs", "1"),
        ("CapEff", none),
        ("CapPrm", none),
        ("CapInh", none),
        ("CapAmb", none),
    ];
    for (field, value) in expected {
        for (name, found) in idle.threads(field) {
            assert_eq!(found, value, "{field} of {name}");
        }
    }
    if rustix::process::geteuid().is_root() {
        for (name, found) in idle.threads("CapBnd") {
            assert_eq!(found, none, "CapBnd of {name}");
        }
    }
    let limits = fs::read_to_string(idle.proc("limits")).expect("its limits");
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"));
    let core: Vec<&str> = core.expect("a limit").split_whitespace().collect();
    assert_eq!(core[4..6], ["0", "0"]);

    let mut seen = 0;
    for fd in fs::read_dir(idle.proc("fd")).expect("its files") {
        let fd = fd.expect("a file").path();
        let target = fs::read_link(&fd).expect("a link");
        assert!(
            !target.starts_with("/dev/kvm"),
            "it could make another machine"
        );
        assert_ne!(target, left_open);
        assert!(
            !target.ends_with("anon_inode:[signalfd]"),
            "signals are the session's"
        );
        if target.ends_with("base.qcow2") {
            seen += 1;
            let info = idle.proc("fdinfo").join(fd.file_name().expect("a number"));
            let info = fs::read_to_string(info).expect("its flags");
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
            let flags = u32::from_str_radix(flags.expect("flags").trim(), 8).expect("octal");
            assert_eq!(flags & 3, 0, "the base is open for writing: {info}");
        }
    }
    assert!(seen > 0, "the base is not open");
}

#[test]
fn without_a_sandbox_there_is_none() {
    if !kvm_is_here() {
        return;
    }
    let idle = Idle::start(&["--sandbox=off"]);
    for (name, found) in idle.threads("Seccomp") {
        assert_eq!(found, "0", "{name}");
    }
}

#[test]
fn root_can_give_it_another_user_and_root_folder() {
    if !kvm_is_here() {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return skip::say("only root can become another user");
    }
    let empty = TempDir::new().expect("a temporary folder");
    let chroot = format!("--chroot={}", empty.path().display());
    let idle = Idle::start(&["--user=12345:54321", &chroot]);
    for (field, id) in [("Uid", "12345"), ("Gid", "54321")] {
        for (name, found) in idle.threads(field) {
            assert_eq!(found, [id; 4].join("\t"), "{field} of {name}");
        }
    }
    assert_eq!(
        fs::read_link(idle.proc("root")).expect("a link"),
        empty.path()
    );
    assert!(
        idle.threads("Groups")
            .iter()
            .all(|(_, groups)| groups.is_empty())
    );
}

#[test]
fn a_process_that_its_sandbox_ends_is_reported_and_its_overlay_kept() {
    if !kvm_is_here() {
        return;
    }
    let idle = Idle::start(&[]);
    // What seccomp does to it.
    idle.kill(Signal::SYS);
    let output = idle.run.wait().expect_status(125);
    assert!(
        output.stderr().contains("ended by its sandbox"),
        "{}",
        output.stderr()
    );
    let report = report::read(&idle.work.path().join("report.json"));
    assert_eq!(report["reason"], "vmm_error");
    image::qemu_img_ok([
        "check".as_ref(),
        "-q".as_ref(),
        idle.work.path().join("kept.qcow2").as_os_str(),
    ]);
}

#[test]
fn it_does_not_outlive_the_session() {
    if !kvm_is_here() {
        return;
    }
    let idle = Idle::start(&[]);
    let monitor = idle.proc("");
    drop(idle.run);
    process::until(
        "the machine's process ends",
        Duration::from_secs(60),
        || {
            // A process that has ended may wait for a while to be reaped by whoever inherited it.
            let stat = fs::read_to_string(monitor.join("stat")).unwrap_or_default();
            (stat.is_empty() || stat.contains(") Z ")).then_some(())
        },
    );
}

#[test]
fn nobody_else_is_named() {
    if !kvm_is_here() {
        return;
    }
    let output = Cowshed::run()
        .arg("--user=no-such-user")
        .output()
        .expect_status(125);
    assert!(
        output.stderr().contains("no-such-user"),
        "{}",
        output.stderr()
    );
}
