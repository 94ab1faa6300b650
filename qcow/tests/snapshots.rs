//! Internal snapshots: each keeps the disk as it was, whoever made it and whatever happens beside.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use cowshed_qcow::{
    CreateOptions, FileStorage, Format, Image, MemoryStorage, NewSnapshot, OpenOptions, Selector,
    Storage, create,
};
use support::check::check;
use support::model::{Op, Ops, content, mirror, perform};
use support::storages::{Change, CrashStorage, FaultStorage, YieldingStorage, apply, tear};
use support::{Random, have_qemu, qemu_content, qemu_img, qemu_io};

const NAME: &str = "disk";

fn options() -> OpenOptions {
    OpenOptions::new(Format::Qcow2)
}

fn base(len: usize) -> Option<Image> {
    let raw = OpenOptions {
        read_only: true,
        ..OpenOptions::new(Format::Raw)
    };
    let storage = Arc::new(MemoryStorage::new(vec![0x77; len]));
    (len > 0).then(|| Image::open_over(Path::new("base"), storage, &raw, None).unwrap())
}

/// An image in memory with what its disk and its snapshots must have.
struct Lab {
    storage: Arc<dyn Storage>,
    image: Image,
    base_len: usize,
    disk: Vec<u8>,
    /// By ID.
    snapshots: Vec<(String, Vec<u8>)>,
}

impl Lab {
    fn new(storage: Arc<dyn Storage>, base_len: usize) -> Self {
        let image = Image::open_over(Path::new(NAME), storage.clone(), &options(), base(base_len));
        let image = image.unwrap();
        let disk = content(&image);
        Lab {
            storage,
            image,
            base_len,
            disk,
            snapshots: Vec::new(),
        }
    }

    fn op(&mut self, op: &Op) {
        perform(&self.image, op).unwrap();
        mirror(&mut self.disk, &self.image, op);
    }

    fn take(&mut self) {
        let name = format!("s{}", self.snapshots.len());
        let made = self.image.create_snapshot(&NewSnapshot::new(name)).unwrap();
        self.snapshots.push((made.id, self.disk.clone()));
    }

    fn apply(&mut self, index: usize) {
        let (id, disk) = &self.snapshots[index];
        self.image
            .apply_snapshot(&Selector::Id(id.clone()))
            .unwrap();
        self.disk.clone_from(disk);
        assert_eq!(self.image.size(), disk.len() as u64);
    }

    fn delete(&mut self, index: usize) {
        let (id, _) = self.snapshots.remove(index);
        self.image.delete_snapshot(&Selector::Id(id)).unwrap();
    }

    /// Everything reads as it should, through a fresh image too; no cluster is lost or shared by
    /// mistake.
    fn verify(&self) {
        assert!(content(&self.image) == self.disk, "the disk");
        self.image.flush().unwrap();
        assert_sound(&*self.storage);
        let listed = self.image.snapshots().unwrap();
        let ids: Vec<_> = listed.iter().map(|snapshot| &snapshot.id).collect();
        assert_eq!(ids, self.snapshots.iter().map(|s| &s.0).collect::<Vec<_>>());
        for (id, disk) in &self.snapshots {
            let id = Selector::Id(id.clone());
            assert!(content(&at(&self.storage, id, self.base_len)) == *disk);
        }
    }

    fn reopen(&mut self) {
        self.image.flush().unwrap();
        let base = base(self.base_len);
        let image = Image::open_over(Path::new(NAME), self.storage.clone(), &options(), base);
        self.image = image.unwrap();
    }
}

fn at(storage: &Arc<dyn Storage>, snapshot: Selector, base_len: usize) -> Image {
    let options = OpenOptions {
        read_only: true,
        snapshot: Some(snapshot),
        ..options()
    };
    Image::open_over(Path::new(NAME), storage.clone(), &options, base(base_len)).unwrap()
}

fn bytes_of(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; storage.len().unwrap() as usize];
    storage.read_at(0, &mut bytes).unwrap();
    bytes
}

