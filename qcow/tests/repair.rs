//! Repair: what is damaged becomes an image that QEMU calls clean too, and no byte of the disk or
//! of a snapshot is another one.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use cowshed_qcow::{
    CheckOptions, CheckReport, CreateOptions, Finding, Format, Image, MemoryStorage, OpenOptions,
    Problem, Repair, Storage, check, create, repair,
};
use support::crash::{CrashStorage, Cuts};
use support::damage::{KINDS, damage, hot_spots, make, qemus, rounds, wear};
use support::encryption::Qemu;
use support::lab::options_of;
use support::{Random, have_qemu, qemu_create, qemu_io};

const NAME: &str = "repaired.qcow2";

fn repaired(
    bytes: &[u8],
    what: Repair,
    options: &CheckOptions,
) -> cowshed_qcow::Result<(CheckReport, Vec<u8>)> {
    let storage = Arc::new(MemoryStorage::new(bytes.to_vec()));
    let report = repair(Path::new(NAME), storage.clone(), what, options)?;
    Ok((report, storage.to_vec()))
}

/// The disk in pieces of 512 bytes, those that can be read.
fn content(bytes: &[u8]) -> Vec<Option<Vec<u8>>> {
    let storage = Arc::new(MemoryStorage::new(bytes.to_vec()));
    let options = OpenOptions {
        read_only: true,
        ..options_of(&*storage)
    };
    let Ok(image) = Image::open_over(Path::new(NAME), storage, &options, None) else {
        return Vec::new();
    };
    let piece = |at| {
        let mut piece = vec![0; 512];
        image.read(at, &mut piece).is_ok().then_some(piece)
    };
    (0..image.size() / 512).map(|i| piece(i * 512)).collect()
}

/// What a snapshot has, if QEMU can read it.
fn snapshot(image: &Qemu<'_>, name: &str) -> Option<Vec<u8>> {
    let output = Command::new("qemu-img")
        .args(["convert", "-l", name, "-O", "raw"])
        .args(image.arguments())
        .arg("snapshot.raw")
        .current_dir(image.folder)
        .output()
        .unwrap();
    let read = || std::fs::read(image.folder.join("snapshot.raw")).unwrap();
    output.status.success().then(read)
}

fn assert_kept(before: &[Option<Vec<u8>>], after: &[Option<Vec<u8>>], what: &str) {
    for (i, (before, after)) in before.iter().zip(after).enumerate() {
        assert!(
            before.is_none() || before == after,
            "{what}: sector {i} changed"
        );
    }
    assert!(before.len() <= after.len(), "{what}: shorter");
}

/// Problems that no repair can solve: it is not known what belongs there.
const LASTING: &[Problem] = &[
    Problem::Entry,
    Problem::PastEnd,
    Problem::Snapshot,
    Problem::Bitmap,
    Problem::Overlap,
];

#[test]
fn damaged_images_are_clean_afterwards_and_keep_their_content() {
    if !have_qemu() {
        return;
    }
    for (seed, kind) in KINDS.iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let image = make(folder, kind);
        let rounds = rounds(kind, 15);
        let hot = hot_spots(&image);
        let mut random = Random(100 + seed as u64);
        let (mut clean, mut lasting) = (0, 0);
        for round in 0..rounds {
            let mut bad = image.clone();
            for _ in 0..1 + random.below(3) {
                damage(&mut bad, &hot, &mut random);
            }
            let what = format!("{} {round}", kind.name);
            // Now and then with windows of few counters.
            let counter_bytes = if random.below(4) == 0 {
                1 << 10
            } else {
                64 << 20
            };
            let options = CheckOptions {
                counter_bytes,
                ..CheckOptions::default()
            };
            let Ok((report, good)) = repaired(&bad, Repair::All, &options) else {
                continue;
            };
            let before = content(&bad);
            assert_kept(&before, &content(&good), &what);
            std::fs::write(folder.join("bad"), &bad).unwrap();
            std::fs::write(folder.join("good"), &good).unwrap();
            if kind.snapshots && random.below(3) == 0 {
                let one = |name| snapshot(&kind.qemu(folder, name), "one");
                let before = one("bad");
                assert!(before.is_none() || before == one("good"), "{what}");
            }
            if report.is_clean() {
                clean += 1;
                let (code, said) = qemus(&kind.qemu(folder, "good"));
                assert_eq!(code, 0, "{what}: {said}");
            } else {
                lasting += 1;
                let known = report
                    .findings
                    .iter()
                    .any(|finding| LASTING.contains(&finding.problem));
                let narrow = kind.options.contains("refcount_bits=1")
                    || kind.options.contains("refcount_bits=4");
                assert!(known || narrow, "{what}: {report:#?}");
            }
            let (again, same) = repaired(&good, Repair::All, &options).unwrap();
            assert_eq!(
                again.corruptions_fixed + again.leaks_fixed,
                0,
                "{what}: {report:#?} {again:#?}"
            );
            assert!(
                same == good || !report.is_clean(),
                "{what}: a second repair changes it"
            );

            let (leaks, good) = repaired(&bad, Repair::Leaks, &options).unwrap();
            assert_kept(&before, &content(&good), &what);
            let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(bad));
            let found = check(Path::new(NAME), storage, &options).unwrap();
            // An entry that is wrong as a whole keeps its COPIED, whatever the refcount becomes.
            let others = |report: &CheckReport| {
                let mut problems: Vec<_> = report.findings.iter().map(|f| f.problem).collect();
                problems.retain(|problem| !matches!(problem, Problem::Copied | Problem::Leak));
                problems.len()
            };
            assert!(
                others(&leaks) <= others(&found),
                "{what}: {found:#?} {leaks:#?}"
            );
            assert!(leaks.leaks <= found.leaks, "{what}");
            if found.corruptions == 0 {
                assert!(leaks.is_clean(), "{what}: {leaks:#?}");
            }
        }
        eprintln!("{}: {clean} of {rounds} clean, {lasting} not", kind.name);
        assert!(clean > 0, "{}: {clean} of {rounds}", kind.name);
    }
}

