//! Images that QEMU's tools made must read as QEMU reads them.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::path::Path;

use cowshed_qcow::{Extent, Format, Image, OpenOptions, Plan, ReferencePolicy};
use support::{Files, Random, have_qemu, open_file, qemu_content, qemu_create, qemu_img, qemu_io};

fn open(path: &Path) -> Image {
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::new(Format::Qcow2)
    };
    open_file(path, &options)
}

/// Reads the whole disk, and again in odd pieces, and compares with what QEMU makes of it.
fn assert_reads_as_qemu(folder: &Path, name: &str) {
    let expected = qemu_content(folder, name, "qcow2");
    let image = open(&folder.join(name));
    assert_eq!(image.size(), expected.len() as u64, "{name}");
    let mut whole = vec![0xee; expected.len()];
    image.read(0, &mut whole).unwrap();
    assert!(
        whole == expected,
        "{name}: differs at {:?}",
        first_difference(&whole, &expected)
    );
    let mut random = Random(7);
    for _ in 0..20 {
        let offset = random.below(image.size());
        let len = random.below((image.size() - offset).min(300_000)) as usize;
        let mut part = vec![0xee; len];
        image.read(offset, &mut part).unwrap();
        assert!(
            part == expected[offset as usize..][..len],
            "{name}: {len} bytes at {offset:#x}"
        );
    }
    assert_plan_agrees(&image, &expected, name);
}

/// Where the plan is fast, its extents must lead to the same bytes.
fn assert_plan_agrees(image: &Image, expected: &[u8], name: &str) {
    use std::os::unix::fs::FileExt;
    let step = 1 << 20;
    let files: Vec<std::fs::File> = image
        .files()
        .iter()
        .map(|fd| fd.try_clone_to_owned().unwrap().into())
        .collect();
    for start in (0..image.size()).step_by(step) {
        let len = (image.size() - start).min(step as u64);
        let Plan::Fast { extents, .. } = image.plan_read(start, len).unwrap() else {
            continue;
        };
        let mut found = Vec::new();
        for extent in extents {
            match extent {
                Extent::Zero { len } => found.resize(found.len() + len as usize, 0),
                Extent::File { file, offset, len } => {
                    let mut part = vec![0; len as usize];
                    let mut at = 0;
                    while at < part.len() {
                        match files[file]
                            .read_at(&mut part[at..], offset + at as u64)
                            .unwrap()
                        {
                            0 => break,
                            n => at += n,
                        }
                    }
                    found.extend(part);
                }
            }
        }
        assert!(
            found == expected[start as usize..][..len as usize],
            "{name}: plan at {start:#x}"
        );
    }
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    a.iter().zip(b).position(|(a, b)| a != b)
}

/// Commands that touch data, holes and zero clusters all over a small disk.
fn scribble(size: u64, cluster: u64, zeroes: bool, seed: u64) -> Vec<String> {
    let mut random = Random(seed);
    let mut commands = Vec::new();
    for i in 0..24 {
        let offset = random.below(size / 512) * 512;
        let len = (1 + random.below((3 * cluster).min(size - offset) / 512)) * 512;
        let len = len.min(size - offset);
        if zeroes && i % 4 == 3 {
            let unmap = if i % 8 == 3 { "-u " } else { "" };
            commands.push(format!("write -z {unmap}{offset} {len}"));
        } else {
            commands.push(format!("write -P {} {offset} {len}", 1 + random.below(255)));
        }
    }
    commands
}

#[test]
fn subclusters() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let args = ["create", "-q", "-f", "qcow2", "base", "900k"];
    qemu_img(folder, &args);
    qemu_io(folder, "base", &["write -P 9 0 900k".into()]);
    for bits in 14..=21 {
        let cluster = 1 << bits;
        let size = (cluster * 20).max(1 << 20);
        let name = format!("{bits}.qcow2");
        let options = format!("extended_l2=on,cluster_size={cluster}");
        let args = ["create", "-q", "-f", "qcow2", "-o", &options];
        let over = ["-b", "base", "-F", "qcow2", &name, &size.to_string()];
        qemu_img(folder, &[&args[..], &over[..]].concat());
        qemu_io(
            folder,
            &name,
            &scribble(size, cluster / 8, true, u64::from(bits as u32)),
        );
        assert_reads_as_qemu(folder, &name);
    }
}