/// What is wrong with an image beside leaks, and COPIED that is clear at refcount one: what a crash
/// or a failure in a snapshot operation may leave.
fn corruptions(bytes: &[u8]) -> Vec<String> {
    let mut found = check(bytes).corruptions;
    found.retain(|corruption| !corruption.ends_with("COPIED is 0 at 1"));
    found
}

fn assert_sound(storage: &dyn Storage) {
    let report = check(&bytes_of(storage));
    assert!(
        report.corruptions.is_empty() && report.leaks.is_empty(),
        "{report:?}"
    );
}

fn new_image(size: u64, cluster_size: u32, refcount_bits: u32, base_len: usize) -> Lab {
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions {
        cluster_size,
        refcount_bits,
        backing: (base_len > 0).then(|| ("base".into(), Format::Raw)),
        ..CreateOptions::new(size)
    };
    create(Path::new(NAME), storage.clone(), &options).unwrap();
    Lab::new(storage, base_len)
}

/// Requests; none of them compressed where refcounts are narrow, because many compressed clusters
/// share one host cluster.
fn requests(lab: &Lab, seed: u64, refcount_bits: u32) -> Ops {
    let mut ops = Ops::new(seed, lab.image.size(), lab.image.cluster_size().into());
    ops.compressed = refcount_bits > 4;
    ops
}

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

/// What there is at one moment, and how long the log of changes is then.
#[derive(Clone)]
struct Moment {
    position: usize,
    disk: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
}

/// Whether the image in `bytes` is what it was at one of two moments: its disk at either of them,
/// its snapshots at either of them.
fn assert_between(bytes: Vec<u8>, base_len: usize, moments: [&Moment; 2], what: &str) -> Lab {
    let found = corruptions(&bytes);
    assert!(found.is_empty(), "{what}: {found:?}");
    let mut lab = Lab::new(Arc::new(MemoryStorage::new(bytes)), base_len);
    assert!(
        moments.iter().any(|moment| moment.disk == lab.disk),
        "{what}: the disk"
    );
    let listed = lab.image.snapshots().unwrap();
    for snapshot in listed {
        let disk = content(&at(
            &lab.storage,
            Selector::Id(snapshot.id.clone()),
            base_len,
        ));
        lab.snapshots.push((snapshot.id, disk));
    }
    assert!(
        moments.iter().any(|m| m.snapshots == lab.snapshots),
        "{what}: the snapshots"
    );
    lab
}

fn crash_trial(seed: u64, cluster_size: u32, refcount_bits: u32, base_len: usize) {
    let storage = Arc::new(CrashStorage::default());
    let options = CreateOptions {
        cluster_size,
        refcount_bits,
        backing: (base_len > 0).then(|| ("base".into(), Format::Raw)),
        ..CreateOptions::new(48 << 10)
    };
    create(Path::new(NAME), storage.clone(), &options).unwrap();
    let mut lab = Lab::new(storage.clone(), base_len);
    let mut ops = requests(&lab, seed, refcount_bits);
    let mut random = Random(seed);
    let mut moments = Vec::new();
    for _ in 0..14 {
        (0..random.below(8)).for_each(|_| lab.op(&ops.next()));
        lab.image.flush().unwrap();
        let moment = |lab: &Lab| Moment {
            position: storage.position(),
            disk: lab.disk.clone(),
            snapshots: lab.snapshots.clone(),
        };
        let before = moment(&lab);
        let count = lab.snapshots.len() as u64;
        match random.below(5) {
            2 if count > 0 => lab.apply(random.below(count) as usize),
            3 if count > 0 => lab.delete(random.below(count) as usize),
            _ if count < 4 => lab.take(),
            _ => lab.delete(0),
        }
        moments.push((before, moment(&lab)));
    }
    let log = std::mem::take(&mut *storage.log.lock().unwrap());
    let (mut durable, mut applied) = (Vec::new(), 0);
    for (before, after) in &moments {
        for position in before.position..=after.position {
            let synced = log[..position]
                .iter()
                .rposition(|c| matches!(c, Change::Sync));
            let synced = synced.map_or(0, |i| i + 1);
            log[applied..synced.max(applied)]
                .iter()
                .for_each(|change| apply(&mut durable, change));
            applied = synced.max(applied);
            for variant in 0..5 {
                let mut bytes = durable.clone();
                let pending = &log[applied..position];
                match variant {
                    0 => {}
                    1 => pending.iter().for_each(|change| apply(&mut bytes, change)),
                    _ => tear(&mut bytes, pending, &mut random),
                }
                let what = format!("seed {seed} at {position}, variant {variant}");
                // What has ended is durable.
                let possible = if position == after.position {
                    [after, after]
                } else {
                    [before, after]
                };
                if random.below(200) == 0 && have_qemu() {
                    assert_qemu_repairs(&bytes, base_len, &what);
                }
                let mut lab = assert_between(bytes, base_len, possible, &what);
                if random.below(4) == 0 {
                    go_on(&mut lab, &mut ops, &mut random, &what);
                }
            }
        }
    }
}