/// Clusters whose refcounts are too low, and entries whose COPIED is set though it must not be:
/// what may lose data with the next write. `None` where data overlaps tables: it moves first, and
/// its new place has no refcount at once.
fn dangers(bytes: &[u8]) -> Option<BTreeSet<u64>> {
    let storage = Arc::new(MemoryStorage::new(bytes.to_vec()));
    let options = CheckOptions {
        max_findings: usize::MAX,
        ..CheckOptions::default()
    };
    let findings = check(Path::new(NAME), storage, &options).unwrap().findings;
    let danger = |finding: &&Finding| match finding.problem {
        Problem::Refcount => true,
        Problem::Copied => finding.what.expected.contains("COPIED clear"),
        _ => false,
    };
    let places = findings
        .iter()
        .filter(danger)
        .map(|finding| finding.what.offset)
        .collect();
    let overlaps = findings
        .iter()
        .any(|finding| finding.problem == Problem::Overlap);
    (!overlaps).then_some(places)
}

/// A power cut in the middle of a repair: what the disk has is there still, and the next repair
/// ends where the first one would have.
#[test]
fn a_repair_that_was_cut_short_is_repaired() {
    if !have_qemu() {
        return;
    }
    let kinds = KINDS.iter().filter(|kind| !kind.options.contains("2M"));
    for (seed, kind) in kinds.enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let image = make(folder.path(), kind);
        let hot = hot_spots(&image);
        let mut random = Random(200 + seed as u64);
        let mut cuts = 0;
        for round in 0..rounds(kind, 8) {
            let mut bad = image.clone();
            if round % 4 == 0 {
                damage(&mut bad, &hot, &mut random);
            }
            for _ in 0..1 + random.below(4) {
                wear(&mut bad, &mut random);
            }
            let storage = Arc::new(CrashStorage::default());
            storage.now.write_at(0, &bad).unwrap();
            let options = CheckOptions::default();
            let what = if random.below(5) == 0 {
                Repair::Leaks
            } else {
                Repair::All
            };
            let Ok(whole) = repair(Path::new(NAME), storage.clone(), what, &options) else {
                continue;
            };
            let log = storage.changes();
            let before = content(&bad);
            let danger = dangers(&bad);
            let mut sequence = Cuts::of(bad.clone());
            for position in 0..=log.len() {
                if let Some(change) = position.checked_sub(1).map(|i| &log[i]) {
                    sequence.push(change);
                }
                if random.below(log.len() as u64) >= 40 {
                    continue;
                }
                let variant = 2 + random.below(3) as usize;
                let cut = sequence.cut(variant, &mut random);
                let what = format!("{} {round}, cut at {position} of {}", kind.name, log.len());
                assert_kept(&before, &content(&cut), &what);
                if let Some(danger) = &danger {
                    let now = dangers(&cut).unwrap();
                    let new: Vec<_> = now.difference(danger).collect();
                    assert!(new.is_empty(), "{what}: new dangers at {new:x?}");
                }
                let (again, good) = repaired(&cut, Repair::All, &options).unwrap();
                assert_kept(&before, &content(&good), &what);
                assert!(again.is_clean() || !whole.is_clean(), "{what}: {again:#?}");
                cuts += 1;
            }
        }
        assert!(cuts > 0, "{}", kind.name);
    }
}

