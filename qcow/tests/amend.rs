//! Images that become another version, get other refcounts or another backing file, and QEMU's
//! tools.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{
    AmendOptions, Backing, CheckOptions, CreateOptions, Error, FileStorage, Format, Image,
    MemoryStorage, NewSnapshot, Repair, create, repair,
};
use support::check::check;
use support::lab::cut_extra_data;
use support::model::{Ops, content, perform};
use support::{
    cached, have_qemu, open_file, qemu_content, qemu_create, qemu_img, qemu_io, to_bits, to_version,
};

const NAME: &str = "amend.qcow2";

fn open(path: &Path) -> Image {
    open_file(path, &cached(4 << 10))
}

/// A field of `qemu-img info`.
fn info(folder: &Path, name: &str, field: &str) -> String {
    let said = qemu_img(
        folder,
        &["info", "-U", "-f", "qcow2", "--output=json", name],
    );
    let key = format!("\"{field}\": ");
    let line = said.lines().find_map(|line| line.trim().strip_prefix(&key));
    line.unwrap_or("none")
        .trim_end_matches(',')
        .replace('"', "")
}

/// Up and down, and back by QEMU, with content that stays.
#[test]
fn versions() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let base: Vec<u8> = (0..700_001_u32).map(|i| (i / 100) as u8 | 1).collect();
    std::fs::write(folder.join("base.raw"), &base).unwrap();
    let over = ["-b", "base.raw", "-F", "raw"];
    let trials: [(&str, &[&str]); 4] = [
        ("cluster_size=512", &[]),
        ("cluster_size=512", &over),
        ("cluster_size=4k,lazy_refcounts=on", &over),
        ("cluster_size=64k", &over),
    ];
    for (seed, (options, backing)) in trials.into_iter().enumerate() {
        let name = format!("{seed}");
        let create = ["create", "-q", "-f", "qcow2", "-o", options];
        qemu_img(folder, &[&create, backing, &[&name, "900k"]].concat());
        let path = folder.join(&name);
        let image = open(&path);
        let mut ops = Ops::new(seed as u64, image.size(), image.cluster_size().into());
        (0..120).for_each(|_| perform(&image, &ops.next()).unwrap());
        let model = content(&image);
        drop(image);
        for round in 0..2 {
            open(&path).amend(&to_version(2)).unwrap();
            assert_eq!(info(folder, &name, "compat"), "0.10");
            qemu_img(folder, &["check", "-q", "-f", "qcow2", &name]);
            assert!(qemu_content(folder, &name, "qcow2") == model, "{name}");
            assert!(content(&open(&path)) == model, "{name}");
            if round == 0 {
                open(&path).amend(&to_version(3)).unwrap();
            } else {
                qemu_img(folder, &["amend", "-f", "qcow2", "-o", "compat=1.1", &name]);
            }
            assert_eq!(info(folder, &name, "compat"), "1.1");
            assert!(content(&open(&path)) == model, "{name}");
            // A zero cluster, which version 2 does not have.
            let image = open(&path);
            image.write_zeroes(0, 64 << 10, true).unwrap();
            image.write(0, &model[..64 << 10]).unwrap();
        }
        qemu_img(folder, &["check", "-q", "-f", "qcow2", &name]);
        assert!(qemu_content(folder, &name, "qcow2") == model, "{name}");
        let lazy = AmendOptions {
            lazy_refcounts: Some(true),
            ..AmendOptions::default()
        };
        open(&path).amend(&lazy).unwrap();
        assert_eq!(info(folder, &name, "lazy-refcounts"), "true");
        open(&path).amend(&to_version(2)).unwrap();
        assert!(qemu_content(folder, &name, "qcow2") == model, "{name}");
    }
}