/// An image that a crash or a failure left goes on as if nothing had been.
fn go_on(lab: &mut Lab, ops: &mut Ops, random: &mut Random, what: &str) {
    lab.take();
    (0..4).for_each(|_| lab.op(&ops.next()));
    lab.apply(random.below(lab.snapshots.len() as u64) as usize);
    (0..4).for_each(|_| lab.op(&ops.next()));
    lab.delete(random.below(lab.snapshots.len() as u64) as usize);
    assert!(content(&lab.image) == lab.disk, "{what}: goes on wrong");
    lab.image.flush().unwrap();
    let found = check(&bytes_of(&*lab.storage)).corruptions;
    assert!(found.is_empty(), "{what}: goes on wrong: {found:?}");
    for (id, disk) in &lab.snapshots {
        let id = Selector::Id(id.clone());
        assert!(
            content(&at(&lab.storage, id, lab.base_len)) == *disk,
            "{what}"
        );
    }
}

/// QEMU repairs what a crash left, and loses nothing.
fn assert_qemu_repairs(bytes: &[u8], base_len: usize, what: &str) {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("base"), vec![0x77; base_len]).unwrap();
    std::fs::write(folder.join(NAME), bytes).unwrap();
    let before = qemu_content(folder, NAME, "qcow2");
    qemu_img(folder, &["check", "-q", "-r", "all", NAME]);
    assert!(qemu_content(folder, NAME, "qcow2") == before, "{what}");
}

#[test]
fn crash_safe_while_taking_applying_and_deleting() {
    for seed in 0..3 {
        crash_trial(seed, 512, 16, 20 << 10);
    }
    crash_trial(3, 1024, 4, 0);
    crash_trial(4, 2048, 64, 0);
}

/// A disk with two snapshots on a storage that can fail.
fn with_two_snapshots() -> (Arc<FaultStorage>, Lab, Ops) {
    let storage = Arc::new(FaultStorage {
        inner: MemoryStorage::default(),
        left: AtomicI64::new(-1),
        kind: ErrorKind::StorageFull,
    });
    let options = CreateOptions {
        cluster_size: 512,
        ..CreateOptions::new(96 << 10)
    };
    create(Path::new(NAME), storage.clone(), &options).unwrap();
    let mut lab = Lab::new(storage.clone(), 0);
    let mut ops = Ops::new(1, lab.image.size(), 512);
    for _ in 0..2 {
        (0..30).for_each(|_| lab.op(&ops.next()));
        lab.take();
    }
    (0..30).for_each(|_| lab.op(&ops.next()));
    (storage, lab, ops)
}

/// What an image says it has.
fn moment(lab: &Lab) -> Moment {
    let listed = lab.image.snapshots().unwrap().into_iter();
    let with_disk = |id: String| {
        let disk = content(&at(&lab.storage, Selector::Id(id.clone()), 0));
        (id, disk)
    };
    Moment {
        position: 0,
        disk: content(&lab.image),
        snapshots: listed.map(|snapshot| with_disk(snapshot.id)).collect(),
    }
}

