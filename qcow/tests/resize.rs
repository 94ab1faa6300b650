//! Disks that grow and shrink among other requests, with crashes, faults and QEMU's tools.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{
    CreateOptions, Error, Format, Image, MemoryStorage, OpenOptions, Preallocation, ResizeOptions,
    Storage, create,
};
use support::check::check;
use support::crash::{CrashStorage, crashes};
use support::model::{Ops, SECTOR, content, mirror, perform};
use support::storages::FaultStorage;
use support::{
    Random, cached, have_qemu, open_file, qemu_content, qemu_create, qemu_img, qemu_io,
    striped_base,
};

const NAME: &str = "resize.qcow2";
const SHRINK: ResizeOptions = ResizeOptions {
    shrink: true,
    preallocation: Preallocation::Off,
};

fn open(path: &Path) -> Image {
    open_file(path, &cached(4 << 10))
}

/// Random requests and sizes; what the disk must read as afterwards.
fn exercise(image: &Image, seed: u64, count: usize, most: u64) -> Vec<u8> {
    let mut model = content(image);
    let mut random = Random(seed);
    let mut ops = Ops::new(seed, image.size(), image.cluster_size().into());
    for i in 0..count {
        if i % 12 == 5 {
            let size = (1 + random.below(most / SECTOR as u64)) * SECTOR as u64;
            image.resize(size, &SHRINK).unwrap();
            model.resize(size as usize, 0);
            ops.size = size;
        }
        let op = ops.next();
        perform(image, &op).unwrap();
        mirror(&mut model, image, &op);
        assert!(content(image) == model, "seed {seed}: after {i} requests");
    }
    model
}

#[test]
fn model() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let base: Vec<u8> = (0..400_001_u32).map(|i| (i / 100) as u8 | 1).collect();
    std::fs::write(folder.join("base.raw"), &base).unwrap();
    let over = ["-b", "base.raw", "-F", "raw"];
    let trials: [(&str, &[&str]); 6] = [
        ("cluster_size=512", &[]),
        ("cluster_size=512", &over),
        ("cluster_size=4k,refcount_bits=1", &over),
        ("cluster_size=64k", &over),
        ("cluster_size=1k,compat=0.10", &[]),
        ("cluster_size=512,refcount_bits=64", &over),
    ];
    for (seed, (options, backing)) in trials.into_iter().enumerate() {
        let name = format!("{seed}");
        let create = ["create", "-q", "-f", "qcow2", "-o", options];
        qemu_img(folder, &[&create, backing, &[&name, "300k"]].concat());
        let image = open(&folder.join(&name));
        let model = exercise(&image, seed as u64, 180, 900 << 10);
        drop(image);
        assert!(content(&open(&folder.join(&name))) == model, "{name}");
        check(&std::fs::read(folder.join(&name)).unwrap()).assert_clean(&name);
        qemu_img(folder, &["check", "-q", "-f", "qcow2", &name]);
        assert!(qemu_content(folder, &name, "qcow2") == model, "{name}");
    }
    assert_eq!(std::fs::read(folder.join("base.raw")).unwrap(), base);
}

/// Internal snapshots share tables and clusters with the active disk; they keep their own size.
#[test]
fn beside_snapshots() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (seed, cluster) in ["512", "4k", "64k"].into_iter().enumerate() {
        let options = format!("cluster_size={cluster}");
        qemu_create(folder, &options, "disk", "600k");
        qemu_io(
            folder,
            "disk",
            &["write -P 5 0 600k".into(), "write -z 64k 64k".into()],
        );
        let before = qemu_content(folder, "disk", "qcow2");
        qemu_img(folder, &["snapshot", "-c", "one", "disk"]);
        let image = open(&folder.join("disk"));
        image.resize(100 << 10, &SHRINK).unwrap();
        let model = exercise(&image, seed as u64, 80, 900 << 10);
        drop(image);
        check(&std::fs::read(folder.join("disk")).unwrap()).assert_clean(cluster);
        qemu_img(folder, &["check", "-q", "-f", "qcow2", "disk"]);
        assert!(qemu_content(folder, "disk", "qcow2") == model);
        qemu_img(folder, &["snapshot", "-a", "one", "disk"]);
        assert!(qemu_content(folder, "disk", "qcow2") == before, "{cluster}");
        qemu_img(folder, &["snapshot", "-d", "one", "disk"]);
        qemu_img(folder, &["check", "-q", "-f", "qcow2", "disk"]);
    }
    qemu_create(folder, "compat=0.10", "old", "1M");
    qemu_img(folder, &["snapshot", "-c", "one", "old"]);
    let error = open(&folder.join("old"))
        .resize(2 << 20, &SHRINK)
        .unwrap_err();
    assert!(matches!(error, Error::Change { .. }), "{error}");
}

