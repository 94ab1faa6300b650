//! Random requests to an image and to a plain vector; QEMU's tools have the last word.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::path::Path;
use std::process::Command;

use cowshed_qcow::{CreateOptions, Format, Image, OpenOptions};
use support::check::check;
use support::model::{Ops, content, mirror, perform};
use support::{
    Files, Random, cached, have_qemu, make, open_file, qemu_content, qemu_create, qemu_img, qemu_io,
};

fn open(path: &Path) -> Image {
    open_file(path, &cached(32 << 10))
}

/// Runs random requests and holds the result against the model, our checker and QEMU.
fn exercise(folder: &Path, name: &str, seed: u64, count: usize) {
    let path = folder.join(name);
    let image = open(&path);
    let mut model = content(&image);
    let cluster = u64::from(image.cluster_size());
    let mut ops = Ops::new(seed, image.size(), cluster);
    for i in 0..count {
        let op = ops.next();
        perform(&image, &op).unwrap_or_else(|error| panic!("{name}: {error:?}"));
        mirror(&mut model, &image, &op);
        if i % 16 == 0 {
            assert!(content(&image) == model, "{name}: after {i} requests");
        }
    }
    assert!(content(&image) == model, "{name}");
    drop(image);
    assert!(content(&open(&path)) == model, "{name}: opened again");
    assert_clean(folder, name);
    assert!(
        qemu_content(folder, name, "qcow2") == model,
        "{name}: QEMU reads something else"
    );
}

fn assert_clean(folder: &Path, name: &str) {
    check(&std::fs::read(folder.join(name)).unwrap()).assert_clean(name);
    qemu_img(folder, &["check", "-q", "-f", "qcow2", name]);
}

#[test]
fn images_that_qemu_made() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for order in 0..=6_u64 {
        let cluster = [512, 1024, 4096, 65536, 512, 8192, 512][order as usize];
        let size = (cluster * 300).min(4 << 20).to_string();
        for compat in ["0.10", "1.1"] {
            if compat == "0.10" && order != 4 {
                continue;
            }
            let name = format!("{order}-{compat}");
            let options = format!(
                "cluster_size={cluster},refcount_bits={},compat={compat}",
                1 << order
            );
            qemu_create(folder, &options, &name, &size);
            exercise(folder, &name, order, 250);
        }
    }
}

#[test]
fn large_clusters() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let options = "cluster_size=2M,preallocation=metadata";
    qemu_img(
        folder.path(),
        &["create", "-q", "-f", "qcow2", "-o", options, "disk", "20M"],
    );
    exercise(folder.path(), "disk", 1, 30);
}

#[test]
fn subclusters() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let base: Vec<u8> = (0..900_000_u32).map(|i| (i / 100) as u8 | 1).collect();
    std::fs::write(folder.join("base"), base).unwrap();
    for (seed, (cluster, more, backed)) in [
        ("16k", "refcount_bits=1", false),
        ("16k", "preallocation=metadata", false),
        ("64k", "lazy_refcounts=off", true),
        ("16k", "compression_type=zstd", true),
        ("2M", "refcount_bits=64", true),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("{seed}");
        let options = format!("extended_l2=on,cluster_size={cluster},{more}");
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if backed {
            args.extend(["-b", "base", "-F", "raw"]);
        }
        args.extend([&*name, "1500k"]);
        qemu_img(folder, &args);
        exercise(folder, &name, seed as u64, 250);
        if more == "refcount_bits=1" {
            continue;
        }
        // Shared and compressed clusters leave their place whole.
        qemu_img(folder, &["snapshot", "-c", "kept", &name]);
        let kept = qemu_content(folder, &name, "qcow2");
        let mut commands = vec!["write -P 3 64k 100k".into(), "write -z 300k 5k".into()];
        if cluster != "2M" {
            commands.extend(["discard 512k 64k".into(), "write -c -P 4 512k 64k".into()]);
        }
        qemu_io(folder, &name, &commands);
        exercise(folder, &name, 100 + seed as u64, 250);
        qemu_img(folder, &["snapshot", "-a", "kept", &name]);
        assert!(qemu_content(folder, &name, "qcow2") == kept, "{name}");
    }
}

