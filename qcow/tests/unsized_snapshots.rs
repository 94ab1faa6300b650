//! Version 3 demands that a snapshot says the sizes of its disk and VM state. Where damage, or a
//! foreign program, left them out, a check finds what QEMU's finds, and a repair writes them.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{
    CheckOptions, CheckReport, MemoryStorage, Problem, Repair, Selector, Storage, check, repair,
};
use support::crash::{CrashStorage, Cuts};
use support::damage::{qemus, wear};
use support::encryption::Qemu;
use support::lab::{Lab, NAME, at, bytes_of, cut_extra_data};
use support::model::content;
use support::{Random, have_qemu, qemu_create, qemu_img, qemu_io};

const NAMES: [&str; 2] = ["one", "two"];

/// An image with two snapshots that have so much extra data.
fn unsized_image(folder: &Path, options: &str, extra: [usize; 2]) -> Vec<u8> {
    let _ = std::fs::remove_file(folder.join(NAME));
    qemu_create(folder, options, NAME, "256k");
    for (name, pattern) in NAMES.iter().zip(1..) {
        let write = format!("write -P {pattern} {}k 60k", pattern * 20);
        qemu_io(folder, NAME, &[write]);
        qemu_img(folder, &["snapshot", "-c", name, NAME]);
    }
    qemu_io(folder, NAME, &["write -P 7 30k 9k".into()]);
    cut_extra_data(&folder.join(NAME), &extra);
    std::fs::read(folder.join(NAME)).unwrap()
}

fn ours(bytes: &[u8]) -> CheckReport {
    let storage = Arc::new(MemoryStorage::new(bytes.to_vec()));
    check(Path::new(NAME), storage, &CheckOptions::default()).unwrap()
}

fn repair_in(storage: Arc<dyn Storage>, what: Repair) -> CheckReport {
    repair(Path::new(NAME), storage, what, &CheckOptions::default()).unwrap()
}

/// The disk and both snapshots.
fn contents(bytes: &[u8]) -> Vec<Vec<u8>> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(bytes.to_vec()));
    let snapshot = |name: &&str| content(&at(&storage, Selector::Name((*name).into()), 0));
    let disk = content(&Lab::new(storage.clone(), 0).image);
    std::iter::once(disk)
        .chain(NAMES.iter().map(snapshot))
        .collect()
}

/// What is written to the disk does not show in the snapshots.
fn assert_writable(bytes: &[u8], before: &[Vec<u8>], what: &str) {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(bytes.to_vec()));
    let lab = Lab::new(storage.clone(), 0);
    lab.image.write(150 << 10, &[9; 100 << 10]).unwrap();
    drop(lab.image);
    let after = contents(&bytes_of(&*storage));
    assert!(after[1..] == before[1..], "{what}: a write shows");
}

const CASES: [(&str, [usize; 2], u64); 6] = [
    ("cluster_size=64k", [0, 8], 2),
    ("cluster_size=64k", [0, 24], 1),
    ("cluster_size=512", [16, 8], 1),
    ("cluster_size=512,refcount_bits=64", [0, 0], 2),
    ("cluster_size=4k,refcount_bits=4", [8, 16], 1),
    ("cluster_size=4k,compat=0.10", [0, 8], 0),
];

#[test]
fn found_and_repaired_as_qemu_does() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let qemu = |name| Qemu {
        folder,
        name,
        passwords: &[],
    };
    for (options, extra, wrong) in CASES {
        let bad = unsized_image(folder, options, extra);
        let before = contents(&bad);
        let report = ours(&bad);
        let snapshots = |report: &CheckReport| {
            let findings = report.findings.iter();
            findings.filter(|f| f.problem == Problem::Snapshot).count() as u64
        };
        assert_eq!(report.corruptions, wrong, "{options}: {report:#?}");
        assert_eq!(snapshots(&report), wrong, "{options}: {report:#?}");
        let (code, json) = qemus(&qemu(NAME));
        assert_eq!(code, if wrong > 0 { 2 } else { 0 }, "{json}");
        let said = json.contains(&format!("\"corruptions\": {wrong}"));
        assert!(said || wrong == 0, "{options}: {json}");

        let storage = Arc::new(MemoryStorage::new(bad.clone()));
        let report = repair_in(storage.clone(), Repair::Leaks);
        assert_eq!((report.corruptions, report.leaks), (wrong, 0), "{options}");
        assert!(storage.to_vec() == bad, "{options}: leaks alone");

        let report = repair_in(storage.clone(), Repair::All);
        assert!(report.is_clean(), "{options}: {report:#?}");
        assert_eq!(report.corruptions_fixed, wrong, "{options}");
        let good = storage.to_vec();
        assert_eq!(good[79] & 3, 0, "{options}: neither dirty nor corrupt");
        support::check::check(&good).assert_clean(options);
        assert!(contents(&good) == before, "{options}");
        std::fs::write(folder.join("good"), &good).unwrap();
        qemu("good").assert_clean();
        // QEMU's own repair says the same of every snapshot.
        qemu_img(folder, &["check", "-q", "-r", "all", NAME]);
        let theirs = std::fs::read(folder.join(NAME)).unwrap();
        let list = |bytes| {
            let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(bytes));
            Lab::new(storage, 0).image.snapshots().unwrap()
        };
        assert_eq!(list(good), list(theirs), "{options}");
        if wrong > 0 {
            // (Of version 2, QEMU 7.2 applies none without a size.)
            qemu_img(folder, &["snapshot", "-a", "one", "good"]);
            qemu_img(folder, &["check", "-q", "good"]);
        }
    }
}

/// Beside wrong refcounts and flags; and a power cut anywhere leaves an image that opens for
/// writing, reads the same, and is repaired to the end.
#[test]
fn power_cuts() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(8);
    for (options, extra, wrong) in CASES.into_iter().filter(|(_, _, wrong)| *wrong > 0) {
        let image = unsized_image(folder.path(), options, extra);
        let before = contents(&image);
        for round in 0..4 {
            let mut bad = image.clone();
            (0..round).for_each(|_| wear(&mut bad, &mut random));
            let storage = Arc::new(CrashStorage::default());
            storage.now.write_at(0, &bad).unwrap();
            let report = repair_in(storage.clone(), Repair::All);
            assert!(report.is_clean(), "{options}: {report:#?}");
            assert!(report.corruptions_fixed >= wrong, "{options}");
            assert!(contents(&bytes_of(&*storage)) == before, "{options}");
            let mut sequence = Cuts::of(bad);
            for (position, change) in storage.changes().iter().enumerate() {
                sequence.push(change);
                for variant in 0..5 {
                    let cut = sequence.cut(variant, &mut random);
                    let what = format!("{options}, {round}: {position}, variant {variant}");
                    // Opening it for writing repairs it, if it is dirty.
                    assert!(contents(&cut) == before, "{what}");
                    if round == 0 {
                        assert_writable(&cut, &before, &what);
                    }
                    let storage = Arc::new(MemoryStorage::new(cut));
                    let report = repair_in(storage.clone(), Repair::All);
                    assert!(report.is_clean(), "{what}: {report:#?}");
                    assert!(contents(&storage.to_vec()) == before, "{what}");
                }
            }
        }
    }
}
