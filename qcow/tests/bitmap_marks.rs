//! Marks in bitmaps: every change of the disk leaves one, and nothing else does.

#![allow(clippy::unwrap_used)] // A test fails by panicking.
#![allow(clippy::single_range_in_vec_init)] // A list of ranges may have one.

mod support;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cowshed_qcow::{
    CreateOptions, Format, Image, NewSnapshot, OpenOptions, ResizeOptions, Selector, create,
};
use support::bitmaps::{all, assert_clean, in_memory, reopen};
use support::model::{Op, Ops, content, perform};
use support::storages::YieldingStorage;
use support::{Files, Random, have_qemu, qemu_create, qemu_io};

/// Marks come by every way in which a disk changes, and only there.
#[test]
fn every_change_is_marked() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    qemu_create(folder, "cluster_size=4k", "disk", "1M");
    qemu_io(folder, "disk", &["write -P 1 0 512k".into()]);
    let options = OpenOptions::new(Format::Qcow2);
    let image = Image::open(&folder.join("disk"), &options, &Files::default()).unwrap();
    let granule = 512;
    image.add_bitmap("b", Some(granule), true).unwrap();
    let marked = |expected: &[Range<u64>], what: &str| {
        assert_eq!(all(&image, "b"), expected, "{what}");
        image.clear_bitmap("b").unwrap();
        assert_eq!(all(&image, "b"), [], "{what}");
    };
    image.write(1000, &[2; 100]).unwrap();
    marked(&[512..1536], "a write in place");
    image.write(600 << 10, &[2; 512]).unwrap();
    marked(&[600 << 10..(600 << 10) + 512], "an allocating write");
    image.write_compressed(900 << 10, &[2; 4096]).unwrap();
    marked(&[900 << 10..904 << 10], "a compressed write");
    drop(image.plan_write(8192, 1024).unwrap());
    marked(&[8192..9216], "a plan");
    drop(image.plan_write(800 << 10, 1024).unwrap());
    marked(&[], "no plan");
    image.write_zeroes(512, 10_000, false).unwrap();
    marked(&[512..10_752], "zeroes");
    image.discard(16384, 8192).unwrap();
    marked(&[16384..24576], "a discard");
    image.discard(16384, 8192).unwrap();
    image.discard(700 << 10, 100 << 10).unwrap();
    image.write_zeroes(700 << 10, 100 << 10, true).unwrap();
    marked(&[], "nothing that changes");
    let mut buf = [0; 512];
    image.read(0, &mut buf).unwrap();
    image.flush().unwrap();
    marked(&[], "no change at all");
    image.disable_bitmap("b").unwrap();
    image.write(0, &[3; 512]).unwrap();
    marked(&[], "a bitmap that is disabled");
}

/// Random requests: what is marked lies within what was asked for, and has all that changed.
#[test]
fn marks_are_those_of_a_model() {
    for (seed, (cluster, granularity)) in [(512, 512), (4096, 1024), (65536, 4096), (1024, 65536)]
        .into_iter()
        .enumerate()
    {
        let size = 1 << 20;
        let (storage, mut image) = in_memory(size, cluster);
        image.add_bitmap("b", Some(granularity), true).unwrap();
        let granularity = u64::from(granularity);
        let mut most = vec![false; (size / granularity) as usize];
        let mut least = most.clone();
        let mut ops = Ops::new(seed as u64, size, cluster.into());
        for i in 0..400 {
            let op = ops.next();
            perform(&image, &op).unwrap();
            let (offset, len, certain) = match &op {
                Op::Write { offset, data } | Op::Compress { offset, data } => {
                    (*offset, data.len() as u64, true)
                }
                Op::Zero { offset, len, .. } | Op::Discard { offset, len } => {
                    (*offset, *len, false)
                }
                Op::Flush => (0, 0, false),
            };
            let range =
                (offset / granularity) as usize..(offset + len).div_ceil(granularity) as usize;
            most[range.clone()].fill(true);
            least[range].fill(certain);
            if i % 10 == 0 {
                assert_within(&image, granularity, &least, &most);
            }
            match i % 40 {
                13 => image.store_bitmaps().unwrap(),
                27 => {
                    drop(image);
                    assert_clean(&storage.to_vec());
                    image = reopen(&storage);
                    assert_within(&image, granularity, &least, &most);
                }
                33 => {
                    image.clear_bitmap("b").unwrap();
                    most.fill(false);
                    least.fill(false);
                }
                _ => {}
            }
        }
        image.close().unwrap();
        assert_clean(&storage.to_vec());
    }
}

fn assert_within(image: &Image, granularity: u64, least: &[bool], most: &[bool]) {
    let mut marked = vec![false; most.len()];
    for range in all(image, "b") {
        let end = range.end.div_ceil(granularity) as usize;
        marked[(range.start / granularity) as usize..end].fill(true);
    }
    for (i, marked) in marked.into_iter().enumerate() {
        assert!(marked || !least[i], "granule {i} is not marked");
        assert!(!marked || most[i], "granule {i} is marked");
    }
}