#[test]
fn overlays_that_we_made() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let base: Vec<u8> = (0..700_001_u32).map(|i| (i / 100) as u8 | 1).collect();
    std::fs::write(folder.join("base.raw"), &base).unwrap();
    for (seed, (cluster_size, refcount_bits, size)) in [
        (512, 16, 1_u64 << 20),
        (4096, 1, 3 << 20),
        (65536, 16, 2 << 20),
        (512, 64, 1 << 20),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("{seed}");
        let backing = Some(("base.raw".into(), Format::Raw));
        let options = CreateOptions {
            cluster_size,
            refcount_bits,
            backing,
            ..CreateOptions::new(size)
        };
        make(folder, &name, &options);
        assert_clean(folder, &name);
        exercise(folder, &name, seed as u64, 200);
    }
    assert_eq!(std::fs::read(folder.join("base.raw")).unwrap(), base);
}

#[test]
fn chains_keep_their_bases() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "base", "2M"]);
    qemu_io(
        folder,
        "base",
        &["write -P 17 0 1500k".into(), "write -z 512k 64k".into()],
    );
    let args = ["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2"];
    qemu_img(
        folder,
        &[
            &args[..],
            &["-o", "compat=0.10,cluster_size=4k", "old", "3M"],
        ]
        .concat(),
    );
    let before = std::fs::read(folder.join("base")).unwrap();
    exercise(folder, "old", 5, 150);
    let middle = std::fs::read(folder.join("old")).unwrap();
    let args = [
        "create", "-q", "-f", "qcow2", "-b", "old", "-F", "qcow2", "top", "2500k",
    ];
    qemu_img(folder, &args);
    exercise(folder, "top", 6, 150);
    assert!(std::fs::read(folder.join("base")).unwrap() == before);
    assert!(std::fs::read(folder.join("old")).unwrap() == middle);
}

/// ARCHITECTURE.md's "base untouched": nothing but the top file is ever opened for writing.
#[test]
fn base_untouched() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "base", "1M"]);
    qemu_img(
        folder,
        &[
            "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top",
        ],
    );
    let before = std::fs::read(folder.join("base")).unwrap();
    let files = Files::default();
    let options = OpenOptions::new(Format::Qcow2);
    let image = Image::open(&folder.join("top"), &options, &files).unwrap();
    let mut ops = Ops::new(1, image.size(), 65536);
    for _ in 0..100 {
        perform(&image, &ops.next()).unwrap();
    }
    drop(image);
    assert_eq!(*files.written.lock().unwrap(), [folder.join("top")]);
    assert_eq!(std::fs::read(folder.join("base")).unwrap(), before);

    let options = OpenOptions {
        read_only: true,
        ..options
    };
    let image = Image::open(&folder.join("top"), &options, &files).unwrap();
    assert!(image.read_only());
    assert!(image.write(0, &[1; 512]).is_err());
    assert!(image.write_zeroes(0, 512, false).is_err());
    assert!(image.discard(0, 512).is_err());
    assert!(image.plan_write(0, 512).is_err());
    assert_eq!(files.written.lock().unwrap().len(), 1);
}

#[test]
fn compressed_clusters_are_overwritten() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let source: Vec<u8> = (0..2_u32 << 20).map(|i| (i / 3000) as u8).collect();
    std::fs::write(folder.join("source"), source).unwrap();
    for (method, cluster) in [("zlib", 4096), ("zstd", 65536), ("zlib", 512)] {
        let name = format!("{method}{cluster}");
        let options = format!("cluster_size={cluster},compression_type={method}");
        let args = [
            "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, "source", &name,
        ];
        qemu_img(folder, &args);
        exercise(folder, &name, cluster, 150);
    }
}

