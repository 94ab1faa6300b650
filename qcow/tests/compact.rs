//! Files stay compact: what is freed is used again, loops do not make a file longer, and what is
//! written in order lies in order.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{CreateOptions, Format, Image, MapEntry, MemoryStorage, OpenOptions, create};
use support::check::check;
use support::{Random, new_file, open_file};

const NAME: &str = "compact.qcow2";

fn image(options: &CreateOptions) -> (Image, Arc<MemoryStorage>) {
    let storage = Arc::new(MemoryStorage::default());
    create(Path::new(NAME), storage.clone(), options).unwrap();
    (open(&storage), storage)
}

fn open(storage: &Arc<MemoryStorage>) -> Image {
    let options = OpenOptions::new(Format::Qcow2);
    Image::open_over(Path::new(NAME), storage.clone(), &options, None).unwrap()
}

fn assert_clean(storage: &MemoryStorage) {
    let report = check(&storage.to_vec());
    assert!(report.corruptions.is_empty(), "{report:?}");
    assert!(report.leaks.is_empty(), "{report:?}");
}

/// Geometries in which tables are small and grow often, and the usual one.
fn geometries() -> [CreateOptions; 4] {
    let options = |cluster_size, refcount_bits, size| CreateOptions {
        cluster_size,
        refcount_bits,
        ..CreateOptions::new(size)
    };
    [
        options(512, 16, 512 << 10),
        options(512, 64, 1 << 20),
        options(4096, 1, 2 << 20),
        options(65536, 16, 16 << 20),
    ]
}

fn runs(image: &Image) -> Vec<MapEntry> {
    let mut runs = Vec::new();
    let mut visit = |entry: MapEntry| {
        runs.extend(entry.data.then_some(entry));
        Ok(())
    };
    image.map(0, image.size(), &mut visit).unwrap();
    runs
}

#[test]
fn overwriting_and_flushing_does_not_grow_the_file() {
    for options in geometries() {
        let (image, storage) = image(&options);
        let part = options.size / 16;
        let mut settled = 0;
        for round in 0..200 {
            let bytes = vec![round as u8; part as usize];
            image.write(round % 16 * part, &bytes).unwrap();
            image.flush().unwrap();
            match round {
                16 => settled = image.file_len().unwrap(),
                17.. => assert_eq!(image.file_len().unwrap(), settled, "round {round}"),
                _ => {}
            }
        }
        drop(image);
        assert_clean(&storage);
    }
}

/// Each round frees what the round before wrote elsewhere, and a flush lets it be used again.
#[test]
fn what_a_flush_freed_is_used_again() {
    for options in geometries() {
        let (image, storage) = image(&options);
        let half = options.size / 2;
        let mut longest = 0;
        for round in 0..60 {
            let (old, new) = if round % 2 == 0 { (half, 0) } else { (0, half) };
            image.discard(old, half).unwrap();
            image.flush().unwrap();
            image
                .write(new, &vec![round as u8 + 1; half as usize])
                .unwrap();
            let len = image.file_len().unwrap();
            if round < 4 {
                longest = longest.max(len);
            }
            assert!(
                len <= longest,
                "round {round}: {len} after {longest}, {options:?}"
            );
        }
        drop(image);
        assert_clean(&storage);
    }
}

/// Compressed clusters share host clusters: each is freed with the last of them.
#[test]
fn compressed_clusters_that_were_overwritten_are_used_again() {
    for cluster_size in [4096, 65536] {
        let options = CreateOptions {
            cluster_size,
            ..CreateOptions::new(64 * u64::from(cluster_size))
        };
        let (image, storage) = image(&options);
        let cluster = u64::from(cluster_size);
        let mut random = Random(3);
        let mut longest = 0;
        for round in 0..40 {
            for at in (0..64)
                .filter(|_| random.below(3) > 0)
                .collect::<Vec<u64>>()
            {
                let bytes: Vec<u8> = (0..cluster).map(|i| (i / 100 + round + at) as u8).collect();
                image.write_compressed(at * cluster, &bytes).unwrap();
            }
            image.flush().unwrap();
            let len = image.file_len().unwrap();
            // The streams differ in length from round to round.
            if round < 12 {
                longest = longest.max(len);
            }
            assert!(len <= longest, "round {round}: {len} after {longest}");
        }
        drop(image);
        assert_clean(&storage);
    }
}

