//! Compressed clusters that we write: QEMU reads them, and counts their clusters as we do.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::path::Path;
use std::sync::{Arc, mpsc};

use cowshed_qcow::{Compression, CreateOptions, Error, Format, Image, OpenOptions, create};
use support::check::check;
use support::storages::YieldingStorage;
use support::{Files, Random, have_qemu, make, open_file, qemu_content, qemu_img};

fn open(path: &Path) -> Image {
    open_file(path, &OpenOptions::new(Format::Qcow2))
}

/// Text of a kind, noise, what comes back from afar, and zeros.
fn source(len: usize) -> Vec<u8> {
    let mut content: Vec<u8> = Vec::new();
    let mut random = Random(3);
    while content.len() < len {
        let word = random.next().to_le_bytes();
        match random.below(5) {
            0 => (0..4096).for_each(|_| content.extend_from_slice(&word)),
            1 => (0..1024).for_each(|_| content.extend_from_slice(&random.next().to_le_bytes())),
            2 => content.resize(content.len() + 9000, 0),
            3 if content.len() > 40000 => {
                for _ in 0..60 {
                    let from = content.len() - 3000 - random.below(36000) as usize;
                    content.extend_from_within(from..from + 150);
                }
            }
            _ => (0..9000).for_each(|i| content.push(word[i % 8] % 7 + (i / 100) as u8)),
        }
    }
    content.truncate(len);
    content
}

#[test]
fn qemu_reads_them() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut seed = 0;
    for compression in [Compression::Zlib, Compression::Zstd] {
        for (cluster_size, refcount_bits) in [
            (512, 16),
            (512, 1),
            (4096, 2),
            (16384, 4),
            (65536, 16),
            (65536, 1),
            (2 << 20, 64),
        ] {
            seed += 1;
            let version = match compression {
                Compression::Zlib if refcount_bits == 16 => 2,
                _ => 3,
            };
            let extended_l2 = version == 3 && cluster_size >= 16384 && seed % 2 == 0;
            let source = source(
                if cluster_size == 512 {
                    600_000
                } else {
                    4_500_000
                } / 512
                    * 512,
            );
            let options = CreateOptions {
                version,
                cluster_size,
                refcount_bits,
                compression,
                extended_l2,
                ..CreateOptions::new(source.len() as u64)
            };
            let name = format!("{seed}");
            make(folder, &name, &options);
            let image = open(&folder.join(&name));
            image.write_compressed(0, &source).unwrap();
            let mut read = vec![0xee; source.len()];
            image.read(0, &mut read).unwrap();
            assert!(read == source, "{options:?}");
            drop(image);
            qemu_img(folder, &["check", "-q", "-f", "qcow2", &name]);
            assert!(
                qemu_content(folder, &name, "qcow2") == source,
                "{options:?}"
            );
            // A refcount of one bit allows no sharing, and so saves nothing.
            let len = std::fs::metadata(folder.join(&name)).unwrap().len() as usize;
            let tables = 5 * cluster_size as usize;
            assert!(
                refcount_bits == 1 || len < source.len() * 9 / 10 + tables,
                "{options:?}: {len}"
            );
            // As full as QEMU packs them, give or take the tables.
            if refcount_bits == 16 && version == 2 {
                std::fs::write(folder.join("source"), &source).unwrap();
                let options = format!("compat=0.10,cluster_size={cluster_size}");
                let args = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options];
                qemu_img(folder, &[&args[..], &["source", "theirs"]].concat());
                let theirs = std::fs::metadata(folder.join("theirs")).unwrap().len() as usize;
                assert!(
                    len < theirs * 11 / 10 + 65536,
                    "{len} bytes, {theirs} by QEMU"
                );
            }
        }
    }
}

#[test]
fn threads_compress_while_one_places() {
    let folder = tempfile::tempdir().unwrap();
    let options = CreateOptions {
        cluster_size: 4096,
        ..CreateOptions::new(1 << 20)
    };
    make(folder.path(), "disk", &options);
    let image = open(&folder.path().join("disk"));
    let source = source(1 << 20);
    let compressor = image.compressor(Some(1)).unwrap();
    let (send, receive) = mpsc::channel();
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let (send, source) = (send.clone(), &source);
            scope.spawn(move || {
                for (i, content) in source.chunks(4096).enumerate().skip(worker).step_by(4) {
                    send.send((i, compressor.compress(content))).unwrap();
                }
            });
        }
        drop(send);
        for (i, cluster) in receive {
            let at = i as u64 * 4096;
            match cluster {
                Some(cluster) => image.place_compressed(at, &cluster).unwrap(),
                None => image.write(at, &source[i * 4096..][..4096]).unwrap(),
            }
        }
    });
    let mut read = vec![0xee; source.len()];
    image.read(0, &mut read).unwrap();
    assert!(read == source);
    image.flush().unwrap();
    let len = image.file_len().unwrap();
    // Written again and again they take the places that became free.
    for _ in 0..4 {
        image.write_compressed(0, &source).unwrap();
        image.flush().unwrap();
        image.read(0, &mut read).unwrap();
        assert!(read == source);
    }
    image.flush().unwrap();
    let now = image.file_len().unwrap();
    assert!(now < len * 9 / 4, "grew from {len} to {now} bytes");
}

