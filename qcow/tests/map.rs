//! Where a disk's bytes are must be what `qemu-img map` says.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::path::Path;

use cowshed_qcow::{Format, Image, MapEntry, OpenOptions};
use serde_json::Value;
use support::{Files, Random, have_qemu, qemu_img, qemu_io};

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