/// Opening and closing again and again, with a little written each time, as short-lived guests do.
#[test]
fn being_opened_often_does_not_grow_the_file() {
    for options in geometries() {
        let (first, storage) = image(&options);
        first.write(0, &vec![1; options.size as usize]).unwrap();
        drop(first);
        let mut settled = 0;
        for round in 0..40 {
            let image = open(&storage);
            let at = round * 7919 * 512 % (options.size - 4096);
            image
                .discard(
                    at,
                    4 * u64::from(options.cluster_size).min(options.size - at),
                )
                .unwrap();
            image.flush().unwrap();
            image.write(at, &[round as u8; 4096]).unwrap();
            drop(image);
            let len = storage.to_vec().len();
            if round == 0 {
                settled = len;
            }
            assert!(len <= settled, "round {round}: {len} after {settled}");
        }
        assert_clean(&storage);
    }
}

/// In requests of any length, with flushes between, over many L2 tables and refcount blocks: the
/// only breaks are where a table had to be placed.
#[test]
fn sequential_writes_land_sequentially() {
    for options in geometries() {
        let (image, storage) = image(&options);
        let mut random = Random(9);
        let mut at = 0;
        while at < options.size {
            let most = (options.size - at).min(3 * u64::from(options.cluster_size));
            let len = 1 + random.below(most);
            image.write(at, &vec![5; len as usize]).unwrap();
            at += len;
            if random.below(16) == 0 {
                image.flush().unwrap();
            }
        }
        let runs = runs(&image);
        let places: Vec<u64> = runs.iter().map(|run| run.offset.unwrap()).collect();
        assert!(places.is_sorted(), "{options:?}: {places:x?}");
        let cluster = u64::from(options.cluster_size);
        let l2_tables = options.size.div_ceil(cluster / 8 * cluster);
        let per_block = cluster * 8 / u64::from(options.refcount_bits);
        let blocks = (options.size * 2 / cluster).div_ceil(per_block);
        // A refcount table that moves takes a place too: it doubles each time.
        let tables = l2_tables + blocks + 8;
        assert!(
            runs.len() as u64 <= tables,
            "{} runs, {tables} tables",
            runs.len()
        );
        // No more than the data, and what tables take.
        let spare = (image.file_len().unwrap() - options.size) / cluster;
        assert!(
            spare <= 2 * tables + 16,
            "{spare} clusters beside the data, {options:?}"
        );
        drop(image);
        assert_clean(&storage);
    }
}

/// What is discarded, and what is overwritten elsewhere, goes back to the host.
#[test]
fn freed_clusters_become_holes_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(NAME);
    let options = CreateOptions::new(64 << 20);
    create(&path, new_file(&path), &options).unwrap();
    let image = open_file(&path, &OpenOptions::new(Format::Qcow2));
    let kept = || std::fs::metadata(&path).unwrap().blocks() * 512;
    image.write(0, &vec![7; 32 << 20]).unwrap();
    image.flush().unwrap();
    let full = kept();
    assert!(full >= 32 << 20, "{full} bytes");
    image.discard(8 << 20, 8 << 20).unwrap();
    image.write_zeroes(24 << 20, 8 << 20, true).unwrap();
    image.flush().unwrap();
    let after = kept();
    if after == full {
        eprintln!(
            "skipped: the file system of {} has no holes",
            folder.path().display()
        );
        return;
    }
    assert!(after <= full - (16 << 20), "{after} of {full} bytes");
    let mut content = vec![0; 64 << 20];
    image.read(0, &mut content).unwrap();
    assert!(content[..8 << 20] == [7; 8 << 20] && content[8 << 20..16 << 20] == [0; 8 << 20]);
}
