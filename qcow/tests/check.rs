//! The crate's check against `qemu-img check` and against the suites' own small checker: images of
//! all kinds by QEMU's tools, as they are and damaged.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use cowshed_qcow::{CheckOptions, CheckReport, MemoryStorage, Problem, check};
use support::{Random, have_qemu, qemu_img, qemu_io};

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

/// Exit code and JSON of `qemu-img check`, and what it says beside that.
fn qemus(folder: &Path, image: &str) -> (i32, String) {
    let output = Command::new("qemu-img")
        .args(["check", "-f", "qcow2", "--output=json", image])
        .current_dir(folder)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.code().unwrap(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

/// A number of QEMU's JSON; what it leaves out is zero.
fn number(json: &str, key: &str) -> u64 {
    let Some((_, rest)) = json.split_once(&format!("\"{key}\": ")) else {
        return 0;
    };
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

/// An image of QEMU's, made in a folder of its own.
struct Kind {
    name: &'static str,
    options: &'static str,
    compressed: bool,
    snapshots: bool,
    bitmaps: bool,
}

const KINDS: &[Kind] = &[
    kind("plain", "cluster_size=64k"),
    kind("small clusters", "cluster_size=512"),
    kind("version 2", "cluster_size=4k,compat=0.10"),
    kind("refcounts of 64 bits", "cluster_size=512,refcount_bits=64"),
    Kind {
        snapshots: false,
        ..kind("refcounts of 1 bit", "cluster_size=1k,refcount_bits=1")
    },
    // Compressed clusters that share a cluster would need more than 15 references.
    Kind {
        compressed: false,
        ..kind("refcounts of 4 bits", "cluster_size=4k,refcount_bits=4")
    },
    kind("large clusters", "cluster_size=2M"),
    Kind {
        compressed: false,
        ..kind("preallocated", "cluster_size=4k,preallocation=metadata")
    },
    Kind {
        bitmaps: true,
        ..kind("bitmaps", "cluster_size=4k")
    },
];

const fn kind(name: &'static str, options: &'static str) -> Kind {
    Kind {
        name,
        options,
        compressed: true,
        snapshots: true,
        bitmaps: false,
    }
}

/// Makes an image of 1 MiB with a bit of everything.
fn make(folder: &Path, kind: &Kind) -> Vec<u8> {
    qemu_img(
        folder,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            kind.options,
            "disk",
            "1M",
        ],
    );
    let commands = |list: &[&str]| {
        let list: Vec<String> = list.iter().map(|&command| command.into()).collect();
        qemu_io(folder, "disk", &list);
    };
    commands(&[
        "write -P 1 0 100k",
        "write -P 2 300k 64k",
        "write -P 5 700k 9k",
    ]);
    if !kind.options.contains("0.10") {
        commands(&["write -z 20k 8k", "write -z -u 304k 4k"]);
    }
    if kind.compressed && !kind.options.contains("2M") {
        for (at, pattern) in [(192, 11), (448, 12), (512, 13)] {
            commands(&[&format!("write -c -P {pattern} {at}k 64k")]);
        }
    }
    if kind.snapshots {
        qemu_img(folder, &["snapshot", "-c", "one", "disk"]);
        commands(&["write -P 6 4k 9k", "write -P 7 450k 4k"]);
        qemu_img(folder, &["snapshot", "-c", "two", "disk"]);
        commands(&["write -P 8 8k 19k"]);
        qemu_img(folder, &["snapshot", "-c", "three", "disk"]);
        qemu_img(folder, &["snapshot", "-d", "two", "disk"]);
    }
    if kind.bitmaps {
        // Granularities that take less than a cluster, and more: small ones for long tables.
        for (name, granularity) in [("first", "64k"), ("second", "512")] {
            qemu_img(
                folder,
                &["bitmap", "--add", "-g", granularity, "disk", name],
            );
        }
        commands(&["write -P 9 600k 200k"]);
    }
    commands(&["discard 320k 16k"]);
    std::fs::read(folder.join("disk")).unwrap()
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
fn excuse(ours: &cowshed_qcow::Result<CheckReport>, code: i32, said: &str) -> Option<&'static str> {
    let Ok(report) = ours else {
        return match code {
            1 => None,
            _ => Some("a header or a snapshot table that QEMU reads past the file's end"),
        };
    };
    let only = |problems: &[Problem]| {
        report
            .findings
            .iter()
            .all(|finding| problems.contains(&finding.problem) || finding.problem == Problem::Leak)
    };
    match code {
        1 if said.contains("Check failed")
            || said.contains("check errors")
            || said.contains("Could not") =>
        {
            Some("QEMU gives up on what this crate can still check")
        }
        0 | 3 if only(&[Problem::Overlap]) => {
            Some("QEMU accepts overlaps that refcounts account for")
        }
        0 | 3 if only(&[Problem::Entry]) && said.is_empty() => {
            Some("QEMU's check knows no bit that version 2 has not")
        }
        _ => None,
    }
}

#[test]
fn damaged_images_get_qemus_verdict() {
    if !have_qemu() {
        return;
    }
    // More by hand: CHECK_ROUNDS=1000.
    let rounds = std::env::var("CHECK_ROUNDS").map_or(40, |rounds| rounds.parse().unwrap());
    for (seed, kind) in KINDS.iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let image = make(folder.path(), kind);
        let mut random = Random(seed as u64);
        let hot = hot_spots(&image);
        let mut seen = [0; 4];
        for round in 0..rounds {
            let mut bad = image.clone();
            for _ in 0..1 + random.below(3) {
                damage(&mut bad, &hot, &mut random);
            }
            std::fs::write(folder.path().join("bad"), &bad).unwrap();
            let (code, said) = qemus(folder.path(), "bad");
            let report = ours(&bad);
            let mine = verdict(&report);
            seen[code as usize % 4] += 1;
            let excuse = (mine != code).then(|| excuse(&report, code, &said));
            assert!(
                excuse != Some(None),
                "{} {round}: {mine}, QEMU {code}: {said}\n{report:#?}",
                kind.name
            );
        }
        assert!(seen[2] > 0 && seen[3] > 0, "{}: {seen:?}", kind.name);
    }
}

fn be64(bytes: &[u8], at: usize) -> usize {
    bytes
        .get(at..at + 8)
        .map_or(0, |b| u64::from_be_bytes(b.try_into().unwrap()) as usize)
}

/// Places of metadata: ranges in which a damaged byte tells.
fn hot_spots(image: &[u8]) -> Vec<(usize, usize)> {
    let number = |at: usize| u32::from_be_bytes(image[at..at + 4].try_into().unwrap()) as usize;
    let cluster = 1 << number(20);
    let table = be64(image, 48);
    let (l1, l1_len) = (be64(image, 40), number(36) * 8);
    let mut spots = vec![(l1, l1_len), (table, 32)];
    spots.extend(
        (0..4)
            .map(|i| be64(image, table + i * 8))
            .filter(|&b| b > 0)
            .map(|b| (b, cluster.min(256))),
    );
    for i in 0..l1_len / 8 {
        let l2 = be64(image, l1 + i * 8) & 0x00ff_ffff_ffff_fe00;
        if l2 > 0 && l2 < image.len() {
            spots.push((l2, cluster.min(2048)));
            spots.push((l2, cluster.min(256)));
        }
    }
    if number(60) > 0 {
        spots.push((be64(image, 64), 40));
        spots.push((be64(image, be64(image, 64)), l1_len));
    }
    spots
}

/// Flips a bit, or replaces an entry by another one, or changes a byte.
fn damage(image: &mut [u8], hot: &[(usize, usize)], random: &mut Random) {
    let (start, len) = hot[random.below(hot.len() as u64) as usize];
    let at = start + random.below(len as u64) as usize;
    match random.below(4) {
        0 => image[at] ^= 1 << random.below(8),
        1 => image[at] = random.next() as u8,
        2 => {
            let (from, from_len) = hot[random.below(hot.len() as u64) as usize];
            let from = from + random.below(from_len as u64) as usize / 8 * 8;
            let to = start + (at - start) / 8 * 8;
            let entry: Vec<u8> = image[from..from + 8].to_vec();
            image[to..to + 8].copy_from_slice(&entry);
        }
        _ => {
            let to = start + (at - start) / 8 * 8;
            image[to..to + 8].fill(0);
        }
    }
}