/// Sizes that QEMU set hold for us, and the other way round, between writes of both.
#[test]
fn in_turns_with_qemu() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut random = Random(11);
    qemu_create(folder, "cluster_size=1k", "disk", "100k");
    let mut model = vec![0; 100 << 10];
    for i in 1..24_u8 {
        // Multiples of a cluster: QEMU leaves what lies past another end as it was.
        let size = (1 + random.below(500)) << 10;
        if i % 2 == 0 {
            qemu_img(
                folder,
                &[
                    "resize",
                    "-q",
                    "--shrink",
                    "-f",
                    "qcow2",
                    "disk",
                    &size.to_string(),
                ],
            );
        } else {
            open(&folder.join("disk")).resize(size, &SHRINK).unwrap();
        }
        model.resize(size as usize, 0);
        let at = random.below(size / 512) * 512;
        let len = (1 + random.below(20)) * 512;
        let len = len.min(size - at);
        if i % 3 == 0 {
            qemu_io(folder, "disk", &[format!("write -P {i} {at} {len}")]);
        } else {
            open(&folder.join("disk"))
                .write(at, &vec![i; len as usize])
                .unwrap();
        }
        model[at as usize..][..len as usize].fill(i);
        assert!(content(&open(&folder.join("disk"))) == model, "round {i}");
        assert!(qemu_content(folder, "disk", "qcow2") == model, "round {i}");
        qemu_img(folder, &["check", "-q", "-f", "qcow2", "disk"]);
        check(&std::fs::read(folder.join("disk")).unwrap()).assert_clean("disk");
    }
}

/// A disk beyond what its L1 table reaches: the table moves, and with small clusters so do others.
#[test]
fn growing_by_far() {
    let storage = Arc::new(MemoryStorage::default());
    let create_options = CreateOptions {
        cluster_size: 512,
        ..CreateOptions::new(64 << 10)
    };
    create(Path::new(NAME), storage.clone(), &create_options).unwrap();
    let image = Image::open_over(Path::new(NAME), storage.clone(), &cached(4 << 10), None).unwrap();
    image.write(0, &[1; 64 << 10]).unwrap();
    let most = 4_u64 << 20 << 15; // 32 MiB of L1 table
    for size in [1 << 20, 1 << 30, most] {
        image.resize(size, &ResizeOptions::default()).unwrap();
        image.write(size - 512, &[2; 512]).unwrap();
        let mut read = vec![0; 1024];
        image.read(size - 1024, &mut read).unwrap();
        assert_eq!(read, [[0; 512], [2; 512]].concat());
    }
    let error = image.resize(most + 512, &SHRINK).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    image.resize(512, &SHRINK).unwrap();
    assert_eq!(content(&image), [1; 512]);
    drop(image);
    check(&storage.to_vec()).assert_clean("grown");
}