/// Ranges of another image's bitmap, and pieces of a bitmap.
#[test]
fn ranges_are_marked_and_read_in_pieces() {
    let (storage, image) = in_memory(8 << 20, 512);
    image.add_bitmap("b", Some(512), false).unwrap();
    let ranges = [
        9000..9001,
        (4 << 20)..(5 << 20),
        100..700,
        600..1500,
        (8 << 20) - 1..8 << 20,
    ];
    image.mark_bitmap("b", &ranges).unwrap();
    let expected = [
        0..1536,
        8704..9216,
        (4 << 20)..(5 << 20),
        (8 << 20) - 512..8 << 20,
    ];
    assert_eq!(all(&image, "b"), expected);
    let pieces = image.dirty_ranges("b", 1000..8900).unwrap();
    assert_eq!(pieces, [1000..1536, 8704..8900]);
    assert_eq!(image.dirty_ranges("b", 5000..5000).unwrap(), []);
    assert!(image.dirty_ranges("b", 0..9 << 20).is_err());
    image.close().unwrap();
    assert_clean(&storage.to_vec());
    assert_eq!(all(&reopen(&storage), "b"), expected);
}

/// Content that changes all at once is marked too; who made a bitmap before is told of it.
#[test]
fn emptying_and_snapshots() {
    let size = 1 << 20;
    let (storage, image) = in_memory(size, 4096);
    image.add_bitmap("b", None, true).unwrap();
    image.add_bitmap("off", None, false).unwrap();
    image.write(0, &[1; 512]).unwrap();
    image.create_snapshot(&NewSnapshot::new("s")).unwrap();
    image.write(8192, &[2; 512]).unwrap();
    assert_eq!(all(&image, "b"), [0..4096, 8192..12288]);
    let which = Selector::Name("s".into());
    image.apply_snapshot(&which).unwrap();
    assert_eq!(all(&image, "b"), [0..size]);
    assert_eq!(all(&image, "off"), []);

    image.clear_bitmap("b").unwrap();
    image.resize(2 << 20, &ResizeOptions::default()).unwrap();
    let error = image.apply_snapshot(&which).unwrap_err();
    assert!(error.to_string().contains("resize"), "{error}");
    assert_eq!(all(&image, "b"), []);

    image.clear_bitmap("b").unwrap();
    image.make_empty().unwrap();
    let marked = all(&image, "b");
    assert!(marked[0].contains(&0), "{marked:?}");
    image.delete_snapshot(&which).unwrap();
    image.close().unwrap();
    assert_clean(&storage.to_vec());
    assert_eq!(all(&reopen(&storage), "b"), marked);
}

/// Backups while a disk is written: each takes a bitmap whose successor marks already. Nothing falls
/// between two of them.
#[test]
fn nothing_is_lost_between_two_backups() {
    const THREADS: u64 = 3;
    let storage = Arc::new(YieldingStorage::default());
    let options = CreateOptions {
        cluster_size: 1024,
        ..CreateOptions::new(1 << 20)
    };
    create(Path::new("disk"), storage.clone(), &options).unwrap();
    let options = OpenOptions::new(Format::Qcow2);
    let image = Image::open_over(Path::new("disk"), storage.clone(), &options, None).unwrap();
    image.add_bitmap("0", Some(512), true).unwrap();
    let mut backup = content(&image);
    let running = AtomicU64::new(THREADS);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (image, running) = (&image, &running);
            scope.spawn(move || {
                let mut random = Random(thread);
                for i in 0..300 {
                    // Each has sectors of its own.
                    let sector = random.below(2048 / THREADS - 1) * THREADS + thread;
                    match i % 8 {
                        0 => image.write_zeroes(sector * 512, 512, true).unwrap(),
                        1 => image.flush().unwrap(),
                        _ => image
                            .write(sector * 512, &[random.next() as u8; 512])
                            .unwrap(),
                    }
                }
                running.fetch_sub(1, Ordering::SeqCst);
            });
        }
        let mut generation = 0;
        loop {
            let last = running.load(Ordering::SeqCst) == 0;
            let (old, new) = (generation.to_string(), (generation + 1).to_string());
            image.add_bitmap(&new, Some(512), true).unwrap();
            image.disable_bitmap(&old).unwrap();
            for range in all(&image, &old) {
                let bytes = &mut backup[range.start as usize..range.end as usize];
                image.read(range.start, bytes).unwrap();
            }
            image.remove_bitmap(&old).unwrap();
            generation += 1;
            if last {
                break;
            }
        }
    });
    assert!(
        content(&image) == backup,
        "a change fell between two backups"
    );
    image.close().unwrap();
    assert_clean(&storage.0.to_vec());
}