/// Threads that own every fourth cluster each, so that they share the host clusters of all.
#[test]
fn threads_that_place_do_not_disturb_each_other() {
    const THREADS: u64 = 4;
    for (cluster_size, refcount_bits) in [(512, 16), (4096, 2), (4096, 16)] {
        let storage = Arc::new(YieldingStorage::default());
        let options = CreateOptions {
            cluster_size,
            refcount_bits,
            ..CreateOptions::new(256 << 10)
        };
        create(Path::new("disk"), storage.clone(), &options).unwrap();
        let open = OpenOptions::new(Format::Qcow2);
        let image = Image::open_over(Path::new("disk"), storage.clone(), &open, None).unwrap();
        let cluster = u64::from(cluster_size);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let image = &image;
                scope.spawn(move || {
                    let mut random = Random(thread);
                    let mut model =
                        vec![vec![0; cluster as usize]; (image.size() / cluster) as usize];
                    for _ in 0..1000 {
                        let index =
                            random.below(image.size() / cluster / THREADS) * THREADS + thread;
                        let (at, here) = (index * cluster, &mut model[index as usize]);
                        match random.below(10) {
                            0 => image.flush().unwrap(),
                            1 => {
                                image.write_zeroes(at, cluster, true).unwrap();
                                here.fill(0);
                            }
                            2 => {
                                here[..512].fill(random.next() as u8);
                                image.write(at, &here[..512]).unwrap();
                            }
                            3..6 => {
                                let mut now = vec![0xee; cluster as usize];
                                image.read(at, &mut now).unwrap();
                                assert!(now == *here, "thread {thread} at {at:#x}");
                            }
                            _ => {
                                here.fill(random.next() as u8);
                                image.write_compressed(at, here).unwrap();
                            }
                        }
                    }
                    let mut now = vec![0xee; cluster as usize];
                    for (index, here) in model.iter().enumerate().skip(thread as usize).step_by(4) {
                        image.read(index as u64 * cluster, &mut now).unwrap();
                        assert!(now == *here, "thread {thread}, cluster {index}");
                    }
                });
            }
        });
        drop(image);
        let report = check(&storage.0.to_vec());
        assert!(report.corruptions.is_empty(), "{:?}", report.corruptions);
        assert!(report.leaks.is_empty(), "{:?}", report.leaks);
    }
}

/// A write to a part of the cluster must not bring back what lay there before.
#[test]
fn a_part_that_is_written_meanwhile_loses_nothing() {
    let storage = Arc::new(YieldingStorage::default());
    let options = CreateOptions {
        cluster_size: 4096,
        ..CreateOptions::new(256 << 10)
    };
    create(Path::new("disk"), storage.clone(), &options).unwrap();
    let open = OpenOptions::new(Format::Qcow2);
    let image = Image::open_over(Path::new("disk"), storage, &open, None).unwrap();
    for round in 1..400_u64 {
        let (at, value) = (round % 60 * 4096, round as u8);
        image.write_compressed(at, &[!value; 4096]).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| image.write(at, &[0xaa; 512]).unwrap());
            image.write_compressed(at, &[value; 4096]).unwrap();
        });
        let mut now = [0; 4096];
        image.read(at, &mut now).unwrap();
        assert!(now[512..] == [value; 3584], "round {round}");
        assert!(now[..512] == [value; 512] || now[..512] == [0xaa; 512]);
    }
}

#[test]
fn a_place_that_is_reused_is_read_anew() {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path(), "disk", &CreateOptions::new(1 << 20));
    let image = open(&folder.path().join("disk"));
    let mut read = vec![0; 65536];
    for round in 1..20_u8 {
        // Always the same length, so that descriptors come back.
        image.write_compressed(0, &vec![round; 65536]).unwrap();
        image.read(0, &mut read).unwrap();
        assert_eq!(read, vec![round; 65536]);
        image.discard(0, 65536).unwrap();
        image.flush().unwrap();
    }
    assert!(image.file_len().unwrap() < 8 * 65536);
}

#[test]
fn what_is_no_whole_cluster_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    make(folder, "disk", &CreateOptions::new((3 << 16) + 512));
    let image = open(&folder.join("disk"));
    for (offset, len) in [
        (512, 65536),
        (0, 65535),
        (65536, 512),
        (131_072, 65536 + 511),
    ] {
        let error = image.write_compressed(offset, &vec![1; len]).unwrap_err();
        assert!(matches!(error, Error::Unaligned { .. }), "{error}");
    }
    image
        .write_compressed(131_072, &vec![1; 65536 + 512])
        .unwrap();
    let past = image.write_compressed(196_608, &[1; 65536]).unwrap_err();
    assert!(matches!(past, Error::OutOfRange { .. }), "{past}");
    image.write_compressed(0, &[]).unwrap();

    // Of another image.
    let options = CreateOptions {
        cluster_size: 512,
        ..CreateOptions::new(1 << 20)
    };
    make(folder, "other", &options);
    let other = open(&folder.join("other")).compressor(None).unwrap();
    let cluster = other.compress(&[1; 512]).unwrap();
    let error = image.place_compressed(0, &cluster).unwrap_err();
    assert!(error.to_string().contains("another image's"), "{error}");

    std::fs::write(folder.join("raw"), vec![0; 65536]).unwrap();
    let raw = OpenOptions::new(Format::Raw);
    let raw = Image::open(&folder.join("raw"), &raw, &Files::default()).unwrap();
    let error = raw.write_compressed(0, &vec![1; 65536]).unwrap_err();
    assert!(error.to_string().contains("raw format"), "{error}");
}