/// A file that is nearly all holes, where new refcount blocks are holes too before they count.
#[test]
fn refcounts_in_a_sparse_file() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (cluster, bits) in [("4k", 64), ("64k", 64), ("64k", 1), ("2M", 32)] {
        let options = format!("cluster_size={cluster},preallocation=metadata");
        qemu_create(folder, &options, NAME, "4G");
        let path = folder.join(NAME);
        open(&path).amend(&to_bits(bits)).unwrap();
        qemu_img(folder, &["check", "-q", "-f", "qcow2", NAME]);
        assert_eq!(info(folder, NAME, "refcount-bits"), bits.to_string());

        // Without a refcount table everything is counted anew.
        let file = File::options().read(true).write(true).open(&path).unwrap();
        file.write_all_at(&[0; 12], 48).unwrap();
        let storage = Arc::new(FileStorage::new(file));
        let report = repair(&path, storage, Repair::All, &CheckOptions::default()).unwrap();
        assert!(report.is_clean(), "{:?}", report.findings.first());
        qemu_img(folder, &["check", "-q", "-f", "qcow2", NAME]);
    }
}

/// From any width to any other, by us and by QEMU.
#[test]
fn refcount_widths() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let source: Vec<u8> = (0..600_u32 << 10).map(|i| (i / 3000) as u8).collect();
    std::fs::write(folder.join("source"), source).unwrap();
    let args = [
        "convert",
        "-c",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-o",
        "cluster_size=1k",
    ];
    qemu_img(folder, &[&args[..], &["source", "disk"]].concat());
    qemu_img(folder, &["snapshot", "-c", "one", "disk"]);
    let path = folder.join("disk");
    open(&path).write(100_000, &[1; 100_000]).unwrap();
    let model = content(&open(&path));
    for (i, bits) in [64, 8, 32, 16, 64, 32].into_iter().enumerate() {
        let value = bits.to_string();
        if i % 3 == 2 {
            let option = format!("refcount_bits={bits}");
            qemu_img(folder, &["amend", "-f", "qcow2", "-o", &option, "disk"]);
        } else {
            open(&path).amend(&to_bits(bits)).unwrap();
        }
        assert_eq!(info(folder, "disk", "refcount-bits"), value);
        qemu_img(folder, &["check", "-q", "-f", "qcow2", "disk"]);
        check(&std::fs::read(&path).unwrap()).assert_clean(&value);
        assert!(content(&open(&path)) == model);
        // What the old structures had is used again.
        open(&path)
            .write(
                300_000 + i as u64 * 1024,
                &model[300_000 + i * 1024..][..50_000],
            )
            .unwrap();
    }
    // Compressed clusters and a snapshot: more than one reference.
    let error = open(&path).amend(&to_bits(1)).unwrap_err();
    assert!(
        error.to_string().contains("more references than"),
        "{error}"
    );
    open(&path).write(0, &[7; 1000]).unwrap();
    qemu_img(folder, &["snapshot", "-a", "one", "disk"]);
    qemu_img(folder, &["snapshot", "-d", "one", "disk"]);
    open(&path).discard(0, 600 << 10).unwrap();
    for bits in [1, 2, 4] {
        open(&path).amend(&to_bits(bits)).unwrap();
        assert_eq!(info(folder, "disk", "refcount-bits"), bits.to_string());
        open(&path).write(0, &vec![bits as u8; 200_000]).unwrap();
        qemu_img(folder, &["check", "-q", "-f", "qcow2", "disk"]);
    }
}