/// A repair's order is what keeps a power cut harmless. Each image has what one of the syncs is
/// for: without it a later change could reach the file before an earlier one.
#[test]
fn a_repair_keeps_its_order_through_power_cuts() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    qemu_create(folder, "cluster_size=4k", "disk", "1M");
    qemu_io(folder, "disk", &["write -P 1 0 64k".into()]);
    let good = std::fs::read(folder.join("disk")).unwrap();
    let number = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap()) as usize;
    let offset = |at: usize| number(at) & 0x00ff_ffff_ffff_fe00;
    let (table, l2) = (number(48), offset(offset(40)));
    let block = number(table);
    let count = |offset: usize| block + offset / 4096 * 2 + 1;
    type Damage<'a> = &'a dyn Fn(&mut [u8]);
    let cases: [(&str, Damage<'_>); 5] = [
        ("raised, then COPIED is set", &|image| {
            image[count(offset(l2))] = 0;
            image[l2] ^= 0x80;
        }),
        ("lowered, then COPIED is set", &|image| {
            image[count(offset(l2))] = 2;
            image[l2] ^= 0x80;
        }),
        ("COPIED is cleared, then raised", &|image| {
            image.copy_within(l2..l2 + 8, l2 + 8);
        }),
        ("rebuilt, then named", &|image| {
            image[table..table + 8].fill(0)
        }),
        ("copied, then named, then lowered", &|image| {
            image[l2 + 8..l2 + 16].copy_from_slice(&(block as u64).to_be_bytes());
            image[count(block)] = 2;
        }),
    ];
    for (name, damage) in cases {
        let mut bad = good.clone();
        damage(&mut bad);
        let storage = Arc::new(CrashStorage::default());
        storage.now.write_at(0, &bad).unwrap();
        let options = CheckOptions::default();
        let report = repair(Path::new(NAME), storage.clone(), Repair::All, &options).unwrap();
        assert!(report.is_clean(), "{name}: {report:#?}");
        let (before, danger) = (content(&bad), dangers(&bad));
        let mut sequence = Cuts::of(bad);
        for (position, change) in storage.changes().iter().enumerate() {
            sequence.push(change);
            for variant in 0..6 {
                let cut = sequence.cut(variant, &mut Random(position as u64));
                let what = format!("{name}: {position}, variant {variant}");
                assert_kept(&before, &content(&cut), &what);
                let now = dangers(&cut);
                if let (Some(danger), Some(now)) = (&danger, &now) {
                    let new: Vec<_> = now.difference(danger).collect();
                    assert!(new.is_empty(), "{what}: new dangers at {new:x?}");
                }
                let storage = Arc::new(MemoryStorage::new(cut));
                let report = check(Path::new(NAME), storage, &options).unwrap();
                let too_low = |finding: &&Finding| {
                    let what = &finding.what;
                    finding.problem == Problem::Refcount && what.offset == block as u64
                };
                let found = report.findings.iter().find(too_low);
                assert!(found.is_none() || danger.is_some(), "{what}: {found:?}");
            }
        }
    }
}

/// Lazy refcounts: while the image is written its refcounts are old and the dirty bit says so;
/// closed, it is as any other, and QEMU agrees.
#[test]
fn lazy_refcounts_are_old_until_the_image_is_closed() {
    let storage = Arc::new(MemoryStorage::default());
    let lazy = CreateOptions {
        lazy_refcounts: true,
        ..CreateOptions::new(4 << 20)
    };
    create(Path::new(NAME), storage.clone(), &lazy).unwrap();
    let open = |storage: Arc<MemoryStorage>| {
        Image::open_over(
            Path::new(NAME),
            storage,
            &OpenOptions::new(Format::Qcow2),
            None,
        )
        .unwrap()
    };
    let image = open(storage.clone());
    assert_eq!(storage.to_vec()[79], 0, "nothing was written yet");
    image.write(0, &[1; 1 << 20]).unwrap();
    image.flush().unwrap();
    let crashed = storage.to_vec();
    assert_eq!(crashed[79], 1);
    let options = CheckOptions::default();
    let left = check(
        Path::new(NAME),
        Arc::new(MemoryStorage::new(crashed.clone())),
        &options,
    );
    assert!(
        left.unwrap().corruptions > 0,
        "refcounts are not written by a flush"
    );
    image.write(2 << 20, &[2; 512]).unwrap();
    drop(image);
    assert_eq!(storage.to_vec()[79], 0);
    assert!(
        check(Path::new(NAME), storage.clone(), &options)
            .unwrap()
            .is_clean()
    );
    assert_eq!(storage.to_vec()[87], 1, "it stays lazy");

    let crashed = Arc::new(MemoryStorage::new(crashed));
    let image = open(crashed.clone());
    assert_eq!(crashed.to_vec()[79], 0);
    assert!(
        check(Path::new(NAME), crashed.clone(), &options)
            .unwrap()
            .is_clean()
    );
    let mut read = vec![0; 1 << 20];
    image.read(0, &mut read).unwrap();
    assert_eq!(read, [1; 1 << 20]);
    drop(image);
    if have_qemu() {
        let folder = tempfile::tempdir().unwrap();
        for storage in [storage, crashed] {
            std::fs::write(folder.path().join("lazy"), storage.to_vec()).unwrap();
            let (code, said) = qemus(&Qemu {
                folder: folder.path(),
                name: "lazy",
                passwords: &[],
            });
            assert_eq!(code, 0, "{said}");
        }
    }
}
