//! Time from exec to PID 1 of Debian's unmodified cloud kernel, on ordinary KVM (a nested host),
//! cowshed and other VMMs in turn. A benchmark, to be asked for:
//!
//! ```console
//! $ ALIOTH=~/.cargo/bin/alioth cargo test --package cowshed-tests --test pid1 -- --ignored --nocapture
//! ```
//!
//! `RUNS` is the number of rounds, 21 unless said. QEMU's microvm takes part when `QEMU` names it: in
//! there it takes half a minute a boot. The nested host's CPU is emulated in software, so the times
//! say nothing by themselves, and their ratios little of what takes a real CPU no time.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cowshed_guest_images::{Kernel, cpio::Archive};
use cowshed_tests::nested::{Host, Step, is_available};
use cowshed_tests::{cowshed, guest, skip};
use tempfile::TempDir;

/// What the guest's PID 1 says first.
const WORD: &str = "pid 1";

/// What QEMU's microvm needs beside itself, of its data folder.
const FIRMWARE: [&str; 3] = ["bios-microvm.bin", "linuxboot_dma.bin", "pvh.bin"];

fn build(work: &Path, source: &str, name: &str, flags: &[&str]) -> PathBuf {
    let output = work.join(name);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(source);
    let built = Command::new("cc")
        .args(flags)
        .arg("-o")
        .arg(&output)
        .arg(source)
        .status();
    assert!(built.expect("run cc").success(), "{name} does not build");
    output
}

/// The name of each VMM that is here, its program, and how it is started.
fn vmms() -> Vec<(&'static str, PathBuf, String)> {
    let arguments = "console=ttyS0 reboot=k panic=-1 quiet";
    let mut vmms = vec![(
        "cowshed",
        cowshed::binary().to_owned(),
        "run --memory 256M --kernel /guest/vmlinuz --initrd /guest/initrd".to_owned(),
    )];
    if let Some(path) = std::env::var_os("ALIOTH")
        .map(PathBuf::from)
        .or_else(|| skip::program("alioth"))
    {
        let words =
            format!("boot -m size=256M -k /guest/vmlinuz -i /guest/initrd -c '{arguments}'");
        vmms.push(("alioth", path, words));
    }
    if let Some(path) = std::env::var_os("QEMU") {
        let words = format!(
            "-M microvm,accel=kvm -nodefaults -no-user-config -display none -no-reboot -L /firmware \
             -serial stdio -m 256M -kernel /guest/vmlinuz -initrd /guest/initrd -append '{arguments}'"
        );
        vmms.push(("qemu-microvm", path.into(), words));
    }
    vmms
}

#[test]
#[ignore = "a benchmark, of minutes"]
fn time_to_pid_1() {
    assert!(is_available());
    let runs: usize = std::env::var("RUNS").map_or(21, |runs| runs.parse().unwrap());
    let work = TempDir::new().unwrap();
    let init = build(
        work.path(),
        "bench/init.S",
        "init",
        &["-nostdlib", "-static", "-Wl,--build-id=none"],
    );
    let stopwatch = build(work.path(), "tests/pid1/stopwatch.c", "stopwatch", &["-O"]);
    let mut archive = Archive::default();
    archive.file("init", 0o755, &std::fs::read(init).unwrap());
    let initrd = work.path().join("initrd");
    std::fs::write(&initrd, archive.finish()).unwrap();

    let vmms = vmms();
    let mut host = Host::new()
        .limit(Duration::from_secs(3600))
        .program(stopwatch, "/bin/stopwatch")
        .file(guest::kernel(Kernel::DebianCloud).bzimage, "/guest/vmlinuz")
        .file(initrd, "/guest/initrd");
    for (name, path, _) in &vmms {
        host = host.program(path, format!("/bin/{name}"));
    }
    for name in FIRMWARE {
        let file = Path::new("/usr/share/qemu").join(name);
        if file.exists() {
            host = host.file(file, format!("/firmware/{name}"));
        }
    }
    let round = |_| {
        vmms.iter()
            .map(|(name, _, words)| Step::new(name, &format!("stopwatch '{WORD}' {name} {words}")))
    };
    // The first round warms the caches (from then on cowshed has the kernel unpacked) and does not
    // count.
    let steps: Vec<Step> = (0..=runs).flat_map(round).collect();
    let results = host.run(&steps);
    let median = |name: &str| {
        let of_it = results.iter().filter(|result| result.name == name).skip(1);
        let mut times: Vec<u64> = of_it
            .filter_map(|result| result.stdout.trim().parse().ok())
            .collect();
        times.sort_unstable();
        times.get(times.len() / 2).map(|time| *time as f64 / 1e3)
    };
    for (name, ..) in &vmms {
        match (median(name), median("cowshed")) {
            (Some(time), Some(own)) => println!("{name:<14}{time:9.1} ms{:8.2}", time / own),
            _ => println!(
                "{name:<14} failed: {:#?}",
                results.iter().find(|result| result.name == *name)
            ),
        }
    }
}