#[test]
fn refused_by_name() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let lazy_in_2 = AmendOptions {
        lazy_refcounts: Some(true),
        ..to_version(2)
    };
    let wide_in_2 = AmendOptions {
        refcount_bits: Some(32),
        ..to_version(2)
    };
    for (options, amend, expected) in [
        ("refcount_bits=8", to_version(2), "16 bits, not 8"),
        ("extended_l2=on", to_version(2), "extended L2"),
        ("compression_type=zstd", to_version(2), "zlib"),
        ("cluster_size=64k", lazy_in_2, "lazy"),
        ("cluster_size=64k", wide_in_2, "16 bits, not 32"),
        ("cluster_size=64k", to_version(1), "neither"),
        ("cluster_size=64k", to_bits(3), "1, 2, 4"),
        ("compat=0.10", to_bits(8), "16 bits, not 8"),
    ] {
        let _ = std::fs::remove_file(folder.join("disk"));
        qemu_create(folder, options, "disk", "1M");
        let before = std::fs::read(folder.join("disk")).unwrap();
        let error = open(&folder.join("disk")).amend(&amend).unwrap_err();
        assert!(error.to_string().contains(expected), "{options}: {error}");
        let after = std::fs::read(folder.join("disk")).unwrap();
        assert!(before == after, "{options}: a refusal changed the image");
    }
    // Snapshots of another size, and bitmaps.
    let args = ["create", "-q", "-f", "qcow2", "disk", "1M"];
    qemu_img(folder, &args);
    qemu_img(folder, &["snapshot", "-c", "one", "disk"]);
    let path = folder.join("disk");
    open(&path).amend(&to_version(2)).unwrap();
    open(&path).amend(&to_version(3)).unwrap();
    qemu_img(folder, &["resize", "-q", "-f", "qcow2", "disk", "2M"]);
    let error = open(&path).amend(&to_version(2)).unwrap_err();
    assert!(
        error.to_string().contains("\"one\", of another size"),
        "{error}"
    );
    qemu_img(folder, &["snapshot", "-d", "one", "disk"]);
    qemu_img(folder, &["bitmap", "--add", "disk", "bits"]);
    let error = open(&path).amend(&to_version(2)).unwrap_err();
    assert!(error.to_string().contains("bitmaps"), "{error}");
}

/// Entries of the snapshot table that say no sizes, as old programs wrote them: version 3 must
/// have these.
#[test]
fn old_snapshots_get_their_sizes() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    qemu_create(folder, "compat=0.10", "disk", "1M");
    qemu_io(folder, "disk", &["write -P 5 0 100k".into()]);
    qemu_img(folder, &["snapshot", "-c", "first", "disk"]);
    let path = folder.join("disk");
    cut_extra_data(&path, &[0]);
    open(&path).amend(&to_version(3)).unwrap();
    qemu_img(folder, &["check", "-q", "-f", "qcow2", "disk"]);
    let bytes = std::fs::read(&path).unwrap();
    let at = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    assert_eq!(bytes[at + 36..at + 40], [0, 0, 0, 16]);
    assert_eq!(bytes[at + 48..at + 56], (1_u64 << 20).to_be_bytes());
    assert_eq!(open(&path).snapshots().unwrap()[0].name, "first");
    qemu_img(folder, &["snapshot", "-a", "first", "disk"]);
}

/// The backing file's name, longer and shorter, with and without a format, and none.
#[test]
fn backing_files() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let long = "n".repeat(200);
    for (i, name) in ["a.raw", "b.raw", &long].into_iter().enumerate() {
        std::fs::write(folder.join(name), vec![i as u8 + 1; 1 << 20]).unwrap();
    }
    for options in ["cluster_size=512", "cluster_size=64k", "compat=0.10"] {
        let _ = std::fs::remove_file(folder.join("disk"));
        let args = [
            "create", "-q", "-f", "qcow2", "-o", options, "-b", "a.raw", "-F", "raw",
        ];
        qemu_img(folder, &[&args[..], &["disk"]].concat());
        let path = folder.join("disk");
        for (name, format, first) in [
            (Some("b.raw"), Some(Format::Raw), 2),
            (Some(&*long), Some(Format::Raw), 3),
            (None, None, 0),
            (Some("a.raw"), Some(Format::Raw), 1),
        ] {
            let backing = name.map(|name| Backing {
                name: name.into(),
                format,
            });
            open(&path).set_backing(backing.clone()).unwrap();
            let image = open(&path);
            assert_eq!(image.backing(), backing.as_ref());
            assert_eq!(content(&image)[4096], first);
            drop(image);
            assert_eq!(
                info(folder, "disk", "backing-filename"),
                name.unwrap_or("none")
            );
            let format = format.map_or("none", Format::name);
            assert_eq!(info(folder, "disk", "backing-filename-format"), format);
            assert_eq!(qemu_content(folder, "disk", "qcow2")[4096], first);
            qemu_img(folder, &["check", "-q", "-f", "qcow2", "disk"]);
        }
        let args = [
            "rebase", "-u", "-f", "qcow2", "-b", "b.raw", "-F", "raw", "disk",
        ];
        qemu_img(folder, &args);
        assert_eq!(content(&open(&path))[0], 2);
        let without = Backing {
            name: "b.raw".into(),
            format: None,
        };
        open(&path).set_backing(Some(without)).unwrap();
        assert_eq!(info(folder, "disk", "backing-filename-format"), "none");
    }
    let nothing = Backing {
        name: String::new(),
        format: None,
    };
    let image = Image::open_over(
        Path::new(NAME),
        Arc::new(MemoryStorage::new(
            std::fs::read(folder.join("disk")).unwrap(),
        )),
        &cached(4 << 10),
        None,
    );
    let error = image.unwrap().set_backing(Some(nothing)).unwrap_err();
    assert!(matches!(error, Error::Change { .. }), "{error}");
}

