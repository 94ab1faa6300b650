//! Guests without an operating system drive the devices: what they find is in their output, and
//! the way they end is their verdict.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use cowshed_tests::cowshed::{Cowshed, Output};
use cowshed_tests::skip::kvm_is_here;
use cowshed_tests::{guest, image, report};
use rustix::fs::{CWD, Mode, mkfifoat};
use rustix::pipe::fcntl_setpipe_size;
use tempfile::TempDir;

/// Runs the guest that `arguments` begin with, on two disks.
fn run(work: &Path, arguments: &str, disk_keys: &str) -> Output {
    let name = arguments.split(' ').next().expect("a name");
    let kernel = guest::builder().metal(name).expect("build the guest");
    let disks = ["first", "second"].map(|name| {
        let path = work.join(format!("{name}.qcow2"));
        if !path.exists() {
            image::create(&path, "16M");
        }
        path.into_os_string()
            .into_string()
            .expect("a path in UTF-8")
    });
    let run = Cowshed::run()
        .option("--kernel", kernel)
        .option("--cmdline", arguments)
        .option("--report", work.join("report.json"));
    run.option("--disk", format!("{}{disk_keys}", disks[0]))
        .option("--disk", &disks[1])
        .output()
}

/// The guest must say that all is well and power off.
fn passes(arguments: &str, disk_keys: &str) -> TempDir {
    let work = TempDir::new().expect("a temporary folder");
    let output = run(work.path(), arguments, disk_keys).expect_status(0);
    let last = output.stdout().trim_end().to_owned();
    assert!(last.ends_with("PASS"), "{last}\n{}", output.stderr());
    assert_eq!(reason(work.path()), "powered_off");
    work
}

fn reason(work: &Path) -> String {
    report::read(&work.join("report.json"))["reason"]
        .as_str()
        .expect("a reason")
        .to_owned()
}

#[test]
fn a_guest_that_prints_and_resets_ends_the_run_with_0() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().unwrap();
    let output = run(work.path(), "hello", "").expect_status(0);
    assert_eq!(output.stdout(), "hello from ring 3\n");
    assert_eq!(reason(work.path()), "reset");
}

#[test]
fn what_is_typed_reaches_the_serial_port_whenever_it_comes() {
    if !kvm_is_here() {
        return;
    }
    let kernel = guest::builder().metal("echo").expect("build the guest");
    // A byte that is lost ends the run, and with it this test, instead of both waiting for it.
    let mut run = Cowshed::run()
        .option("--kernel", kernel)
        .option("--timeout", "60")
        .spawn();
    let mut stdin = run.take_stdin();
    let mut stdout = run.take_stdout();
    // More than the port's queue holds, then a part that comes after the first was read.
    let first = "typed ahead ".repeat(100);
    stdin.write_all(first.as_bytes()).unwrap();
    let mut back = vec![0; first.len()];
    stdout.read_exact(&mut back).unwrap();
    assert_eq!(back, first.as_bytes());
    stdin.write_all(b"and later\n").unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "and later\n");
    let _ = run.wait().expect_status(0);
}

#[test]
fn a_log_that_nobody_reads_does_not_put_off_the_timeout() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().unwrap();
    let path = work.path().join("log");
    mkfifoat(CWD, &path, Mode::RUSR | Mode::WUSR).unwrap();
    let pipe = File::options().read(true).write(true).open(&path).unwrap();
    fcntl_setpipe_size(&pipe, 4096).unwrap();
    let kernel = guest::builder().metal("echo").expect("build the guest");
    let run = Cowshed::run()
        .option("--kernel", kernel)
        .option("--console-log", &path)
        .option("--timeout", "3")
        .stdin("more than there is room for ".repeat(1000));
    let output = run.limit(Duration::from_secs(60)).output();
    let output = output.expect_status(124);
    assert!(output.stdout().len() <= 4096, "the pipe had room");
}

#[test]
fn bars_move_and_never_hide_memory_or_each_other() {
    if kvm_is_here() {
        let _ = passes("probe", "");
    }
}