#[test]
fn snapshots_are_never_written_in_place() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for options in ["cluster_size=4k", "cluster_size=512,refcount_bits=64"] {
        qemu_create(folder, options, "disk", "1M");
        let mut kept = Vec::new();
        for seed in 0..3 {
            exercise(folder, "disk", seed, 80);
            let name = format!("s{seed}");
            kept.push((name.clone(), qemu_content(folder, "disk", "qcow2")));
            qemu_img(folder, &["snapshot", "-c", &name, "disk"]);
        }
        exercise(folder, "disk", 9, 150);
        for (name, before) in kept {
            qemu_img(folder, &["snapshot", "-a", &name, "disk"]);
            assert!(qemu_content(folder, "disk", "qcow2") == before, "{name}");
        }
        std::fs::remove_file(folder.join("disk")).unwrap();
    }
}

#[test]
fn lazy_refcounts_and_bitmaps() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    qemu_create(folder, "lazy_refcounts=on", "disk", "1M");
    qemu_img(folder, &["bitmap", "--add", "disk", "b"]);
    let header = || std::fs::read(folder.join("disk")).unwrap()[72..96].to_vec();
    assert_eq!(header()[23], 1, "the bitmaps are valid");
    let image = open(&folder.join("disk"));
    let mut sector = [0; 512];
    image.read(0, &mut sector).unwrap();
    image.flush().unwrap();
    assert_eq!(header()[23], 1, "nothing was written yet");
    image.write(0, &[1; 512]).unwrap();
    drop(image);
    assert_eq!(header()[23], 1, "they are still valid");
    assert_eq!(header()[15], 1, "the compatible bit stays");
    assert_eq!(header()[7], 0, "no dirty bit: refcounts are kept exact");
    assert_clean(folder, "disk");
}

/// Our checker must find what `qemu-img check` finds.
#[test]
fn the_checker_agrees_with_qemu() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    qemu_create(folder, "cluster_size=4k", "disk", "1M");
    qemu_io(
        folder,
        "disk",
        &["write -P 1 0 200k".into(), "write -P 2 600k 100k".into()],
    );
    let good = std::fs::read(folder.join("disk")).unwrap();
    let number = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap()) as usize;
    let block = number(number(48));
    let l1 = number(40);
    let l2 = number(l1) & 0xff_ffff_fe00;
    let mut random = Random(11);
    let mut seen = [0; 3];
    for _ in 0..60 {
        let mut bad = good.clone();
        let at = match random.below(3) {
            0 => block + random.below(200) as usize,
            1 => l2 + random.below(50) as usize * 8,
            _ => l2 + 6 + random.below(50) as usize * 8,
        };
        bad[at] ^= if at < block + 200 && at >= block {
            1
        } else {
            0x80
        };
        if at >= l2 + 6 && (at - l2) % 8 == 6 {
            bad[at] = good[at] ^ 0x10; // another cluster
        }
        std::fs::write(folder.join("bad"), &bad).unwrap();
        let output = Command::new("qemu-img")
            .args(["check", "-f", "qcow2", "bad"])
            .current_dir(folder)
            .output()
            .unwrap();
        let report = check(&bad);
        let ours = match (report.corruptions.is_empty(), report.leaks.is_empty()) {
            (true, true) => 0,
            (true, false) => 3,
            (false, _) => 2,
        };
        let theirs = output.status.code().unwrap();
        seen[[0, 3, 2]
            .iter()
            .position(|&code| code == theirs)
            .unwrap_or(2)] += 1;
        if ours != theirs {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            panic!("byte {at:#x}: we say {ours}, QEMU says {theirs}: {said} {report:?}");
        }
    }
    assert!(
        seen.iter().filter(|&&n| n > 0).count() >= 2,
        "the damage was too uniform: {seen:?}"
    );
}
