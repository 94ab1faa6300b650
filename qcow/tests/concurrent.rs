//! Requests from several threads at once, and what pins keep from happening.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cowshed_qcow::{
    CreateOptions, DataFile, Extent, FileStorage, Format, Image, NewSnapshot, OpenOptions, Plan,
    Preallocation, ResizeOptions, Selector, Storage, create,
};
use support::check::check;
use support::model::{SECTOR, content};
use support::storages::YieldingStorage;
use support::{Random, base, cached};

const NAME: &str = "concurrent.qcow2";

fn image(storage: Arc<dyn Storage>, options: &CreateOptions, base: Option<Image>) -> Image {
    let options = CreateOptions {
        backing: base.as_ref().map(|_| ("base".into(), Format::Raw)),
        ..options.clone()
    };
    create(Path::new(NAME), storage.clone(), &options).unwrap();
    let options = OpenOptions {
        data_file: options.data_file.map(|file| file.storage),
        ..cached(64 << 10)
    };
    Image::open_over(Path::new(NAME), storage, &options, base).unwrap()
}

fn clusters(cluster_size: u32) -> CreateOptions {
    CreateOptions {
        cluster_size,
        ..CreateOptions::new(1 << 20)
    }
}

/// Subclusters of a KiB.
fn subclusters() -> CreateOptions {
    CreateOptions {
        extended_l2: true,
        ..clusters(32 << 10)
    }
}

/// The same with a data file.
fn external(options: CreateOptions) -> CreateOptions {
    let data_file = Some(DataFile {
        name: "data".into(),
        raw: false,
        storage: Arc::new(YieldingStorage::default()),
    });
    CreateOptions {
        data_file,
        ..options
    }
}

/// Threads that own every fourth sector each, so that they meet in every cluster.
#[test]
fn writers_of_one_cluster_do_not_disturb_each_other() {
    const THREADS: usize = 4;
    for options in [
        clusters(4096),
        clusters(65536),
        subclusters(),
        external(clusters(65536)),
        external(subclusters()),
    ] {
        let storage = Arc::new(YieldingStorage::default());
        let bytes: Vec<u8> = (0..900_000_u32).map(|i| (i / 512) as u8 | 1).collect();
        let disk = image(storage.clone(), &options, Some(base(bytes)));
        let before = content(&disk);
        let models: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let (disk, before) = (&disk, &before);
            let threads = (0..THREADS).map(|thread| {
                scope.spawn(move || {
                    let mut model = before.clone();
                    let mut random = Random(thread as u64);
                    for i in 0..1500 {
                        let sectors = model.len() / SECTOR / THREADS;
                        let sector = random.below(sectors as u64) as usize * THREADS + thread;
                        let at = sector * SECTOR;
                        let place = &mut model[at..at + SECTOR];
                        match random.below(8) {
                            0 => {
                                place.fill(0);
                                disk.write_zeroes(at as u64, SECTOR as u64, i % 2 == 0)
                                    .unwrap();
                            }
                            1 | 2 => {
                                let mut now = [0; SECTOR];
                                disk.read(at as u64, &mut now).unwrap();
                                assert!(now == *place, "thread {thread}, sector {sector}");
                            }
                            3 if i % 16 == 0 => disk.flush().unwrap(),
                            _ => {
                                place.fill(random.next() as u8);
                                disk.write(at as u64, place).unwrap();
                            }
                        }
                    }
                    model
                })
            });
            let threads: Vec<_> = threads.collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        let after = content(&disk);
        for (i, sector) in after.chunks(SECTOR).enumerate() {
            assert!(
                sector == &models[i % THREADS][i * SECTOR..][..SECTOR],
                "sector {i}"
            );
        }
        drop(disk);
        check(&storage.0.to_vec()).assert_clean("in the end");
    }
}

