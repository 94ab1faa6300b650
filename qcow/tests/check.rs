//! The crate's check against `qemu-img check` and against the suites' own small checker: images of
//! all kinds by QEMU's tools, as they are and damaged.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cowshed_qcow::{
    CheckOptions, CheckReport, CreateOptions, Finding, Format, Image, MemoryStorage, OpenOptions,
    Problem, Repair, Storage, check, create, repair,
};
use support::damage::{KINDS, Kind, damage, hot_spots, make, qemus, rounds};
use support::{Random, have_qemu, qemu_create, qemu_img};

fn ours(bytes: &[u8]) -> cowshed_qcow::Result<CheckReport> {
    let storage = Arc::new(MemoryStorage::new(bytes.to_vec()));
    check(
        Path::new("checked.qcow2"),
        storage,
        &CheckOptions::default(),
    )
}

/// What a check says, in the numbers of `qemu-img check`'s exit code.
fn verdict(report: &cowshed_qcow::Result<CheckReport>) -> i32 {
    match report {
        Err(_) => 1,
        Ok(report) if report.corruptions > 0 => 2,
        Ok(report) if report.leaks > 0 => 3,
        Ok(_) => 0,
    }
}

/// A number of QEMU's JSON; what it leaves out is zero.
fn number(json: &str, key: &str) -> u64 {
    let Some((_, rest)) = json.split_once(&format!("\"{key}\": ")) else {
        return 0;
    };
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

#[test]
fn sound_images_are_clean_and_the_numbers_are_qemus() {
    if !have_qemu() {
        return;
    }
    for kind in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let bytes = make(folder.path(), kind);
        let (code, json) = qemus(&kind.qemu(folder.path(), "disk"));
        assert_eq!(code, 0, "{}: {json}", kind.name);
        let report = ours(&bytes).unwrap();
        assert!(report.is_clean(), "{}: {report:#?}", kind.name);
        for (key, value) in [
            ("image-end-offset", report.image_end_offset),
            ("total-clusters", report.total_clusters),
            ("allocated-clusters", report.allocated_clusters),
            ("fragmented-clusters", report.fragmented_clusters),
            ("compressed-clusters", report.compressed_clusters),
        ] {
            assert_eq!(value, number(&json, key), "{}: {key} in {json}", kind.name);
        }
        if kind.bitmaps {
            continue; // The small checker knows none.
        }
        support::check::check(&bytes).assert_clean(kind.name);
    }
}

/// Why a verdict may differ from QEMU's.
fn excuse(
    kind: &Kind,
    ours: &cowshed_qcow::Result<CheckReport>,
    code: i32,
    said: &str,
) -> Option<&'static str> {
    let Ok(report) = ours else {
        return (code != 1).then_some("a header that QEMU reads past the file's end");
    };
    let only = |problem: Problem| {
        let mut findings = report.findings.iter();
        findings.all(|finding| [problem, Problem::Leak].contains(&finding.problem))
    };
    match code {
        1 if said.contains("heck failed") || said.contains("Could not") => {
            Some("QEMU gives up on what this crate can still check")
        }
        0 | 3 if only(Problem::Overlap) => Some("QEMU accepts overlaps that refcounts account for"),
        0 | 3 if only(Problem::Entry) && kind.options.contains("0.10") => {
            Some("QEMU's check knows no bit that version 2 has not")
        }
        0 | 3 if only(Problem::Entry) && kind.options.contains("data_file") => {
            Some("QEMU's check accepts any place in a data file")
        }
        _ => None,
    }
}

#[test]
fn damaged_images_get_qemus_verdict() {
    if !have_qemu() {
        return;
    }
    for (seed, kind) in KINDS.iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let image = make(folder.path(), kind);
        let mut random = Random(seed as u64);
        let hot = hot_spots(&image);
        let mut seen = [0; 4];
        for round in 0..rounds(kind, 30) {
            let mut bad = image.clone();
            for _ in 0..1 + random.below(3) {
                damage(&mut bad, &hot, &mut random);
            }
            std::fs::write(folder.path().join("bad"), &bad).unwrap();
            let (code, said) = qemus(&kind.qemu(folder.path(), "bad"));
            let report = ours(&bad);
            if let Ok(report) = &report {
                // Windows of few counters find the same.
                let options = CheckOptions {
                    counter_bytes: 1 << 10,
                    ..CheckOptions::default()
                };
                let storage = Arc::new(MemoryStorage::new(bad.clone()));
                let narrow = check(Path::new("checked.qcow2"), storage, &options).unwrap();
                let counts = |report: &CheckReport| {
                    (report.corruptions, report.leaks, report.image_end_offset)
                };
                assert_eq!(counts(&narrow), counts(report), "{} {round}", kind.name);
            }
            let mine = verdict(&report);
            seen[code as usize % 4] += 1;
            let excuse = (mine != code).then(|| excuse(kind, &report, code, &said));
            assert!(
                excuse != Some(None),
                "{} {round}: {mine}, QEMU {code}: {said}\n{report:#?}",
                kind.name
            );
        }
        assert!(seen[2] > 0, "{}: {seen:?}", kind.name);
    }
}

/// Memory that counts what is read of it.
struct Counting(MemoryStorage, AtomicU64);