/// What a disk gains has its place, and is written there.
#[test]
fn preallocated() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("base.raw"), vec![7; 3 << 20]).unwrap();
    let over = ["-b", "base.raw", "-F", "raw"];
    let trials: [(&str, &[&str]); 5] = [
        ("cluster_size=4k", &[]),
        ("cluster_size=64k", &over),
        ("extended_l2=on", &[]),
        ("extended_l2=on", &over),
        ("cluster_size=512,compat=0.10", &over),
    ];
    let (old, new) = (900_u64 << 10, 4_u64 << 20);
    for (i, (options, backing)) in trials.into_iter().enumerate() {
        for mode in [
            Preallocation::Metadata,
            Preallocation::Falloc,
            Preallocation::Full,
        ] {
            let name = format!("{i}-{mode:?}");
            let create = ["create", "-q", "-f", "qcow2", "-o", options];
            qemu_img(
                folder,
                &[&create, backing, &[&name, &old.to_string()]].concat(),
            );
            let image = open(&folder.join(&name));
            image.write(10_000, &[3; 500_000]).unwrap();
            image.discard(64 << 10, 256 << 10).unwrap(); // Clusters to be used again.
            image.flush().unwrap();
            let mut model = content(&image);
            let resize = ResizeOptions {
                preallocation: mode,
                ..ResizeOptions::default()
            };
            image.resize(new, &resize).unwrap();
            model.resize(new as usize, 0);
            assert!(content(&image) == model, "{name}");
            let len = image.file_len().unwrap();
            if mode != Preallocation::Metadata {
                assert!(image.allocated().unwrap() >= new - old, "{name}");
            }
            image.write(1 << 20, &vec![5; 3 << 20]).unwrap();
            model[1 << 20..].fill(5);
            assert_eq!(image.file_len().unwrap(), len, "{name}: grew");
            drop(image);
            assert!(content(&open(&folder.join(&name))) == model, "{name}");
            qemu_img(folder, &["check", "-q", "-f", "qcow2", &name]);
            assert!(qemu_content(folder, &name, "qcow2") == model, "{name}");
        }
    }
}

#[test]
fn refused_by_name() {
    let storage = Arc::new(MemoryStorage::default());
    let path = Path::new(NAME);
    create(path, storage.clone(), &CreateOptions::new(1 << 20)).unwrap();
    let image = Image::open_over(path, storage.clone(), &cached(4 << 10), None).unwrap();
    for size in [1000, u64::MAX - 511] {
        assert!(image.resize(size, &SHRINK).is_err(), "{size}");
    }
    let error = image.resize(512, &ResizeOptions::default()).unwrap_err();
    assert!(error.to_string().contains("shrinking was not allowed"));
    assert_eq!(image.size(), 1 << 20);
    let read_only = OpenOptions {
        read_only: true,
        ..cached(4 << 10)
    };
    let image = Image::open_over(path, storage, &read_only, None).unwrap();
    let error = image.resize(2 << 20, &SHRINK).unwrap_err();
    assert!(matches!(error, Error::ReadOnly { .. }), "{error}");
}

#[test]
fn raw_files() {
    let storage = Arc::new(MemoryStorage::new(vec![5; 1000]));
    let raw = OpenOptions::new(Format::Raw);
    let image = Image::open_over(Path::new("raw"), storage.clone(), &raw, None).unwrap();
    image.resize(2048, &ResizeOptions::default()).unwrap();
    assert_eq!(content(&image), [vec![5; 1000], vec![0; 1048]].concat());
    image.resize(512, &SHRINK).unwrap();
    assert_eq!((image.size(), storage.to_vec().len()), (512, 512));
}

/// By name: the allocator hands out a live L2 table after an offline resize of an image with
/// compressed clusters. Each cluster that is handed out afterwards must have been free.
#[test]
fn allocator_spares_live_tables_after_an_offline_resize_with_compressed_clusters() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut random = Random(3);
    let source: Vec<u8> = (0..400 << 10)
        .map(|i| (i / 700) as u8 ^ (random.next() % 2) as u8)
        .collect();
    std::fs::write(folder.join("source"), &source).unwrap();
    for (options, ours) in [
        ("cluster_size=512", true),
        ("cluster_size=512", false),
        ("cluster_size=4k", true),
        ("cluster_size=4k,compat=0.10", false),
    ] {
        let args = [
            "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "source", "disk",
        ];
        qemu_img(folder, &args);
        let path = folder.join("disk");
        let mut model = source.clone();
        for size in [900_u64 << 10, 332 << 10, 1300 << 10] {
            if ours {
                open(&path).resize(size, &SHRINK).unwrap();
            } else {
                let size = size.to_string();
                qemu_img(
                    folder,
                    &["resize", "-q", "--shrink", "-f", "qcow2", "disk", &size],
                );
            }
            model.resize(size as usize, 0);
            let image = open(&path);
            // Every other cluster is written: the tables of all must stay what they are.
            for at in (0..size).step_by(8192) {
                image
                    .write(at, &[at as u8 | 1; 3000][..(size - at).min(3000) as usize])
                    .unwrap();
                let part = &mut model[at as usize..];
                let len = part.len().min(3000);
                part[..len].fill(at as u8 | 1);
                if at % (64 << 10) == 0 {
                    image.flush().unwrap();
                    assert!(content(&image) == model, "{options}: at {at:#x}");
                }
            }
            drop(image);
            check(&std::fs::read(&path).unwrap()).assert_clean(options);
            qemu_img(folder, &["check", "-q", "-f", "qcow2", "disk"]);
            assert!(qemu_content(folder, "disk", "qcow2") == model, "{options}");
        }
    }
}