#[test]
fn every_cluster_size_and_version() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for bits in 9..=21 {
        for compat in ["0.10", "1.1"] {
            let cluster = 1 << bits;
            let size = (cluster * 20).max(1 << 20);
            let name = format!("{bits}-{compat}.qcow2");
            let options = format!("cluster_size={cluster},compat={compat}");
            let args = [
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                &options,
                &name,
                &size.to_string(),
            ];
            qemu_img(folder, &args);
            qemu_io(folder, &name, &scribble(size, cluster, true, bits));
            assert_reads_as_qemu(folder, &name);
        }
    }
}

#[test]
fn every_refcount_width_and_preallocation() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for order in 0..=6 {
        let name = format!("{order}.qcow2");
        let prealloc = ["off", "metadata", "falloc", "full"][order % 4];
        let options = format!("refcount_bits={},preallocation={prealloc}", 1 << order);
        qemu_create(folder, &options, &name, "4M");
        qemu_io(folder, &name, &scribble(4 << 20, 65536, true, 5));
        assert_reads_as_qemu(folder, &name);
    }
}

#[test]
fn compressed_clusters() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut content = Vec::new();
    let mut random = Random(3);
    while content.len() < 6 << 20 {
        // Text of a kind, noise, and zeros: clusters that compress well, badly and not at all.
        let word = random.next().to_le_bytes();
        match random.below(3) {
            0 => (0..4096).for_each(|_| content.extend_from_slice(&word)),
            1 => (0..2048).for_each(|_| content.extend_from_slice(&random.next().to_le_bytes())),
            _ => (0..9000).for_each(|i| content.push(word[i % 8] % 7 + (i / 100) as u8)),
        }
    }
    content.truncate((6 << 20) + 512 * 3);
    std::fs::write(folder.join("source.raw"), &content).unwrap();
    for method in ["zlib", "zstd"] {
        for cluster in [512, 4096, 65536, 2 << 20] {
            let name = format!("{method}-{cluster}.qcow2");
            let options = format!("cluster_size={cluster},compression_type={method}");
            let args = ["convert", "-c", "-O", "qcow2", "-f", "raw", "-o", &options];
            qemu_img(folder, &[&args[..], &["source.raw", &name]].concat());
            assert_reads_as_qemu(folder, &name);
        }
    }
}

#[test]
fn chains_of_different_lengths_and_formats() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    // A raw base whose length is odd, under a longer, a shorter and again a longer overlay.
    let base: Vec<u8> = (0..3_000_001_u32).map(|i| (i / 777) as u8 | 1).collect();
    std::fs::write(folder.join("base.raw"), base).unwrap();
    let layers = [
        ("a", "base.raw", "raw", 4),
        ("b", "a", "qcow2", 2),
        ("c", "b", "qcow2", 5),
    ];
    for (seed, (name, below, format, mebibytes)) in layers.into_iter().enumerate() {
        let size = format!("{mebibytes}M");
        let args = [
            "create", "-q", "-f", "qcow2", "-b", below, "-F", format, name, &size,
        ];
        qemu_img(folder, &args);
        let mut writes = scribble(mebibytes << 20, 65536, true, seed as u64);
        writes.truncate(8);
        qemu_io(folder, name, &writes);
        assert_reads_as_qemu(folder, name);
    }
    assert_eq!(open(&folder.join("c")).depth(), 4);
}

#[test]
fn a_chain_of_300() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "0", "1M"]);
    qemu_io(folder, "0", &["write -P 42 64k 64k".into()]);
    for i in 1..300 {
        // Making each by qemu-img would take a minute: copies of one header, renamed inside.
        if i == 1 {
            let args = [
                "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "000", "1", "1M",
            ];
            qemu_img(folder, &args);
        }
        let mut image = std::fs::read(folder.join("1")).unwrap();
        let at = u64::from_be_bytes(image[8..16].try_into().unwrap()) as usize;
        image[at..at + 3].copy_from_slice(format!("{:03}", i - 1).as_bytes());
        std::fs::write(folder.join(format!("{i:03}")), image).unwrap();
    }
    std::fs::rename(folder.join("0"), folder.join("000")).unwrap();
    let image = open(&folder.join("299"));
    assert_eq!(image.depth(), 300);
    let mut byte = [0; 2];
    image.read(131_071, &mut byte).unwrap();
    assert_eq!(byte, [42, 0]);
}

#[test]
fn internal_snapshots_do_not_disturb_the_active_disk() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "disk", "4M"]);
    for seed in 0..3 {
        qemu_io(folder, "disk", &scribble(4 << 20, 65536, true, seed));
        qemu_img(folder, &["snapshot", "-c", &format!("s{seed}"), "disk"]);
    }
    qemu_io(folder, "disk", &scribble(4 << 20, 65536, true, 9));
    assert_reads_as_qemu(folder, "disk");
}

