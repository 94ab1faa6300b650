//! Where a disk's bytes are must be what `qemu-img map` says.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{
    CreateOptions, Format, Image, MapEntry, MemoryStorage, OpenOptions, Storage, create,
};
use serde_json::Value;
use support::{Files, Random, have_qemu, qemu_create, qemu_img, qemu_io};

fn ours(folder: &Path, name: &str, format: Format) -> Vec<MapEntry> {
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::new(format)
    };
    let image = Image::open(&folder.join(name), &options, &Files::default()).unwrap();
    let mut entries = Vec::new();
    image
        .map(0, image.size(), &mut |entry| {
            entries.push(entry);
            Ok(())
        })
        .unwrap();
    entries
}

/// What QEMU says. It does not say before version 8 what is compressed, nor does it name the
/// place of a cluster that is kept for zeros to every question: those two are taken from ours.
fn theirs(folder: &Path, name: &str, format: Format, like: &[MapEntry]) -> Vec<MapEntry> {
    let args = ["map", "--output=json", "-f", format.name(), name];
    let map: Value = serde_json::from_str(&qemu_img(folder, &args)).unwrap();
    let entries = map.as_array().unwrap().iter().map(|entry| {
        let start = entry["start"].as_u64().unwrap();
        let same = like.iter().find(|like| like.start == start);
        let zero = entry["zero"].as_bool().unwrap();
        let offset = entry["offset"].as_u64();
        MapEntry {
            start,
            len: entry["length"].as_u64().unwrap(),
            depth: entry["depth"].as_u64().unwrap() as usize,
            present: entry["present"].as_bool().unwrap(),
            zero,
            data: entry["data"].as_bool().unwrap(),
            compressed: entry["compressed"]
                .as_bool()
                .unwrap_or_else(|| same.is_some_and(|like| like.compressed)),
            offset: if zero {
                same.and_then(|like| like.offset)
            } else {
                offset
            },
        }
    });
    join(entries)
}

/// Joins neighbours that differ in nothing that is compared.
fn join(entries: impl Iterator<Item = MapEntry>) -> Vec<MapEntry> {
    let mut joined: Vec<MapEntry> = Vec::new();
    for entry in entries {
        match joined.last_mut() {
            Some(last)
                if last.zero
                    && MapEntry {
                        start: entry.start,
                        len: entry.len,
                        offset: entry.offset,
                        ..*last
                    } == entry =>
            {
                last.len += entry.len;
            }
            _ => joined.push(entry),
        }
    }
    joined
}

fn assert_agree(folder: &Path, name: &str, format: Format) {
    let ours = join(ours(folder, name, format).into_iter());
    let theirs = theirs(folder, name, format, &ours);
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs, "{name}");
    }
    assert_eq!(ours.len(), theirs.len(), "{name}");
}

#[test]
fn chains_of_every_kind() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let raw = std::fs::File::create(folder.join("raw")).unwrap();
    raw.set_len(3 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&raw, &[1; 300_000], 1 << 20).unwrap();
    assert_agree(folder, "raw", Format::Raw);
    let mut below = ("raw".to_owned(), "raw");
    for (i, (options, size)) in [
        ("compat=1.1", "2M"),
        ("extended_l2=on,cluster_size=32k", "5M"),
        ("compat=0.10,cluster_size=4k", "4M"),
        ("cluster_size=512,refcount_bits=8", "6M"),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("{i}");
        let args = ["create", "-q", "-f", "qcow2", "-o", options];
        let over = ["-b", &below.0, "-F", below.1, &name, size];
        qemu_img(folder, &[&args[..], &over[..]].concat());
        let mut random = Random(i as u64);
        let mut at = || random.below(15) << 17;
        let mut commands = Vec::new();
        for _ in 0..4 {
            commands.push(format!("write -P 5 {} {}", at(), 5000 + at() / 16));
            commands.push(format!("write -z {} 70k", at()));
            commands.push(format!("discard {} 64k", at()));
        }
        qemu_io(folder, &name, &commands);
        assert_agree(folder, &name, Format::Qcow2);
        below = (name, "qcow2");
    }
    let args = ["convert", "-c", "-O", "qcow2", &below.0, "compressed"];
    qemu_img(folder, &args);
    qemu_io(folder, "compressed", &["write 1M 100k".into()]);
    assert_agree(folder, "compressed", Format::Qcow2);
}

/// A storage that has a hole wherever its bytes are zeros.
struct Sparse(MemoryStorage);

const BLOCK: u64 = 4096;

impl Sparse {
    fn is_hole(&self, at: u64) -> bool {
        let mut block = [0; BLOCK as usize];
        self.0.read_at(at, &mut block).unwrap();
        block == [0; BLOCK as usize]
    }
}

impl Storage for Sparse {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, buf)
    }
    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.zero(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.punch(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let (mut at, len) = (offset, self.len()?);
        while at < len && self.is_hole(at) {
            at += BLOCK;
        }
        Ok((at < len).then_some(at..at + BLOCK))
    }
}

/// Writes here and there on a large disk, and looks whether all of it is where it was written.
fn scatter(image: &Image, what: &str) {
    let cluster = u64::from(image.cluster_size());
    let content = vec![7; cluster as usize];
    let mut random = Random(5);
    let mut written = Vec::new();
    for round in 0..40 {
        let index = random.below(image.size() / cluster);
        image.write(index * cluster, &content).unwrap();
        written.push(index);
        if round % 10 == 9 {
            image.flush().unwrap();
        }
        let mut found = Vec::new();
        let mut add = |entry: MapEntry| {
            if entry.data {
                let (start, end) = (entry.start, entry.start + entry.len);
                found.extend(start / cluster..end / cluster);
            }
            Ok(())
        };
        image.map(0, image.size(), &mut add).unwrap();
        written.sort_unstable();
        written.dedup();
        assert!(found == written, "{what}, round {round}");
    }
}

/// Tables of a large disk are for the most part holes; what is still in memory, or was written
/// since, is not taken for one of them.
#[test]
fn tables_that_are_not_in_the_file_yet() {
    for (cluster_size, size) in [(65536, 8 << 40), (2 << 20, 400 << 40), (4096, 32 << 30)] {
        let options = CreateOptions {
            cluster_size,
            ..CreateOptions::new(size)
        };
        let storage = Arc::new(Sparse(MemoryStorage::default()));
        create(Path::new("disk"), storage.clone(), &options).unwrap();
        let options = OpenOptions::new(Format::Qcow2);
        let image = Image::open_over(Path::new("disk"), storage, &options, None).unwrap();
        scatter(&image, &format!("clusters of {cluster_size}"));
        if !have_qemu() {
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let options = format!("cluster_size={cluster_size}");
        qemu_create(folder, &options, "disk", &size.to_string());
        let options = OpenOptions::new(Format::Qcow2);
        let image = Image::open(&folder.join("disk"), &options, &Files::default()).unwrap();
        scatter(&image, "of QEMU");
        image.flush().unwrap();
        drop(image);
        assert_agree(folder, "disk", Format::Qcow2);
    }
}