impl Storage for Counting {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.1.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.0.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, buf)
    }
    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.zero(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.punch(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
}

/// Exit code of `qemu-img check`.
fn qemus_code(folder: &Path) -> i32 {
    let output = Command::new("qemu-img")
        .args(["check", "-q", "-f", "qcow2", "odd.qcow2"])
        .current_dir(folder)
        .output();
    output.unwrap().status.code().unwrap()
}

/// What QEMU does not even open.
#[test]
fn what_contradicts_the_header_is_found() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let path = folder.join("odd.qcow2");
    qemu_create(folder, "cluster_size=64k", "odd.qcow2", "64M");
    qemu_img(
        folder,
        &["bitmap", "--add", "-g", "64k", "odd.qcow2", "marks"],
    );
    let sound = std::fs::read(&path).unwrap();
    let magic = [0x23, 0x85, 0x28, 0x75];
    let extension = sound.windows(4).position(|at| at == magic).unwrap();
    let directory = &sound[extension + 24..extension + 32];
    let directory = u64::from_be_bytes(directory.try_into().unwrap()) as usize;
    for (at, new, problem) in [
        // A table of five clusters for one cluster of bits.
        (directory + 11, 5, Problem::Bitmap),
        // A flag, types and granularities that there are not.
        (directory + 15, 0b1010, Problem::Bitmap),
        (directory + 16, 0, Problem::Bitmap),
        (directory + 16, 2, Problem::Bitmap),
        (directory + 17, 8, Problem::Bitmap),
        (directory + 17, 32, Problem::Bitmap),
        (directory + 17, 255, Problem::Bitmap),
        // A raw data file where there is none.
        (95, 0b11, Problem::Features),
    ] {
        let mut bytes = sound.clone();
        bytes[at] = new;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(qemus_code(folder), 1, "{problem:?}");
        let report = ours(&bytes).unwrap();
        let found: Vec<_> = report.findings.iter().map(|f| f.problem).collect();
        assert_eq!(found, [problem], "{at}: {new}");
        let storage = Arc::new(MemoryStorage::new(bytes));
        let options = CheckOptions::default();
        let report = repair(&path, storage.clone(), Repair::All, &options).unwrap();
        assert_eq!(report.is_clean(), problem == Problem::Features);
        if report.is_clean() {
            std::fs::write(&path, storage.to_vec()).unwrap();
            qemu_img(folder, &["check", "-q", "-f", "qcow2", "odd.qcow2"]);
        }
    }
}

/// A snapshot whose L1 table is at no cluster, with entries and without.
#[test]
fn snapshots_at_no_cluster_are_found() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let path = folder.join("odd.qcow2");
    qemu_create(folder, "cluster_size=64k", "odd.qcow2", "64M");
    qemu_img(folder, &["snapshot", "-c", "one", "odd.qcow2"]);
    let sound = std::fs::read(&path).unwrap();
    assert!(ours(&sound).unwrap().is_clean());
    let table = u64::from_be_bytes(sound[64..72].try_into().unwrap()) as usize;
    for entries in [1, 0] {
        let mut bytes = sound.clone();
        bytes[table + 6] = 2;
        bytes[table + 11] = entries;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(qemus_code(folder), 2);
        let report = ours(&bytes).unwrap();
        let mut found = report.findings.iter().map(|f| f.problem);
        assert!(found.any(|p| p == Problem::Snapshot), "{report:?}");
    }
}

/// An L2 table that 32768 L1 entries name is read once, and its clusters have as many references.
#[test]
fn a_shared_table_is_read_once() {
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions {
        cluster_size: 512,
        ..CreateOptions::new(1 << 30)
    };
    create(Path::new("shared"), storage.clone(), &options).unwrap();
    let image = Image::open_over(
        Path::new("shared"),
        storage.clone(),
        &OpenOptions::new(Format::Qcow2),
        None,
    );
    image.unwrap().write(0, &[1; 512]).unwrap();
    let mut bytes = storage.to_vec();
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    let entries = u32::from_be_bytes(bytes[36..40].try_into().unwrap()) as usize;
    let first: [u8; 8] = bytes[l1..l1 + 8].try_into().unwrap();
    bytes[l1..l1 + entries * 8]
        .as_chunks_mut::<8>()
        .0
        .fill(first);
    let storage = Arc::new(Counting(MemoryStorage::new(bytes), AtomicU64::new(0)));
    let report = check(
        Path::new("shared"),
        storage.clone(),
        &CheckOptions::default(),
    )
    .unwrap();
    let expected = format!("{entries}, its references");
    let counted = |finding: &&Finding| finding.what.expected == expected;
    assert_eq!(
        report.findings.iter().filter(counted).count(),
        2,
        "{:?}",
        report.findings
    );
    let read = storage.1.load(Ordering::Relaxed);
    assert!(read < 3 * storage.len().unwrap(), "{read} bytes read");

    // Shared it may be, as long as its refcounts say so.
    let report = repair(
        Path::new("shared"),
        storage.clone(),
        Repair::All,
        &CheckOptions::default(),
    );
    assert!(report.unwrap().is_clean());
    let mut content = [0; 512];
    let image = Image::open_over(
        Path::new("shared"),
        storage,
        &OpenOptions::new(Format::Qcow2),
        None,
    )
    .unwrap();
    image.read((1 << 30) - 32768, &mut content).unwrap();
    assert_eq!(content, [1; 512]);
}