/// An image whose header has what nobody knows: a field, a compatible feature, two extensions.
fn with_unknowns(cluster_size: u32) -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::default());
    let create_options = CreateOptions {
        cluster_size,
        ..CreateOptions::new(1 << 20)
    };
    create(Path::new(NAME), storage.clone(), &create_options).unwrap();
    let mut bytes = storage.to_vec();
    bytes[80] = 0x40;
    bytes[100..104].copy_from_slice(&120_u32.to_be_bytes());
    bytes[112..120].copy_from_slice(b"unheard\0");
    let mut at = 120;
    for (kind, data) in [
        (0x1122_3344_u32, &b"invented text"[..]),
        (0x5566_7788, &[9; 150]),
    ] {
        bytes[at..at + 4].copy_from_slice(&kind.to_be_bytes());
        bytes[at + 4..at + 8].copy_from_slice(&(data.len() as u32).to_be_bytes());
        bytes[at + 8..at + 8 + data.len()].copy_from_slice(data);
        at += 8 + data.len().next_multiple_of(8);
    }
    bytes[at..at + 8].fill(0);
    bytes
}

fn assert_unknowns(bytes: &[u8]) {
    assert_eq!(bytes[80], 0x40);
    assert_eq!(&bytes[112..120], b"unheard\0");
    let find = |what: &[u8]| {
        bytes[..1024]
            .windows(what.len())
            .any(|window| window == what)
    };
    assert!(find(b"\x11\x22\x33\x44\0\0\0\x0dinvented text\0\0\0"));
    assert!(find(
        &[&b"\x55\x66\x77\x88\0\0\0\x96"[..], &[9; 150]].concat()
    ));
}

#[test]
fn what_is_not_known_is_kept() {
    for cluster_size in [1024, 65536] {
        let storage = Arc::new(MemoryStorage::new(with_unknowns(cluster_size)));
        let open = || {
            let bytes = Arc::new(MemoryStorage::new(storage.to_vec()));
            let changed = bytes.clone();
            let image = Image::open_over(Path::new(NAME), bytes, &cached(4 << 10), None).unwrap();
            (image, changed)
        };
        let backing = Backing {
            name: "somewhere/else".into(),
            format: Some(Format::Qcow2),
        };
        let (image, bytes) = open();
        image.set_backing(Some(backing)).unwrap();
        assert_unknowns(&bytes.to_vec());
        let (image, bytes) = open();
        image.amend(&to_bits(32)).unwrap();
        assert_unknowns(&bytes.to_vec());
        let (image, bytes) = open();
        image.resize(64 << 20, &Default::default()).unwrap();
        image.write(0, &[1; 5000]).unwrap();
        image.create_snapshot(&NewSnapshot::new("one")).unwrap();
        drop(image);
        assert_unknowns(&bytes.to_vec());
    }
}
