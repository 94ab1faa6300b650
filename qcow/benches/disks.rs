//! Reads and writes of every kind of disk, and what is asked of a large one whose clusters lie in no
//! order. `tests/bench/qcow.py` has the ratios to QEMU.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use cowshed_qcow::{
    CheckOptions, Compression, FileStorage, Format, Image, NewSnapshot, OpenOptions, Selector,
    Storage, check,
};
use divan::Bencher;
use divan::counter::BytesCount;
use support::{Kind, SIZE, disk, fragmented};

const KINDS: [Kind; 6] = [
    Kind::Preallocated,
    Kind::Overlay,
    Kind::Chain,
    Kind::Compressed(Compression::Zlib),
    Kind::Compressed(Compression::Zstd),
    Kind::Luks,
];
const SMALL: usize = 4096;
const LARGE: usize = 1 << 20;

fn main() {
    divan::main();
}

/// Offsets in an order without any order, the same in each run.
fn offsets() -> impl FnMut() -> u64 {
    let mut state = 7_u64;
    move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 20) % (SIZE / SMALL as u64) * SMALL as u64
    }
}

#[divan::bench(args = KINDS, sample_count = 10, sample_size = 1)]
fn sequential_read(bencher: Bencher<'_, '_>, kind: Kind) {
    let image = disk(kind);
    let mut buf = vec![0; LARGE];
    bencher.counter(BytesCount::new(SIZE)).bench_local(|| {
        for at in (0..SIZE).step_by(LARGE) {
            image.read(at, &mut buf).unwrap();
        }
    });
}

#[divan::bench(args = KINDS, sample_count = 10, sample_size = 1)]
fn random_read(bencher: Bencher<'_, '_>, kind: Kind) {
    let image = disk(kind);
    let mut buf = vec![0; SMALL];
    let mut next = offsets();
    bencher
        .counter(BytesCount::new(1000 * SMALL))
        .bench_local(|| {
            for _ in 0..1000 {
                image.read(next(), &mut buf).unwrap();
            }
        });
}

/// Each sample writes a disk that is as it was made.
#[divan::bench(args = KINDS, sample_count = 5, sample_size = 1)]
fn sequential_write(bencher: Bencher<'_, '_>, kind: Kind) {
    let buf = vec![3; LARGE];
    bencher
        .counter(BytesCount::new(SIZE))
        .with_inputs(|| disk(kind))
        .bench_local_refs(|image| {
            for at in (0..SIZE).step_by(LARGE) {
                image.write(at, &buf).unwrap();
            }
            image.flush().unwrap();
        });
}

#[divan::bench(args = KINDS, sample_count = 5, sample_size = 1)]
fn random_write(bencher: Bencher<'_, '_>, kind: Kind) {
    let buf = vec![3; SMALL];
    bencher
        .counter(BytesCount::new(1000 * SMALL))
        .with_inputs(|| disk(kind))
        .bench_local_refs(|image| {
            let mut next = offsets();
            for _ in 0..1000 {
                image.write(next(), &buf).unwrap();
            }
            image.flush().unwrap();
        });
}

/// What a request costs apart from its bytes: the plan, as the block engine asks for it.
#[divan::bench(args = KINDS)]
fn plan_read(bencher: Bencher<'_, '_>, kind: Kind) {
    let image = disk(kind);
    let mut next = offsets();
    bencher.bench_local(|| image.plan_read(next(), SMALL as u64).unwrap());
}

/// Kept in the folder of the build, as a hole with 7 MB of tables.
static FRAGMENTED: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("fragmented.qcow2");
    fragmented(&path);
    path
});

fn storage() -> Arc<dyn Storage> {
    let file = std::fs::File::open(&*FRAGMENTED).unwrap();
    Arc::new(FileStorage::new(file))
}

fn open() -> Image {
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::new(Format::Qcow2)
    };
    Image::open_over(&FRAGMENTED, storage(), &options, None).unwrap()
}

#[divan::bench]
fn fragmented_open() -> Image {
    open()
}

#[divan::bench(sample_count = 5, sample_size = 1)]
fn fragmented_map() -> u64 {
    let image = open();
    let mut entries = 0;
    let mut count = |_| {
        entries += 1;
        Ok(())
    };
    image.map(0, image.size(), &mut count).unwrap();
    entries
}

#[divan::bench(sample_count = 5, sample_size = 1)]
fn fragmented_check() {
    let report = check(&FRAGMENTED, storage(), &CheckOptions::default()).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

/// Cold: the image is opened for it. What it made is deleted before the next one.
#[divan::bench(sample_count = 5, sample_size = 1)]
fn fragmented_snapshot(bencher: Bencher<'_, '_>) {
    let open = || {
        let mut file = std::fs::File::options();
        let file = file.read(true).write(true).open(&*FRAGMENTED);
        let storage = FileStorage::without_sync(file.unwrap());
        let options = OpenOptions::new(Format::Qcow2);
        Image::open_over(&FRAGMENTED, Arc::new(storage), &options, None).unwrap()
    };
    let delete = || {
        let image = open();
        for snapshot in image.snapshots().unwrap() {
            image.delete_snapshot(&Selector::Id(snapshot.id)).unwrap();
        }
    };
    let snapshot = NewSnapshot::new("one");
    let create = |()| open().create_snapshot(&snapshot).unwrap();
    bencher.with_inputs(delete).bench_local_values(create);
    delete();
}

/// 4 KiB here and there: nearly each needs another L2 slice.
#[divan::bench(sample_count = 5, sample_size = 1)]
fn fragmented_random_read(bencher: Bencher<'_, '_>) {
    let image = open();
    let mut buf = vec![0; SMALL];
    let mut state = 5_u64;
    bencher.bench_local(|| {
        for _ in 0..10_000 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let at = (state >> 20) % (image.size() / SMALL as u64) * SMALL as u64;
            image.read(at, &mut buf).unwrap();
        }
    });
}
