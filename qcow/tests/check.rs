//! The crate's check against `qemu-img check` and against the suites' own small checker: images of
//! all kinds by QEMU's tools, as they are and damaged.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{CheckOptions, CheckReport, MemoryStorage, Problem, check};
use support::damage::{KINDS, Kind, damage, hot_spots, make, qemus, rounds};
use support::{Random, have_qemu};

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
        let (code, json) = qemus(folder.path(), "disk");
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
        let second = support::check::check(&bytes);
        assert!(
            second.corruptions.is_empty() && second.leaks.is_empty(),
            "{}: {second:?}",
            kind.name
        );
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
            let (code, said) = qemus(folder.path(), "bad");
            let report = ours(&bad);
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