fn place(image: &Image, plan: Plan) -> Option<(u64, cowshed_qcow::Pin)> {
    match plan {
        Plan::Fast { extents, pin } => match extents[..] {
            [
                Extent::File {
                    file: 0, offset, ..
                },
            ] => Some((offset, pin)),
            _ => None,
        },
        Plan::Fill { fill, .. } => {
            image.commit(fill, false).unwrap();
            None
        }
        Plan::Slow => None,
    }
}

#[test]
fn a_pinned_cluster_is_not_reused() {
    let file: File = tempfile::tempfile().unwrap();
    let disk = image(Arc::new(FileStorage::new(file)), &clusters(4096), None);
    let offset_of = |guest| place(&disk, disk.plan_read(guest, 512).unwrap()).map(|(at, _)| at);
    assert_eq!(offset_of(0), None, "nothing is allocated yet");
    disk.write(0, &[1; 8192]).unwrap();
    let (at, pin) = place(&disk, disk.plan_write(0, 4096).unwrap()).expect("allocated: in place");
    assert_eq!(offset_of(0), Some(at));

    // The request that holds the pin is under way when its cluster is given back.
    disk.discard(0, 4096).unwrap();
    assert_eq!(offset_of(0), None);
    disk.flush().unwrap();
    for i in 2..12 {
        disk.write(i * 4096, &[2; 4096]).unwrap();
        assert_ne!(offset_of(i * 4096), Some(at), "reused while pinned");
    }
    drop(pin);
    disk.flush().unwrap();
    disk.write(20 * 4096, &[3; 4096]).unwrap();
    assert_eq!(
        offset_of(20 * 4096),
        Some(at),
        "the lowest free cluster is taken first"
    );

    // Not before a flush either: the old mapping is still the one in the file.
    disk.discard(4096, 4096).unwrap();
    let freed = at + 4096;
    disk.write(21 * 4096, &[4; 4096]).unwrap();
    assert_ne!(offset_of(21 * 4096), Some(freed));
}

#[test]
fn sequential_writes_land_sequentially_and_plans_merge_them() {
    let file: File = tempfile::tempfile().unwrap();
    let disk = image(Arc::new(FileStorage::new(file)), &clusters(4096), None);
    for i in 0..64 {
        disk.write(i * 4096, &[i as u8 + 1; 4096]).unwrap();
    }
    let Plan::Fast { extents, .. } = disk.plan_write(512, 63 * 4096).unwrap() else {
        panic!("all of it is allocated")
    };
    assert_eq!(extents.len(), 1, "{extents:?}");
    assert!(disk.plan_read(1, u64::MAX).is_err());
    let Plan::Fast { extents, .. } = disk.plan_read(63 * 4096, 8192).unwrap() else {
        panic!("nothing is compressed")
    };
    assert!(matches!(
        extents[..],
        [Extent::File { .. }, Extent::Zero { len: 4096 }]
    ));
}

/// A write that ends in a new subcluster does not carry the old bytes of an allocated one along:
/// somebody may be writing there.
#[test]
fn a_new_subcluster_leaves_its_neighbour_alone() {
    const SUBCLUSTER: u64 = 1024;
    let disk = image(
        Arc::new(YieldingStorage::default()),
        &subclusters(),
        Some(base(vec![1; 1 << 20])),
    );
    for at in (0..disk.size()).step_by(2 * SUBCLUSTER as usize) {
        disk.write(at, &[2; SUBCLUSTER as usize]).unwrap();
        std::thread::scope(|scope| {
            let disk = &disk;
            scope.spawn(move || disk.write(at + 512, &[3; SUBCLUSTER as usize]).unwrap());
            for value in 0..8 {
                disk.write(at, &[value; 512]).unwrap();
                let mut now = [0; 512];
                disk.read(at, &mut now).unwrap();
                assert!(now == [value; 512], "at {at:#x}");
            }
        });
        let mut now = [0; 2048];
        disk.read(at, &mut now).unwrap();
        assert_eq!(now[511..513], [7, 3], "at {at:#x}");
        assert_eq!(now[1535..1537], [3, 1], "at {at:#x}");
    }
}

