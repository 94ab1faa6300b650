//! Power cuts and failing calls while an image becomes another version, gets other refcounts or
//! another backing file.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{Backing, CreateOptions, Format, Image, MemoryStorage, Storage, create};
use support::check::check;
use support::crash::{CrashStorage, crashes};
use support::model::{Ops, content, perform};
use support::storages::FaultStorage;
use support::{Random, cached, have_qemu, qemu_img, striped_base, to_bits, to_version};

const NAME: &str = "amend.qcow2";

/// A change of an image, and what comes of it.
type Change<'a> = &'a dyn Fn(Image) -> cowshed_qcow::Result<()>;

/// An image to begin with: zero clusters, data, and a snapshot if that is to be.
fn prepared(storage: Arc<dyn Storage>, cluster_size: u32, version: u32, base_len: usize) {
    let backing = (base_len > 0).then(|| ("base".into(), Format::Raw));
    let create_options = CreateOptions {
        cluster_size,
        version,
        backing,
        ..CreateOptions::new(100 << 10)
    };
    create(Path::new(NAME), storage.clone(), &create_options).unwrap();
    let image = open_in(storage, base_len);
    let mut ops = Ops::new(5, image.size(), cluster_size.into());
    (0..40).for_each(|_| perform(&image, &ops.next()).unwrap());
    image.flush().unwrap();
}

fn open_in(storage: Arc<dyn Storage>, base_len: usize) -> Image {
    let over = (base_len > 0).then(|| striped_base(base_len));
    Image::open_over(Path::new(NAME), storage, &cached(4 << 10), over).unwrap()
}

/// After a crash anywhere the image is sound and reads as before.
fn crash(cluster_size: u32, version: u32, base_len: usize, change: Change<'_>) {
    let storage = Arc::new(CrashStorage::default());
    prepared(storage.clone(), cluster_size, version, base_len);
    let before = content(&open_in(storage.clone(), base_len));
    let from = storage.position();
    change(open_in(storage.clone(), base_len)).unwrap();
    let log = storage.changes();
    assert!(log.len() > from);
    crashes(&log, from, 6, &mut Random(9), &mut |position, bytes| {
        check(&bytes).assert_sound(&format!("{position}"));
        let image = open_in(Arc::new(MemoryStorage::new(bytes)), base_len);
        assert!(content(&image) == before, "after {position}");
    });
}

#[test]
fn crash_safe() {
    for cluster_size in [512, 2048] {
        crash(cluster_size, 2, 0, &|image| image.amend(&to_version(3)));
        for base_len in [0, 60_000, 200_000] {
            crash(cluster_size, 3, base_len, &|image| {
                image.amend(&to_version(2))
            });
            crash(cluster_size, 3, base_len, &|image| {
                image.amend(&to_bits(64))
            });
            crash(cluster_size, 3, base_len, &|image| image.amend(&to_bits(8)));
        }
    }
}

/// Every state that a crash leaves of the header names the old backing file or the new one, each
/// with its format. Images as QEMU makes them: the names of features reach past the first sector.
#[test]
fn a_backing_file_is_replaced_at_once() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("a.raw"), [0; 512]).unwrap();
    let backing = |name: &str, format| {
        Some(Backing {
            name: name.into(),
            format,
        })
    };
    for options in [
        "cluster_size=64k",
        "cluster_size=2k",
        "cluster_size=512",
        "compat=0.10",
    ] {
        let _ = std::fs::remove_file(folder.join("disk"));
        let args = [
            "create", "-q", "-f", "qcow2", "-o", options, "-b", "a.raw", "-F", "raw",
        ];
        qemu_img(folder, &[&args[..], &["disk", "1M"]].concat());
        if options == "cluster_size=64k" {
            qemu_img(folder, &["bitmap", "--add", "disk", "bits"]);
        }
        let storage = Arc::new(CrashStorage::default());
        let bytes = std::fs::read(folder.join("disk")).unwrap();
        storage.write_at(0, &bytes).unwrap();
        storage.sync().unwrap();
        let open = |storage| Image::open_over(Path::new(NAME), storage, &cached(4 << 10), None);
        // With 512 bytes in a cluster there is room for no more.
        let len = if options == "cluster_size=512" {
            300
        } else {
            450
        };
        let (long, other) = ("l".repeat(len), "o".repeat(len));
        let steps = [
            backing("b", Some(Format::Qcow2)),
            backing(&long, Some(Format::Raw)),
            backing(&other, Some(Format::Raw)),
            backing("short", None),
            None,
            backing("c", None),
            backing("d", Some(Format::Raw)),
        ];
        for next in &steps {
            let from = storage.position();
            let image = open(storage.clone()).unwrap();
            let old = image.backing().cloned();
            image.set_backing(next.clone()).unwrap();
            let log = storage.changes();
            crashes(&log, from, 20, &mut Random(3), &mut |position, bytes| {
                let image = open(Arc::new(MemoryStorage::new(bytes))).unwrap();
                let found = image.backing().cloned();
                assert!(
                    found == old || &found == next,
                    "{options}: {position}: {found:?}"
                );
            });
        }
    }
}

/// Every call of the storage fails once.
#[test]
fn every_call_fails_once() {
    let backing = Backing {
        name: "another".into(),
        format: Some(Format::Qcow2),
    };
    let trials: [(u32, Change<'_>); 4] = [
        (2, &|image| image.amend(&to_version(3))),
        (3, &|image| image.amend(&to_version(2))),
        (3, &|image| image.amend(&to_bits(32))),
        (3, &|image| image.set_backing(Some(backing.clone()))),
    ];
    for (version, change) in trials {
        for n in 0.. {
            let storage = FaultStorage::new(Vec::new(), ErrorKind::Other);
            prepared(storage.clone(), 1024, version, 50_000);
            let before = content(&open_in(storage.clone(), 50_000));
            let image = open_in(storage.clone(), 50_000);
            storage.fail_after(n);
            let changed = change(image);
            let untouched = !storage.recover();
            assert!(changed.is_ok() || !untouched, "{:?}", changed.err());
            check(&storage.inner.to_vec()).assert_sound(&format!("call {n}"));
            let image = open_in(storage.clone(), 50_000);
            assert!(content(&image) == before, "call {n}");
            if untouched {
                assert!(n > 0);
                break;
            }
        }
    }
}