/// Each call of the storage in an operation fails once: an error, and everything is as it was or
/// as it was to be.
fn fault_trial(operation: &dyn Fn(&Image) -> cowshed_qcow::Result<()>) {
    let (_, lab, _) = with_two_snapshots();
    let before = moment(&lab);
    operation(&lab.image).unwrap();
    let after = moment(&lab);
    for n in 0.. {
        let (storage, mut lab, mut ops) = with_two_snapshots();
        storage.left.store(n, Ordering::Relaxed);
        let done = operation(&lab.image);
        let untouched = storage.left.swap(-1, Ordering::Relaxed) >= 0;
        assert!(done.is_ok() || !untouched, "{:?}", done.err());
        let what = format!("call {n}");
        let stopped = lab.image.flush().is_err();
        let possible = if done.is_ok() {
            [&after, &after]
        } else {
            [&before, &after]
        };
        let mut again = assert_between(storage.inner.to_vec(), 0, possible, &what);
        let mut random = Random(n as u64);
        if !stopped {
            // It was one failure: the same image goes on.
            let now = moment(&lab);
            assert!(
                now.disk == again.disk && now.snapshots == again.snapshots,
                "{what}"
            );
            (lab.disk, lab.snapshots) = (now.disk, now.snapshots);
            go_on(&mut lab, &mut ops, &mut random, &what);
        }
        go_on(&mut again, &mut ops, &mut random, &what);
        if untouched {
            assert!(n > 10, "only {n} calls");
            return;
        }
    }
}

#[test]
fn every_call_fails_once() {
    fault_trial(&|image| image.create_snapshot(&NewSnapshot::new("x")).map(drop));
    fault_trial(&|image| image.apply_snapshot(&Selector::Id("1".into())));
    fault_trial(&|image| image.delete_snapshot(&Selector::Id("1".into())));
}

fn file(folder: &Path) -> Arc<dyn Storage> {
    let mut options = std::fs::OpenOptions::new();
    let file = options.read(true).write(true).open(folder.join(NAME));
    Arc::new(FileStorage::new(file.unwrap()))
}

/// What QEMU says a snapshot's content is.
fn qemu_snapshot(folder: &Path, id: &str) -> Vec<u8> {
    let id = format!("snapshot.id={id}");
    let args = [
        "convert", "-l", &id, "-f", "qcow2", "-O", "raw", NAME, "s.raw",
    ];
    qemu_img(folder, &args);
    std::fs::read(folder.join("s.raw")).unwrap()
}

fn qemu_agrees(folder: &Path, lab: &Lab) {
    qemu_img(folder, &["check", "-q", "-f", "qcow2", NAME]);
    assert!(qemu_content(folder, NAME, "qcow2") == lab.disk, "the disk");
    for (id, disk) in &lab.snapshots {
        assert!(qemu_snapshot(folder, id) == *disk, "snapshot {id}");
    }
}