/// What must have the image alone, one after the other, while other threads write: each writer's
/// clusters are what it wrote, the bitmap has all of them, and no cluster is lost.
#[test]
fn sizes_snapshots_and_bitmaps_change_among_requests() {
    const WRITERS: u64 = 3;
    const CLUSTER: u64 = 4096;
    const SIZE: u64 = 96 * CLUSTER;
    let storage = Arc::new(YieldingStorage::default());
    let options = CreateOptions {
        cluster_size: CLUSTER as u32,
        ..CreateOptions::new(SIZE)
    };
    let disk = image(storage.clone(), &options, None);
    disk.add_bitmap("all", Some(512), true).unwrap();
    let ended = AtomicBool::new(false);
    let model = std::thread::scope(|scope| {
        let (disk, ended) = (&disk, &ended);
        let writer = |thread: u64| {
            let mut random = Random(thread);
            let mut own = BTreeMap::new();
            while !ended.load(Ordering::Relaxed) || own.len() < 20 {
                let at = (random.below(SIZE / CLUSTER / WRITERS) * WRITERS + thread) * CLUSTER;
                let byte = 1 + random.below(255) as u8;
                match random.below(6) {
                    0 => {
                        disk.write_zeroes(at, CLUSTER, byte.is_multiple_of(2))
                            .unwrap();
                        own.insert(at, 0);
                    }
                    1 => disk.flush().unwrap(),
                    _ => {
                        disk.write(at, &[byte; CLUSTER as usize]).unwrap();
                        own.insert(at, byte);
                    }
                }
                for (at, byte) in own.iter().take(3) {
                    let mut now = [0xee; CLUSTER as usize];
                    disk.read(*at, &mut now).unwrap();
                    assert!(now == [*byte; CLUSTER as usize], "at {at:#x}");
                }
            }
            own
        };
        let writers = (0..WRITERS).map(|thread| scope.spawn(move || writer(thread)));
        let writers: Vec<_> = writers.collect();
        let mut random = Random(99);
        for i in 0..60_u64 {
            let name = format!("{i}");
            let resize = |size| {
                let shrink = true;
                let preallocation = [Preallocation::Off, Preallocation::Metadata][i as usize % 2];
                disk.resize(
                    size,
                    &ResizeOptions {
                        shrink,
                        preallocation,
                    },
                )
            };
            match random.below(4) {
                0 => {
                    resize(SIZE + random.below(900) * 512).unwrap();
                    resize(SIZE).unwrap();
                }
                1 => {
                    disk.create_snapshot(&NewSnapshot::new(&*name)).unwrap();
                    resize(SIZE + CLUSTER).unwrap();
                    disk.delete_snapshot(&Selector::Name(name)).unwrap();
                    resize(SIZE).unwrap();
                }
                2 => {
                    disk.add_bitmap(&name, None, true).unwrap();
                    disk.merge_bitmap("all", &name).unwrap();
                    disk.remove_bitmap(&name).unwrap();
                }
                _ => disk.store_bitmaps().unwrap(),
            }
        }
        ended.store(true, Ordering::Relaxed);
        let own = writers
            .into_iter()
            .flat_map(|thread| thread.join().unwrap());
        own.collect::<BTreeMap<u64, u8>>()
    });
    let marked = disk.dirty_ranges("all", 0..SIZE).unwrap();
    for (at, cluster) in (0..)
        .step_by(CLUSTER as usize)
        .zip(content(&disk).chunks(CLUSTER as usize))
    {
        let byte = model.get(&at).copied();
        assert!(
            cluster.iter().all(|b| *b == byte.unwrap_or(0)),
            "at {at:#x}"
        );
        let covered = marked.iter().any(|range| range.contains(&at));
        assert!(covered || byte.unwrap_or(0) == 0, "{at:#x} is not marked");
    }
    disk.close().unwrap();
    check(&storage.0.to_vec()).assert_clean("in the end");
}
