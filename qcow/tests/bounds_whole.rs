//! What work on whole images costs that claim more than they have: it is bounded by the bytes of the
//! file. Counted as in `bounds.rs`.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

#[path = "support/endless.rs"]
mod endless;
mod support;

use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::ops::{CommitOptions, CopyOptions, Task, commit, compare, copy, rebase};
use cowshed_qcow::{
    CheckOptions, CreateOptions, Format, Image, MemoryStorage, NewSnapshot, OpenOptions, check,
    create,
};
use endless::{Endless, MIB, NAME, Rule, alone, cost, open, valid, with_largest_tables};
use peak_alloc::PeakAlloc;
use support::to_version;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Whole-image work is bounded by what the image has, and so are calls.
#[test]
fn checks_of_large_claims_are_bounded() {
    let _alone = alone();
    for fill in [0, 0x01, 0x80, 0xff] {
        let mut start = valid(65536);
        start[60..64].copy_from_slice(&65536_u32.to_be_bytes());
        start[64..72].copy_from_slice(&(3_u64 << 40).to_be_bytes());
        let mut storage = Endless::new(start, Rule::Same(fill));
        // Room for 64 Mi clusters.
        Arc::get_mut(&mut storage).unwrap().len = 4 << 40;
        let options = CheckOptions::default();
        let (peak, calls, checked) = cost(&storage, || {
            check(Path::new(NAME), storage.clone(), &options)
        });
        let found = checked.map(|report| report.corruptions);
        eprintln!("{fill:#x}: a check takes {peak} bytes, {calls} calls: {found:?}");
        assert!(peak <= 64 * MIB, "{fill:#x}: {peak} bytes");
        assert!(calls <= 1024, "{fill:#x}: {calls} calls");
    }
}

/// Tables by the million in holes of a small file are not read.
#[test]
fn checks_of_holes_are_bounded() {
    let _alone = alone();
    for rule in [Rule::Distinct, Rule::DistinctBlocks] {
        let storage = Endless::new(with_largest_tables(0), rule);
        let options = CheckOptions::default();
        let (peak, calls, checked) = cost(&storage, || {
            check(Path::new(NAME), storage.clone(), &options)
        });
        let found = checked.map(|report| report.corruptions);
        eprintln!("a check takes {peak} bytes, {calls} calls: {found:?}");
        assert!(peak <= 128 * MIB, "{peak} bytes");
        assert!(calls <= 128, "{calls} calls");
    }
}

/// What goes over all of an image reads no tables in holes either, and counts nothing in them.
#[test]
fn snapshots_of_holes_are_bounded() {
    let _alone = alone();
    for rule in [Rule::Distinct, Rule::DistinctBlocks] {
        let storage = Endless::new(with_largest_tables(0), rule);
        for work in ["snapshot", "downgrade"] {
            let image = open(&storage, false).unwrap();
            let (peak, calls, done) = cost(&storage, || match work {
                "snapshot" => image.create_snapshot(&NewSnapshot::new("one")).map(drop),
                _ => image.amend(&to_version(2)),
            });
            eprintln!("{work}: {peak} bytes, {calls} calls: {done:?}");
            // Nothing there is counted; and no zero clusters are there either.
            assert_eq!(done.is_err(), work == "snapshot", "{work}: {done:?}");
            // Some times what the L1 table has.
            assert!(peak <= 384 * MIB, "{work}: {peak} bytes");
            assert!(calls <= 1024, "{work}: {calls} calls");
        }
    }
}

/// An image of the same size that has nothing.
fn nothing() -> Image {
    let storage = Arc::new(MemoryStorage::default());
    create(
        Path::new("nothing"),
        storage.clone(),
        &CreateOptions::new(1 << 50),
    )
    .unwrap();
    let options = OpenOptions::new(Format::Qcow2);
    Image::open_over(Path::new("nothing"), storage, &options, None).unwrap()
}

/// Work on all of an image.
type Work = fn(&Image, &Image) -> cowshed_qcow::Result<()>;

const WORK: [(&str, Work); 7] = [
    ("map", |image, _| {
        let mut entries = 0;
        image.map(0, image.size(), &mut |entry| {
            assert!(!entry.data);
            entries += 1;
            Ok(())
        })?;
        assert_eq!(entries, 1);
        Ok(())
    }),
    ("copy", |image, other| {
        copy(image, other, 0, &CopyOptions::default(), &Task::default())
    }),
    ("copy differences", |image, other| {
        let options = CopyOptions {
            only_differences: true,
            ..CopyOptions::default()
        };
        copy(image, other, 0, &options, &Task::default())
    }),
    ("compare", |image, other| {
        let found = compare(image, other, false, 2, &Task::default())?;
        assert_eq!(found.difference, None);
        Ok(())
    }),
    ("compare strictly", |image, other| {
        let found = compare(image, other, true, 2, &Task::default())?;
        assert_eq!(found.difference, None);
        Ok(())
    }),
    ("commit", |image, other| {
        let options = CommitOptions {
            above: 1,
            make_empty: false,
            threads: 2,
        };
        commit(image, other, &options, &Task::default())
    }),
    ("rebase", |image, other| {
        rebase(image, Some(other), false, 2, &Task::default())
    }),
];

/// Two million L2 tables in one hole say nothing, and take no time.
#[test]
fn work_on_holes_is_bounded() {
    let _alone = alone();
    for (name, work) in WORK {
        let storage = Endless::new(with_largest_tables(0), Rule::Distinct);
        let (image, other) = (open(&storage, false).unwrap(), nothing());
        let (peak, calls, done) = cost(&storage, || work(&image, &other));
        eprintln!("{name}: {peak} bytes, {calls} calls: {done:?}");
        done.unwrap();
        assert!(peak <= 64 * MIB, "{name}: {peak} bytes");
        assert!(calls <= 64, "{name}: {calls} calls");
    }
}

/// What an L2 table says that all L1 entries name is refused before it is said two million times.
#[test]
fn work_on_a_table_named_twice_is_refused() {
    let _alone = alone();
    for (name, work) in WORK {
        let storage = Endless::new(with_largest_tables(0), Rule::Shared);
        let (image, other) = (open(&storage, false).unwrap(), nothing());
        let (peak, calls, done) = cost(&storage, || work(&image, &other));
        let error = done.unwrap_err().to_string();
        assert!(peak <= 64 * MIB, "{name}: {peak} bytes");
        assert!(calls <= 16, "{name}: {calls} calls");
        assert!(error.contains(NAME), "{name}: {error}");
    }
}

/// Nothing is given back that was not counted: that is found when the first of it is written down.
#[test]
fn emptying_holes_is_bounded() {
    let _alone = alone();
    let storage = Endless::new(with_largest_tables(0), Rule::Distinct);
    let image = open(&storage, false).unwrap();
    let (peak, calls, done) = cost(&storage, || image.make_empty());
    eprintln!("{peak} bytes, {calls} calls: {done:?}");
    done.unwrap_err();
    assert!(peak <= 384 * MIB, "{peak} bytes");
    assert!(calls <= 1 << 18, "{calls} calls");
}