/// QEMU takes, applies and deletes among our own; each reads what the other made.
#[test]
fn both_directions_with_qemu() {
    if !have_qemu() {
        return;
    }
    for (seed, how) in [
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=32",
        "cluster_size=64k,refcount_bits=64",
        "cluster_size=1k,compat=0.10",
        "cluster_size=2k,compression_type=zstd",
    ]
    .into_iter()
    .enumerate()
    {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let source: Vec<u8> = (0..256_u32 << 10).map(|i| (i / 3000) as u8).collect();
        std::fs::write(folder.join("source"), source).unwrap();
        let args = ["convert", "-c", "-O", "qcow2", "-o", how, "source", NAME];
        qemu_img(folder, &args);
        qemu_io(folder, NAME, &["write -P 5 1k 39k".into()]);
        let mut lab = Lab::new(file(folder), 0);
        let mut ops = Ops::new(
            seed as u64,
            lab.image.size(),
            lab.image.cluster_size().into(),
        );
        let mut random = Random(seed as u64);
        for step in 0..16 {
            (0..random.below(8)).for_each(|_| lab.op(&ops.next()));
            lab.image.flush().unwrap();
            let count = lab.snapshots.len() as u64;
            let index = random.below(count) as usize;
            match random.below(8) {
                0 | 1 if count < 5 => lab.take(),
                2 if count > 0 => lab.apply(index),
                3 if count > 0 => lab.delete(index),
                4 | 5 if count < 5 => {
                    let name = format!("q{}", random.next());
                    qemu_img(folder, &["snapshot", "-c", &name, NAME]);
                    lab.reopen();
                    let id = lab.image.snapshots().unwrap().pop().unwrap().id;
                    lab.snapshots.push((id, lab.disk.clone()));
                }
                6 if count > 0 => {
                    let (id, disk) = lab.snapshots[index].clone();
                    qemu_img(folder, &["snapshot", "-a", &id, NAME]);
                    lab.disk = disk;
                    lab.reopen();
                }
                7 if count > 0 => {
                    lab.snapshots.remove(index);
                    let name = lab.image.snapshots().unwrap().swap_remove(index).name;
                    qemu_img(folder, &["snapshot", "-d", &name, NAME]);
                    lab.reopen();
                }
                _ => {}
            }
            lab.verify();
            if step % 4 == 3 {
                qemu_agrees(folder, &lab);
            }
        }
    }
}

/// All fields, as QEMU lists them and as we do.
#[test]
fn what_is_listed() {
    let mut lab = new_image(1 << 20, 65536, 16, 0);
    lab.op(&Op::Write {
        offset: 0,
        data: vec![1; 4096],
    });
    let new = NewSnapshot {
        name: "a name, two".into(),
        date: UNIX_EPOCH + Duration::new(1_700_000_000, 5),
        vm_state_size: 0,
        vm_clock: Duration::from_millis(3_723_004),
        icount: Some(77),
    };
    let made = lab.image.create_snapshot(&new).unwrap();
    assert_eq!(made.id, "1");
    assert_eq!(made.disk_size, 1 << 20);
    assert_eq!((made.date, made.vm_clock), (new.date, new.vm_clock));
    assert_eq!((&made.name, made.icount), (&new.name, Some(77)));
    assert_eq!(lab.image.snapshots().unwrap(), std::slice::from_ref(&made));
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(NAME), bytes_of(&*lab.storage)).unwrap();
    let said = qemu_img(folder.path(), &["info", "--output=json", NAME]);
    for part in [
        "\"icount\": 77",
        "\"vm-clock-sec\": 3723",
        "\"vm-clock-nsec\": 4000000",
        "\"name\": \"a name, two\"",
        "\"date-sec\": 1700000000",
        "\"date-nsec\": 5",
        "\"id\": \"1\"",
        "\"vm-state-size\": 0",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    // And QEMU's own.
    qemu_img(folder.path(), &["snapshot", "-c", "theirs", NAME]);
    let theirs = Lab::new(file(folder.path()), 0).image.snapshots().unwrap();
    assert_eq!(theirs[0], made);
    assert_eq!((&*theirs[1].id, &*theirs[1].name), ("2", "theirs"));
    assert_eq!(theirs[1].vm_state_size, 0);
    let age = theirs[1].date.elapsed().unwrap();
    assert!(age < Duration::from_secs(3600), "{age:?}");
}

#[test]
fn which_one_is_meant() {
    let lab = new_image(64 << 10, 512, 16, 0);
    for name in ["2", "twice", "twice", "ok"] {
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
    wrong(Selector::Name("twice".into()), ErrorKind::InvalidInput);
    wrong(Selector::IdOrName("twice".into()), ErrorKind::InvalidInput);
    // An ID comes before a name.
    delete(Selector::IdOrName("2".into())).unwrap();
    assert_eq!(ids(), ["1", "3", "4"]);
    delete(Selector::IdOrName("2".into())).unwrap();
    assert_eq!(ids(), ["3", "4"]);
    delete(Selector::Name("twice".into())).unwrap();
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
                            let _ = image.plan_write(own, CLUSTER as u64).unwrap();
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
