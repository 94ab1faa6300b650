//! Internal snapshots: each keeps the disk as it was, whatever happens beside.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::io::ErrorKind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use cowshed_qcow::{
    CreateOptions, Format, Image, KeyCost, MemoryStorage, NewEncryption, NewSnapshot, OpenOptions,
    Plan, ResizeOptions, Secret, Selector, Storage, create,
};
use support::check::check;
use support::lab::{Lab, NAME, assert_sound, at, bytes_of, file, new_image, requests};
use support::model::{Op, Ops, content};
use support::storages::YieldingStorage;
use support::{Files, Random, have_qemu, qemu_create, qemu_img, qemu_io};

fn random_life(lab: &mut Lab, mut ops: Ops, seed: u64, steps: usize) {
    let mut random = Random(seed ^ 0x5eed);
    for _ in 0..steps {
        for _ in 0..random.below(12) {
            lab.op(&ops.next());
        }
        let count = lab.snapshots.len() as u64;
        match random.below(6) {
            0 | 1 if count < 5 => lab.take(),
            2 if count > 0 => lab.apply(random.below(count) as usize),
            3 | 4 if count > 0 => lab.delete(random.below(count) as usize),
            5 => lab.reopen(),
            _ => {}
        }
        lab.verify();
    }
    while !lab.snapshots.is_empty() {
        lab.delete(0);
    }
    lab.verify();
}

#[test]
fn a_random_life() {
    for (seed, (cluster_size, refcount_bits, base_len)) in [
        (512, 16, 0),
        (512, 8, 40 << 10),
        (1024, 64, 0),
        (4096, 4, 9000),
        (2048, 32, 0),
    ]
    .into_iter()
    .enumerate()
    {
        let mut lab = new_image(128 << 10, cluster_size, refcount_bits, base_len);
        let ops = requests(&lab, seed as u64, refcount_bits);
        random_life(&mut lab, ops, seed as u64, 60);
    }
}

/// Refcounts that wait in memory are in the file when an operation counts there.
#[test]
fn with_lazy_refcounts() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
    let options = CreateOptions {
        cluster_size: 1024,
        lazy_refcounts: true,
        ..CreateOptions::new(256 << 10)
    };
    create(Path::new(NAME), storage.clone(), &options).unwrap();
    for round in 0..8 {
        let mut lab = Lab::new(storage.clone(), 0);
        let mut ops = requests(&lab, round, 16);
        for step in 0..12 {
            (0..9).for_each(|_| lab.op(&ops.next()));
            match step % 4 {
                0 | 1 => lab.take(),
                2 => lab.apply(0),
                _ => lab.delete(0),
            }
        }
        let (disk, snapshots) = (lab.disk, lab.snapshots);
        drop(lab.image);
        assert_sound(&*storage);
        assert!(content(&Lab::new(storage.clone(), 0).image) == disk);
        for (id, disk) in snapshots {
            assert!(content(&at(&storage, Selector::Id(id), 0)) == disk);
        }
    }
}

#[test]
fn with_subclusters() {
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions {
        cluster_size: 16384,
        extended_l2: true,
        ..CreateOptions::new(1 << 20)
    };
    create(Path::new(NAME), storage.clone(), &options).unwrap();
    let mut lab = Lab::new(storage, 0);
    let ops = requests(&lab, 3, 16);
    random_life(&mut lab, ops, 3, 40);
}

#[test]
fn encrypted() {
    let luks = NewEncryption::Luks {
        secret: Secret::new("moo".into()),
        cost: KeyCost::Iterations(1),
    };
    for (seed, encryption) in [luks, NewEncryption::LegacyAes].into_iter().enumerate() {
        let storage = Arc::new(MemoryStorage::default());
        let options = CreateOptions {
            cluster_size: 4096,
            encryption: Some(encryption),
            ..CreateOptions::new(64 << 10)
        };
        create(Path::new(NAME), storage.clone(), &options).unwrap();
        let mut lab = Lab::new(storage, 0);
        let mut ops = requests(&lab, seed as u64, 16);
        ops.compressed = false;
        random_life(&mut lab, ops, seed as u64, 25);
        lab.image.write_vm_state(77, b"a secret").unwrap();
        let mut state = [0; 10];
        lab.image.read_vm_state(76, &mut state).unwrap();
        assert_eq!(&state, b"\0a secret\0");
        lab.image.flush().unwrap();
        let bytes = bytes_of(&*lab.storage);
        assert!(!bytes.windows(8).any(|bytes| bytes == b"a secret"));
    }
}

