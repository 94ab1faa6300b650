//! An image with snapshots, and beside it what its disk and each snapshot must have.

use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{
    CreateOptions, FileStorage, Format, Image, MemoryStorage, NewSnapshot, OpenOptions, Secret,
    Selector, Storage, create,
};

use super::Random;
use super::check::check;
use super::model::{Op, Ops, content, mirror, perform};

pub const NAME: &str = "disk";

pub fn options() -> OpenOptions {
    OpenOptions::new(Format::Qcow2)
}

/// With the password "moo" if the image has one.
pub fn options_of(storage: &dyn Storage) -> OpenOptions {
    let mut method = [0; 4];
    storage.read_at(32, &mut method).unwrap();
    let encrypted = method != [0; 4];
    OpenOptions {
        secrets: encrypted
            .then(|| Secret::new("moo".into()))
            .into_iter()
            .collect(),
        ..options()
    }
}

fn base(len: usize) -> Option<Image> {
    (len > 0).then(|| super::base(vec![0x77; len]))
}

/// An image in memory with what its disk and its snapshots must have.
pub struct Lab {
    pub storage: Arc<dyn Storage>,
    pub image: Image,
    pub base_len: usize,
    pub disk: Vec<u8>,
    /// By ID.
    pub snapshots: Vec<(String, Vec<u8>)>,
}

impl Lab {
    pub fn new(storage: Arc<dyn Storage>, base_len: usize) -> Self {
        let image = Image::open_over(
            Path::new(NAME),
            storage.clone(),
            &options_of(&*storage),
            base(base_len),
        );
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

    pub fn op(&mut self, op: &Op) {
        perform(&self.image, op).unwrap();
        mirror(&mut self.disk, &self.image, op);
    }

    pub fn take(&mut self) {
        let name = format!("s{}", self.snapshots.len());
        let made = self.image.create_snapshot(&NewSnapshot::new(name)).unwrap();
        self.snapshots.push((made.id, self.disk.clone()));
    }

    pub fn apply(&mut self, index: usize) {
        let (id, disk) = &self.snapshots[index];
        self.image
            .apply_snapshot(&Selector::Id(id.clone()))
            .unwrap();
        self.disk.clone_from(disk);
        assert_eq!(self.image.size(), disk.len() as u64);
    }

    pub fn delete(&mut self, index: usize) {
        let (id, _) = self.snapshots.remove(index);
        self.image.delete_snapshot(&Selector::Id(id)).unwrap();
    }

    /// Everything reads as it should, through a fresh image too; no cluster is lost or shared by
    /// mistake.
    pub fn verify(&self) {
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

    pub fn reopen(&mut self) {
        self.image.flush().unwrap();
        let base = base(self.base_len);
        let image = Image::open_over(
            Path::new(NAME),
            self.storage.clone(),
            &options_of(&*self.storage),
            base,
        );
        self.image = image.unwrap();
    }
}

pub fn at(storage: &Arc<dyn Storage>, snapshot: Selector, base_len: usize) -> Image {
    let options = OpenOptions {
        read_only: true,
        snapshot: Some(snapshot),
        ..options_of(&**storage)
    };
    Image::open_over(Path::new(NAME), storage.clone(), &options, base(base_len)).unwrap()
}

pub fn bytes_of(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; storage.len().unwrap() as usize];
    storage.read_at(0, &mut bytes).unwrap();
    bytes
}

/// What is wrong with an image beside leaks, and COPIED that is clear at refcount one: what a crash
/// or a failure in a snapshot operation may leave.
pub fn corruptions(bytes: &[u8]) -> Vec<String> {
    let mut found = check(bytes).corruptions;
    found.retain(|corruption| !corruption.ends_with("COPIED is 0 at 1"));
    found
}

pub fn assert_sound(storage: &dyn Storage) {
    check(&bytes_of(storage)).assert_clean("@@");
}

pub fn new_image(size: u64, cluster_size: u32, refcount_bits: u32, base_len: usize) -> Lab {
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
pub fn requests(lab: &Lab, seed: u64, refcount_bits: u32) -> Ops {
    let mut ops = Ops::new(seed, lab.image.size(), lab.image.cluster_size().into());
    ops.compressed = refcount_bits > 4;
    ops
}

/// What there is at one moment, and how long the log of changes is then.
#[derive(Clone)]
pub struct Moment {
    pub position: usize,
    pub disk: Vec<u8>,
    pub snapshots: Vec<(String, Vec<u8>)>,
}

/// Whether the image in `bytes` is what it was at one of two moments: its disk at either of them,
/// its snapshots at either of them.
pub fn assert_between(bytes: Vec<u8>, base_len: usize, moments: [&Moment; 2], what: &str) -> Lab {
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

/// An image that a crash or a failure left goes on as if nothing had been.
pub fn go_on(lab: &mut Lab, ops: &mut Ops, random: &mut Random, what: &str) {
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

pub fn file(folder: &Path) -> Arc<dyn Storage> {
    let mut options = std::fs::OpenOptions::new();
    let file = options.read(true).write(true).open(folder.join(NAME));
    Arc::new(FileStorage::new(file.unwrap()))
}

/// Cuts the extra data of an image's snapshots to so many bytes each: what old programs wrote says
/// less than what QEMU writes.
pub fn cut_extra_data(path: &Path, lens: &[usize]) {
    let mut bytes = std::fs::read(path).unwrap();
    let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    let (mut at, mut entries) = (table, Vec::new());
    for &len in lens {
        let number = |at: usize| usize::from(bytes[at]) << 8 | usize::from(bytes[at + 1]);
        let extra = number(at + 38);
        assert!(extra >= len);
        let text = at + 40 + extra;
        let end = text + number(at + 12) + number(at + 14);
        entries.extend(&bytes[at..at + 36]);
        entries.extend((len as u32).to_be_bytes());
        entries.extend(&bytes[at + 40..at + 40 + len]);
        entries.extend(&bytes[text..end]);
        entries.resize(entries.len().next_multiple_of(8), 0);
        at = end.next_multiple_of(8);
    }
    bytes[table..table + entries.len()].copy_from_slice(&entries);
    std::fs::write(path, bytes).unwrap();
}