/// A crash anywhere in a resize: one size or the other, and every byte that is in both.
fn crash(cluster_size: u32, base_len: usize, sizes: &[u64], seed: u64) {
    let storage = Arc::new(CrashStorage::default());
    let backing = (base_len > 0).then(|| ("base".into(), Format::Raw));
    let create_options = CreateOptions {
        cluster_size,
        backing,
        ..CreateOptions::new(sizes[0])
    };
    create(Path::new(NAME), storage.clone(), &create_options).unwrap();
    let open = |storage: Arc<dyn Storage>| {
        let base = (base_len > 0).then(|| striped_base(base_len));
        Image::open_over(Path::new(NAME), storage, &cached(4 << 10), base).unwrap()
    };
    let image = open(storage.clone());
    let mut random = Random(seed);
    for pair in sizes.windows(2) {
        let mut ops = Ops::new(random.next(), pair[0], cluster_size.into());
        (0..40).for_each(|_| perform(&image, &ops.next()).unwrap());
        image.flush().unwrap();
        let before = content(&image);
        let from = storage.position();
        let mut how = SHRINK;
        if seed % 2 == 1 {
            how.preallocation = Preallocation::Metadata;
        }
        image.resize(pair[1], &how).unwrap();
        let after = content(&image);
        let mut expected = before.clone();
        expected.resize(pair[1] as usize, 0);
        assert!(after == expected);
        let log = storage.changes();
        crashes(&log, from, 4, &mut random, &mut |position, bytes| {
            check(&bytes).assert_sound(&format!("{position}"));
            let found = content(&open(Arc::new(MemoryStorage::new(bytes))));
            // The tail of a cluster that is cut may be zeros before the size changes.
            let kept = (pair[0].min(pair[1])) as usize;
            assert!(found[..kept] == before[..kept], "{position} of {pair:?}");
            if found.len() > before.len() {
                assert!(found == after, "{position} of {pair:?}");
            }
            assert!(pair.contains(&(found.len() as u64)));
        });
    }
}

#[test]
fn crash_safe() {
    for seed in 0..4 {
        let sizes = [
            40 << 10,
            150 << 10,
            70_000 / 512 * 512,
            30 << 10,
            130_560,
            512,
            60 << 10,
        ];
        crash(512, 0, &sizes, seed);
        crash(1024, 110_000, &sizes, seed);
        crash(4096, 110_000, &sizes, seed);
    }
}

/// Every call of the storage fails once during a resize.
#[test]
fn every_call_fails_once() {
    for (from, to) in [(40_u64 << 10, 200_u64 << 10), (200 << 10, 41_472)] {
        for n in 0.. {
            let storage = FaultStorage::new(Vec::new(), ErrorKind::Other);
            let backing = Some(("base".into(), Format::Raw));
            let create_options = CreateOptions {
                cluster_size: 1024,
                backing,
                ..CreateOptions::new(from)
            };
            create(Path::new(NAME), storage.clone(), &create_options).unwrap();
            let open = || {
                let over = Some(striped_base(100 << 10));
                Image::open_over(Path::new(NAME), storage.clone(), &cached(4 << 10), over).unwrap()
            };
            let image = open();
            image.write(from - 3000, &[9; 3000]).unwrap();
            image.flush().unwrap();
            let before = content(&image);
            storage.fail_after(n);
            let resized = image.resize(to, &SHRINK);
            let untouched = !storage.recover();
            assert!(untouched || resized.is_err() || n > 10, "call {n}");
            drop(image);
            check(&storage.inner.to_vec()).assert_sound(&format!("call {n}"));
            let now = content(&open());
            let kept = from.min(to) as usize;
            assert!(now[..kept] == before[..kept], "call {n}");
            assert!(
                now.get(from as usize..)
                    .is_none_or(|new| new.iter().all(|&b| b == 0))
            );
            assert!([from, to].contains(&(now.len() as u64)));
            if untouched {
                assert_eq!(now.len() as u64, to);
                break;
            }
        }
    }
}
