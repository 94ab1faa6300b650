//! Bases that stay as they are, overlays that keep what was flushed.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use cowshed_tests::cowshed::Cowshed;
use cowshed_tests::image::{self, Check};
use cowshed_tests::skip::kvm_is_here;
use cowshed_tests::{base, process};
use rustix::process::Signal;
use tempfile::TempDir;

/// Makes the file /kept with contents that only these words give, and has it on the disk.
const KEEP: &str = "seq 1 50000 | dd of=/kept bs=64k conv=fsync 2>/dev/null";

/// Fails unless /kept is as [`KEEP`] made it.
const VERIFY: &str = "seq 1 50000 | cmp - /kept";

#[test]
fn writes_leave_the_base_byte_identical() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().unwrap();
    let overlays = TempDir::new().unwrap();
    let base = base::make(work.path());
    let before = fs::read(&base).unwrap();
    // New data, parts of clusters and blocks in a file that the base has, and names that go. Where
    // KVM emulates the guest's kernel, each megabyte more takes seconds.
    let script = "set -e
        cat /data >/bulk
        for at in 1 1500; do
            echo changed | dd of=/data bs=512 seek=$at conv=notrunc 2>/dev/null
        done
        sync
        rm /inits/*
        sync
        echo 1 >/proc/sys/vm/drop_caches
        stat -c %s /bulk
        tr -d d </bulk | wc -c
        dd if=/data bs=512 skip=1500 count=1 2>/dev/null | head -n 1";
    let run = Cowshed::run()
        .option("--overlay-dir", overlays.path())
        .arg(&base)
        .script(script);
    let output = run.output().expect_status(0);
    let bulk = base::DATA_SIZE;
    assert_eq!(output.stdout(), format!("{bulk}\n0\nchanged\n"));
    assert!(fs::read(&base).unwrap() == before, "the base was written");
    assert_eq!(
        fs::read_dir(overlays.path()).unwrap().count(),
        0,
        "a throwaway overlay stayed"
    );
}

#[test]
fn an_overlay_is_continued_by_the_next_boot() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().unwrap();
    let base = base::make(work.path());
    let overlay = work.path().join("overlay.qcow2");
    let run = |script: &str| {
        let run = Cowshed::run()
            .option("--overlay", &overlay)
            .arg(&base)
            .script(script);
        run.output().expect_status(0)
    };
    let _ = run(KEEP);
    assert_eq!(
        image::check(&overlay),
        Check {
            corruptions: 0,
            leaks: 0
        }
    );
    let _ = run(VERIFY);
    assert_eq!(
        image::check(&overlay),
        Check {
            corruptions: 0,
            leaks: 0
        }
    );
    // Any other reader finds the base by what the overlay records.
    let flat = work.path().join("flat.qcow2");
    let convert = ["convert", "-f", "qcow2", "-O", "qcow2"].map(OsStr::new);
    image::qemu_img_ok(convert.into_iter().chain([overlay.as_ref(), flat.as_ref()]));
}

#[test]
fn kill_9_amid_writes_keeps_what_was_flushed() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().unwrap();
    let overlays = TempDir::new().unwrap();
    let base = base::make(work.path());
    let before = fs::read(&base).unwrap();
    let overlay = work.path().join("overlay.qcow2");
    let scratch = work.path().join("scratch.qcow2");
    image::create(&scratch, "64M");

    let script = format!(
        "{KEEP}; echo kept; \
         while :; do cat /data >/junk; sync; rm /junk; done"
    );
    let mut run = Cowshed::run()
        .option("--overlay", &overlay)
        .option("--disk", &scratch)
        .option("--overlay-dir", overlays.path())
        .arg(&base)
        .script(&script)
        .spawn();
    let mut line = String::new();
    BufReader::new(run.take_stdout())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "kept\n");
    // Writers of the base are refused meanwhile.
    let size = ["resize", "-q", "-f", "qcow2"].map(OsStr::new);
    let grown = image::qemu_img(size.into_iter().chain([base.as_os_str(), "+1M".as_ref()]));
    let refusal = String::from_utf8_lossy(&grown.stderr).into_owned();
    assert!(
        !grown.status.success() && refusal.contains("lock"),
        "{refusal}"
    );
    // The junk has begun to reach the overlay, and goes on.
    let blocks = || fs::metadata(&overlay).unwrap().blocks();
    let kept = blocks();
    process::until("the overlay grows", Duration::from_secs(120), || {
        (blocks() > kept).then_some(())
    });
    run.signal(Signal::KILL);
    let ended = run.wait();
    assert_eq!(ended.status.code(), None, "killed, so without a status");
    image::until_free(&overlay);

    assert_eq!(image::check(&overlay).corruptions, 0);
    assert!(fs::read(&base).unwrap() == before, "the base was written");
    assert_eq!(
        fs::read_dir(overlays.path()).unwrap().count(),
        0,
        "a throwaway overlay stayed"
    );
    let again = Cowshed::run()
        .option("--overlay", &overlay)
        .arg(&base)
        .script(VERIFY);
    let _ = again.output().expect_status(0);
    assert_eq!(image::check(&overlay).corruptions, 0);
}

#[test]
fn disks_come_in_their_order_each_with_its_options() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().unwrap();
    let base = base::make(work.path());
    let second = work.path().join("second.qcow2");
    image::create(&second, "16M");
    let third = work.path().join("third.raw");
    let third_before = [b"raw\n".repeat(1 << 8), vec![b'.'; (1 << 20) - (1 << 10)]].concat();
    fs::write(&third, &third_before).unwrap();

    let script = "cd /sys/block
        cat vdb/serial; echo; cat vdb/size vdc/ro vdc/size
        head -c 3 /dev/vdc; echo
        echo written | dd of=/dev/vdb bs=512 seek=65535 conv=fsync 2>/dev/null && echo vdb
        echo written 2>/dev/null >/dev/vdc || echo vdc refuses";
    let second_option = format!("{},serial=SECOND,size=32M", second.display());
    let third_option = format!("{},format=raw,readonly", third.display());
    let run = Cowshed::run()
        .option("--disk", second_option)
        .option("--disk", third_option)
        .arg(&base)
        .script(script);
    let output = run.output().expect_status(0);
    assert_eq!(
        output.stdout(),
        "SECOND\n65536\n1\n2048\nraw\nvdb\nvdc refuses\n"
    );
    assert!(fs::read(&third).unwrap() == third_before);
}
