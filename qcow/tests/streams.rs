//! Compressed clusters as no encoder here writes them: what QEMU reads of them is read, what it
//! refuses is refused.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::io::Write;
use std::path::Path;
use std::process::Command;

use cowshed_qcow::{Format, OpenOptions};
use support::{Random, have_qemu, open_file, qemu_create, qemu_io};

const CLUSTER: usize = 65536;

/// Raw deflate with the largest window, 32 KiB, which QEMU's own encoder does not use.
fn deflate(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn zstd(content: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(content, 3).unwrap()
}

/// Noise that comes back from `distance` before.
fn noise(distance: usize, len: usize) -> Vec<u8> {
    let mut random = Random(distance as u64);
    let once: Vec<u8> = (0..distance).map(|_| random.next() as u8).collect();
    once.into_iter().cycle().take(len).collect()
}

/// Makes an image of QEMU's whose first cluster has this stream.
fn put(folder: &Path, method: &str, stream: &[u8]) {
    let _ = std::fs::remove_file(folder.join("disk"));
    let options = format!("cluster_size=64k,compression_type={method}");
    qemu_create(folder, &options, "disk", "128k");
    qemu_io(folder, "disk", &["write -c -P 1 0 64k".into()]);
    let mut image = std::fs::read(folder.join("disk")).unwrap();
    let number = |image: &[u8], at: usize| {
        let bytes = image[at..at + 8].try_into().unwrap();
        (u64::from_be_bytes(bytes) & 0x00ff_ffff_ffff_fe00) as usize
    };
    let l2 = number(&image, number(&image, 40));
    image.resize(image.len().next_multiple_of(CLUSTER), 0);
    let (at, sectors) = (image.len() as u64, stream.len().div_ceil(512) as u64);
    image.extend(stream);
    // Behind it lies another stream's: a length is one of sectors.
    image.resize(image.len().next_multiple_of(512), 0xa7);
    image.resize(image.len().next_multiple_of(CLUSTER), 0);
    let entry = 1 << 62 | (sectors - 1) << 54 | at;
    image[l2..l2 + 8].copy_from_slice(&entry.to_be_bytes());
    std::fs::write(folder.join("disk"), image).unwrap();
}

/// What is read of the first cluster, by us and by QEMU.
fn read(folder: &Path) -> (Option<Vec<u8>>, Option<Vec<u8>>) {
    let image = open_file(&folder.join("disk"), &OpenOptions::new(Format::Qcow2));
    let mut ours = vec![0xee; CLUSTER];
    let ours = image.read(0, &mut ours).ok().map(|()| ours);
    let converted = Command::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw", "disk", "raw"])
        .current_dir(folder)
        .output()
        .unwrap();
    let theirs = converted.status.success().then(|| {
        let all = std::fs::read(folder.join("raw")).unwrap();
        all[..CLUSTER].to_vec()
    });
    (ours, theirs)
}

#[test]
fn foreign_streams() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let far = noise(20_000, CLUSTER);
    let farthest = noise(32_000, CLUSTER);
    let longer = noise(3000, CLUSTER + 5000);
    let (first, second) = far.split_at(30_000);
    let frames = [zstd(first), zstd(second)].concat();
    let too_far = [zstd(first), zstd(&noise(7, CLUSTER))].concat();
    let cases = [
        ("zlib", "points back 20 KB", deflate(&far), Some(&far[..])),
        (
            "zlib",
            "points back 32 KB",
            deflate(&farthest),
            Some(&farthest),
        ),
        (
            "zlib",
            "more than a cluster",
            deflate(&longer),
            Some(&longer[..CLUSTER]),
        ),
        ("zlib", "less than a cluster", deflate(first), None),
        ("zlib", "no stream", noise(500, 900), None),
        ("zstd", "one frame", zstd(&far), Some(&far)),
        ("zstd", "two frames", frames, Some(&far)),
        ("zstd", "a frame past the end", too_far, None),
        ("zstd", "less than a cluster", zstd(first), None),
        ("zstd", "no stream", noise(500, 900), None),
    ];
    for (method, name, stream, expected) in cases {
        put(folder, method, &stream);
        let (ours, theirs) = read(folder);
        assert!(ours.as_deref() == expected, "{method}, {name}");
        assert!(theirs.as_deref() == expected, "{method}, {name}: QEMU");
    }
}