#[test]
fn sizes_that_are_no_multiple_of_a_cluster() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for size in [0_u64, 512, 65536 + 512, (512 << 20) + 1536, 1 << 40] {
        let name = format!("{size}.qcow2");
        qemu_img(
            folder,
            &["create", "-q", "-f", "qcow2", &name, &size.to_string()],
        );
        let image = open(&folder.join(&name));
        assert_eq!(image.size(), size);
        if size >= 512 {
            qemu_io(folder, &name, &[format!("write -P 9 {} 512", size - 512)]);
            let mut tail = [0; 512];
            open(&folder.join(&name))
                .read(size - 512, &mut tail)
                .unwrap();
            assert_eq!(tail, [9; 512]);
        }
        assert!(image.read(size, &mut [0]).is_err());
    }
}

#[test]
fn references_are_followed_by_policy_only() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let inner = folder.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    qemu_img(
        folder.path(),
        &["create", "-q", "-f", "qcow2", "base", "1M"],
    );
    let below = |name: &str, arguments: &[&str]| {
        let args = [
            &["create", "-q", "-u", "-f", "qcow2"],
            arguments,
            &[name, "1M"],
        ]
        .concat();
        qemu_img(&inner, &args);
        inner.join(name)
    };
    let attempt = |path: &Path, references, backing_format| {
        let options = OpenOptions {
            references,
            backing_format,
            read_only: true,
            ..OpenOptions::new(Format::Qcow2)
        };
        match Image::open(path, &options, &Files::default()) {
            Ok(image) => format!("depth {}", image.depth()),
            Err(error) => error.to_string(),
        }
    };
    use ReferencePolicy::{Any, None as Never, OwnFolder};
    let outside = below("outside", &["-b", "../base", "-F", "qcow2"]);
    assert!(attempt(&outside, OwnFolder, None).contains("outside the image's own folder"));
    assert!(attempt(&outside, Never, None).contains("not allowed"));
    assert_eq!(attempt(&outside, Any, None), "depth 2");
    let top = below("top", &["-b", "outside", "-F", "qcow2"]);
    assert!(attempt(&top, OwnFolder, None).contains("outside the image's own folder"));
    assert_eq!(attempt(&top, Any, None), "depth 3");
    let protocol = below("protocol", &["-b", "nbd://host/disk", "-F", "raw"]);
    assert!(attempt(&protocol, Any, None).contains("only files are followed"));
    let formats = below("other", &["-b", "outside", "-F", "vmdk"]);
    assert!(attempt(&formats, Any, None).contains("\"vmdk\""));

    // An image that does not record its backing format: never guessed.
    std::os::unix::fs::symlink("../base", inner.join("linked")).unwrap();
    let linked = below("to-link", &["-b", "linked", "-F", "qcow2"]);
    assert!(attempt(&linked, OwnFolder, None).contains("outside the image's own folder"));
    let mut bytes = std::fs::read(&top).unwrap();
    let extension = bytes
        .windows(4)
        .position(|w| w == [0xe2, 0x79, 0x2a, 0xca])
        .unwrap();
    bytes[extension] = 0x12;
    std::fs::write(&top, bytes).unwrap();
    assert!(attempt(&top, Any, None).contains("never guessed"));
    assert_eq!(attempt(&top, Any, Some(Format::Qcow2)), "depth 3");

    let looped = below("loop", &["-b", "loop2", "-F", "qcow2"]);
    below("loop2", &["-b", "loop", "-F", "qcow2"]);
    assert!(attempt(&looped, OwnFolder, None).contains("loop"));
}

#[test]
fn an_overlay_without_its_base_can_be_looked_at_only() {
    use cowshed_qcow::{CreateOptions, MemoryStorage, create};
    let storage = std::sync::Arc::new(MemoryStorage::default());
    let backing = Some(("base".into(), Format::Raw));
    let options = CreateOptions {
        backing,
        ..CreateOptions::new(1 << 20)
    };
    create(Path::new("overlay"), storage.clone(), &options).unwrap();
    let open = OpenOptions::new(Format::Qcow2);
    let image = Image::open_over(Path::new("overlay"), storage, &open, None).unwrap();
    assert_eq!(image.backing().unwrap().name, "base");
    assert!(image.read(0, &mut [0]).is_err());
    assert!(image.write(0, &[0; 512]).is_err());
    assert!(image.plan_read(0, 512).is_err());
}