/// Ways in which a disk's bytes are moved: with a ring or without, past the page cache or not.
const WAYS: [&str; 5] = [
    "",
    ",io=threads",
    ",cache=none",
    ",cache=none,io=threads",
    ",cache=unsafe,queues=4,iops=100000,bps=1G,cache-size=64k",
];

#[test]
fn a_disk_does_what_virtio_says() {
    if !kvm_is_here() {
        return;
    }
    let requests = "blk info fill 7 flush check 7 zero 8 16 zeros 8 16 discard 128 128 zeros 128 128 \
        scatter 100 9 3 indirect 200 40 5 msix";
    for way in WAYS {
        let _ = passes(requests, way);
        let work = passes(requests, &format!("{way},overlay=none"));
        let clean = image::Check {
            corruptions: 0,
            leaks: 0,
        };
        assert_eq!(image::check(&work.path().join("first.qcow2")), clean);
    }
}

#[test]
fn a_read_only_disk_refuses_writes() {
    if kvm_is_here() {
        let _ = passes("blk readonly", ",readonly");
    }
}

#[test]
fn what_was_never_flushed_is_there_after_a_power_off() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().unwrap();
    let overlay = work.path().join("overlay.qcow2");
    let keys = format!(",overlay={}", overlay.display());
    for seed in 1..=8 {
        let filled = run(work.path(), &format!("blk fill {seed}"), &keys).expect_status(0);
        assert!(filled.stdout().ends_with("PASS\n"), "{}", filled.stdout());
        let checked = run(work.path(), &format!("blk check {seed}"), &keys).expect_status(0);
        assert!(checked.stdout().ends_with("PASS\n"), "{}", checked.stdout());
    }
}

#[test]
fn a_pattern_written_through_an_overlay_is_there_in_the_next_run() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().unwrap();
    let overlay = work.path().join("overlay.qcow2");
    let keys = format!(",overlay={}", overlay.display());
    let filled = run(work.path(), "blk fill 99 flush", &keys).expect_status(0);
    assert!(filled.stdout().ends_with("PASS\n"), "{}", filled.stdout());
    let checked = run(work.path(), "blk check 99", &keys).expect_status(0);
    assert!(checked.stdout().ends_with("PASS\n"), "{}", checked.stdout());
    let clean = image::Check {
        corruptions: 0,
        leaks: 0,
    };
    assert_eq!(image::check(&overlay), clean);
}

#[test]
fn a_driver_that_does_everything_wrong_costs_itself_only() {
    if !kvm_is_here() {
        return;
    }
    // Among other things it resets the disk with requests in flight.
    for (seed, way) in WAYS.iter().enumerate() {
        let _ = passes(&format!("hostile seed={seed} rounds=1000"), way);
    }
}

#[test]
fn a_panic_told_through_pvpanic_is_123() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().unwrap();
    let _ = run(work.path(), "panic", "").expect_status(123);
    assert_eq!(reason(work.path()), "panic");
}

#[test]
fn a_triple_fault_is_a_failed_boot() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().unwrap();
    let output = run(work.path(), "triple", "").expect_status(121);
    assert!(
        output.stderr().contains("triple fault"),
        "{}",
        output.stderr()
    );
}

#[test]
fn an_instruction_that_nobody_emulates_is_shown_with_its_bytes() {
    if !kvm_is_here() {
        return;
    }
    if Path::new("/sys/module/kvm_pvm").exists() {
        let work = TempDir::new().unwrap();
        let output = run(work.path(), "bad", "").expect_status(121);
        // SHLX at the guest's first address.
        assert!(
            output.stderr().contains("rip 0x100000, bytes c4 e2"),
            "{}",
            output.stderr()
        );
        assert!(
            output.stderr().contains("clearcpuid="),
            "{}",
            output.stderr()
        );
    } else {
        cowshed_tests::skip::say("this KVM does not emulate the guest's kernel");
    }
}