/// Clusters of a data file have no refcounts.
#[test]
fn a_data_file_has_no_snapshots() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    qemu_create(folder, "data_file=data", NAME, "1M");
    let image = Image::open(
        &folder.join(NAME),
        &support::lab::options(),
        &Files::default(),
    )
    .unwrap();
    let error = image.create_snapshot(&NewSnapshot::new("x")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("data file"), "{error}");
    assert_eq!(image.snapshots().unwrap(), []);
}

#[test]
fn which_one_is_meant() {
    let lab = new_image(64 << 10, 512, 16, 0);
    for name in ["2", "twice", "twice", "twice", "ok"] {
        lab.image.create_snapshot(&NewSnapshot::new(name)).unwrap();
    }
    let ids = || -> Vec<String> {
        let listed = lab.image.snapshots().unwrap();
        listed.into_iter().map(|snapshot| snapshot.id).collect()
    };
    let delete = |selector| lab.image.delete_snapshot(&selector);
    let wrong = |selector, kind| {
        let error = lab.image.apply_snapshot(&selector).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
    };
    wrong(Selector::Name("1".into()), ErrorKind::NotFound);
    wrong(Selector::Id("ok".into()), ErrorKind::NotFound);
    wrong(Selector::IdOrName("no".into()), ErrorKind::NotFound);
    // An ID comes before a name.
    delete(Selector::IdOrName("2".into())).unwrap();
    assert_eq!(ids(), ["1", "3", "4", "5"]);
    delete(Selector::IdOrName("2".into())).unwrap();
    assert_eq!(ids(), ["3", "4", "5"]);
    // The first of several goes.
    delete(Selector::Name("twice".into())).unwrap();
    assert_eq!(ids(), ["4", "5"]);
    delete(Selector::IdOrName("twice".into())).unwrap();
    delete(Selector::Name("ok".into())).unwrap();
    assert_eq!(
        lab.image
            .create_snapshot(&NewSnapshot::new("x"))
            .unwrap()
            .id,
        "1"
    );
    for name in ["", "a\0b", &"x".repeat(256)] {
        let error = lab
            .image
            .create_snapshot(&NewSnapshot::new(name))
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
    lab.image.flush().unwrap();
    assert_sound(&*lab.storage);
}

/// Where a refcount has no room for one more reference nothing changes.
#[test]
fn narrow_refcounts() {
    for (bits, most) in [(1, 0), (2, 2), (4, 14)] {
        let mut lab = new_image(64 << 10, 512, bits, 0);
        let mut ops = requests(&lab, 1, bits);
        (0..20).for_each(|_| lab.op(&ops.next()));
        (0..most).for_each(|_| lab.take());
        lab.verify();
        let before = bytes_of(&*lab.storage);
        let error = lab
            .image
            .create_snapshot(&NewSnapshot::new("x"))
            .unwrap_err();
        assert!(error.to_string().contains("no room"), "{error}");
        assert!(bytes_of(&*lab.storage) == before);
        // Applying needs no more references than there are in the end.
        for index in 0..most {
            lab.apply(index);
            lab.verify();
        }
    }
}

#[test]
fn a_snapshot_opened_is_only_read() {
    let mut lab = new_image(64 << 10, 512, 16, 20 << 10);
    lab.op(&Op::Write {
        offset: 512,
        data: vec![3; 9000],
    });
    lab.take();
    lab.op(&Op::Write {
        offset: 0,
        data: vec![4; 30000],
    });
    lab.image.flush().unwrap();
    let one = || Selector::IdOrName("s0".into());
    let image = at(&lab.storage, one(), lab.base_len);
    assert!(content(&image) == lab.snapshots[0].1);
    assert_eq!(image.snapshots().unwrap(), lab.image.snapshots().unwrap());
    let error = image.write(0, &[0; 512]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem);
    let error = image.delete_snapshot(&one()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem);

    let open = |selector, read_only, format| {
        let options = OpenOptions {
            read_only,
            snapshot: Some(selector),
            ..OpenOptions::new(format)
        };
        let storage = lab.storage.clone();
        Image::open_over(Path::new(NAME), storage, &options, None).unwrap_err()
    };
    let error = open(one(), false, Format::Qcow2);
    assert!(error.to_string().contains("open it read-only"), "{error}");
    let error = open(Selector::Id("9".into()), true, Format::Qcow2);
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let error = open(one(), true, Format::Raw);
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

/// Requests go on in several threads while snapshots are taken, applied and deleted: each snapshot
/// has a state in which every cluster is wholly before or wholly after each write.
#[test]
fn beside_requests_in_flight() {
    const CLUSTER: usize = 4096;
    const CLUSTERS: usize = 24;
    let storage = Arc::new(YieldingStorage::default());
    let options = CreateOptions {
        cluster_size: CLUSTER as u32,
        ..CreateOptions::new((CLUSTER * CLUSTERS) as u64)
    };
    create(Path::new(NAME), storage.clone(), &options).unwrap();
    let mut lab = Lab::new(storage.clone(), 0);
    let ended = AtomicBool::new(false);
    let whole = |disk: &[u8]| {
        for cluster in disk.chunks(CLUSTER) {
            assert!(cluster.iter().all(|b| b == &cluster[0]), "a torn cluster");
        }
    };
    std::thread::scope(|scope| {
        for thread in 0..3_u64 {
            let (image, ended, whole) = (&lab.image, &ended, &whole);
            scope.spawn(move || {
                let mut random = Random(thread);
                while !ended.load(Ordering::Relaxed) {
                    let at = random.below(CLUSTERS as u64) * CLUSTER as u64;
                    // Each thread has clusters of its own to write.
                    let own = (at / CLUSTER as u64 / 3 * 3 + thread) * CLUSTER as u64;
                    match random.below(8) {
                        0..4 => image.write(own, &[random.next() as u8; CLUSTER]).unwrap(),
                        4 => image.discard(own, CLUSTER as u64).unwrap(),
                        5 => image.flush().unwrap(),
                        _ => {
                            let mut bytes = vec![0; CLUSTER];
                            match image.plan_write(own, CLUSTER as u64).unwrap() {
                                Plan::Fill { fill, .. } => image.commit(fill, false).unwrap(),
                                Plan::Fast { .. } | Plan::Slow => {}
                            }
                            image.read(own, &mut bytes).unwrap();
                            whole(&bytes);
                        }
                    }
                }
            });
        }
        let mut random = Random(9);
        let mut taken: Vec<(String, Vec<u8>)> = Vec::new();
        for i in 0..60 {
            let index = random.below(taken.len() as u64) as usize;
            if taken.len() < 3 {
                let new = NewSnapshot::new(format!("{i}"));
                let id = lab.image.create_snapshot(&new).unwrap().id;
                let disk = content(&at(&lab.storage, Selector::Id(id.clone()), 0));
                whole(&disk);
                taken.push((id, disk));
            } else if random.below(2) == 0 {
                let id = Selector::Id(taken[index].0.clone());
                lab.image.apply_snapshot(&id).unwrap();
            } else {
                let (id, _) = taken.swap_remove(index);
                lab.image.delete_snapshot(&Selector::Id(id)).unwrap();
            }
            for (id, disk) in &taken {
                let now = content(&at(&lab.storage, Selector::Id(id.clone()), 0));
                assert!(now == *disk, "snapshot {id} changed");
            }
        }
        ended.store(true, Ordering::Relaxed);
    });
    lab.image.flush().unwrap();
    lab.disk = content(&lab.image);
    lab.image.flush().unwrap();
    assert_sound(&*lab.storage);
    let report = check(&storage.0.to_vec());
    assert!(report.leaks.is_empty(), "{report:?}");
}

/// VM state: written in pieces, taken by a snapshot, read from it, applied with it; by us and by
/// QEMU.
#[test]
fn vm_state() {
    for (cluster_size, len) in [(512, 150_001), (4096, 3_000_001), (65536, 1_000_000)] {
        let mut lab = new_image(96 << 10, cluster_size, 16, 40 << 10);
        lab.op(&Op::Write {
            offset: 0,
            data: vec![1; 4096],
        });
        let state: Vec<u8> = (0..len).map(|i| (i / 512) as u8).collect();
        for (i, part) in state.chunks(70_003).enumerate() {
            let offset = i as u64 * 70_003;
            lab.image
                .write_vm_state(offset, &vec![0xee; part.len()])
                .unwrap();
            lab.image.write_vm_state(offset, part).unwrap();
        }
        let read = |image: &Image| {
            let mut found = vec![0xaa; state.len()];
            image.read_vm_state(0, &mut found).unwrap();
            found
        };
        assert!(read(&lab.image) == state);
        lab.verify();
        let new = |vm_state_size| NewSnapshot {
            vm_state_size,
            ..NewSnapshot::new("with state")
        };
        let error = lab.image.create_snapshot(&new(1 << 60)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        let made = lab.image.create_snapshot(&new(state.len() as u64)).unwrap();
        assert_eq!(made.vm_state_size, state.len() as u64);
        lab.snapshots.push((made.id, lab.disk.clone()));
        lab.verify();
        // The snapshot alone has it.
        assert!(read(&at(&lab.storage, Selector::Id("1".into()), lab.base_len)) == state);
        assert!(read(&lab.image).iter().all(|&byte| byte == 0));
        lab.op(&Op::Write {
            offset: 512,
            data: vec![2; 30_000],
        });
        lab.take();
        lab.image.write_vm_state(5, b"other").unwrap();
        lab.verify();
        lab.apply(0);
        assert!(read(&lab.image) == state);
        // Shared clusters are copied.
        lab.image.write_vm_state(0, &[9; 1000]).unwrap();
        assert!(read(&lab.image)[1000..] == state[1000..]);
        assert!(read(&at(&lab.storage, Selector::Id("1".into()), lab.base_len)) == state);
        lab.verify();
        if have_qemu() {
            let folder = tempfile::tempdir().unwrap();
            let folder = folder.path();
            std::fs::write(folder.join("base"), vec![0x77; lab.base_len]).unwrap();
            std::fs::write(folder.join(NAME), bytes_of(&*lab.storage)).unwrap();
            qemu_io(folder, NAME, &["read -b -P 9 0 512".into()]);
            qemu_img(folder, &["snapshot", "-a", "1", NAME]);
            qemu_io(folder, NAME, &["read -b -P 0 0 512".into()]);
            qemu_io(folder, NAME, &["read -b -P 3 1536 512".into()]);
            qemu_io(folder, NAME, &["write -b -P 33 512 100k".into()]);
            let theirs = Lab::new(file(folder), lab.base_len);
            let mut expected = state.clone();
            expected[512..512 + (100 << 10)].fill(33);
            assert!(read(&theirs.image) == expected);
            assert!(theirs.disk == lab.snapshots[0].1);
        }
        lab.delete(0);
        lab.delete(0);
        lab.verify();
    }
    let lab = new_image(1 << 20, 512, 16, 0);
    let far = lab.image.write_vm_state(1 << 60, &[1]).unwrap_err();
    assert_eq!(far.kind(), ErrorKind::InvalidInput, "{far}");
}

/// Each snapshot has its size, and applying restores it.
#[test]
fn sizes() {
    let mut lab = new_image(64 << 10, 512, 16, 0);
    let resize = |lab: &mut Lab, size: usize| {
        let options = ResizeOptions {
            shrink: true,
            ..ResizeOptions::default()
        };
        lab.image.resize(size as u64, &options).unwrap();
        lab.disk.resize(size, 0);
        let mut ops = Ops::new(size as u64, size as u64, 512);
        (0..20).for_each(|_| lab.op(&ops.next()));
        lab.verify();
        lab.take();
        lab.verify();
    };
    for size in [64 << 10, 200 << 10, 30 << 10, 512, 90_112] {
        resize(&mut lab, size);
    }
    for index in [0, 3, 1, 4, 2, 0] {
        lab.apply(index);
        lab.verify();
        lab.op(&Op::Write {
            offset: 0,
            data: vec![index as u8; 512],
        });
    }
    while !lab.snapshots.is_empty() {
        lab.delete(lab.snapshots.len() / 2);
        lab.verify();
    }
}

/// Memory in which one read of another thread begins while the first sync runs that is watched for,
/// and goes on only after the header was written.
#[derive(Default)]
struct Meeting {
    inner: MemoryStorage,
    now: Mutex<Phase>,
    changed: Condvar,
}

#[derive(Clone, Copy, Default, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    #[default]
    Unwatched,
    Watched,
    SyncWaits,
    ReadWaits,
    HeaderWritten,
}

impl Meeting {
    fn enter(&self, phase: Phase) {
        *self.now.lock().unwrap() = phase;
        self.changed.notify_all();
    }

    fn wait_for(&self, phase: Phase) {
        let now = self.now.lock().unwrap();
        drop(self.changed.wait_while(now, |now| *now < phase).unwrap());
    }

    fn is_in(&self, phase: Phase) -> bool {
        *self.now.lock().unwrap() == phase
    }
}

impl Storage for Meeting {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        if buf.len() == 4096 && self.is_in(Phase::SyncWaits) {
            self.enter(Phase::ReadWaits);
            self.wait_for(Phase::HeaderWritten);
            (0..1000).for_each(|_| std::thread::yield_now());
        }
        self.inner.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> std::io::Result<()> {
        self.inner.write_at(offset, buf)?;
        if offset == 0 && self.is_in(Phase::ReadWaits) {
            self.enter(Phase::HeaderWritten);
        }
        Ok(())
    }
    fn zero(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.inner.zero(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.inner.punch(offset, len)
    }
    fn sync(&self) -> std::io::Result<()> {
        if self.is_in(Phase::Watched) {
            self.enter(Phase::SyncWaits);
            self.wait_for(Phase::ReadWaits);
        }
        self.inner.sync()
    }
    fn len(&self) -> std::io::Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.inner.set_len(len)
    }
}

/// A read that began before a snapshot was applied gets what was there, however long it takes.
#[test]
fn a_read_in_flight_while_a_snapshot_is_applied() {
    let storage = Arc::new(Meeting::default());
    let options = CreateOptions {
        cluster_size: 4096,
        ..CreateOptions::new(64 << 10)
    };
    create(Path::new(NAME), storage.clone(), &options).unwrap();
    let mut lab = Lab::new(storage.clone(), 0);
    let write = |byte| Op::Write {
        offset: 8192,
        data: vec![byte; 4096],
    };
    lab.op(&write(1));
    lab.take();
    lab.op(&write(2));
    assert!(content(&lab.image) == lab.disk);
    storage.enter(Phase::Watched);
    std::thread::scope(|scope| {
        let read = scope.spawn(|| {
            storage.wait_for(Phase::SyncWaits);
            let mut bytes = vec![0; 4096];
            lab.image.read(8192, &mut bytes).unwrap();
            bytes
        });
        lab.image.apply_snapshot(&Selector::Id("1".into())).unwrap();
        assert!(read.join().unwrap() == [2; 4096]);
    });
    lab.disk = lab.snapshots[0].1.clone();
    lab.verify();
}
