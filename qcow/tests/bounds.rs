//! What hostile images cost: calls of the storage and bytes of memory, counted. A suite of its own,
//! because the allocator counts for the whole program.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

#[path = "support/endless.rs"]
mod endless;
mod support;

use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{CheckOptions, Format, Image, MemoryStorage, OpenOptions, check};
use endless::{Endless, MIB, NAME, Rule, alone, cost, open, valid, with_largest_tables};
use peak_alloc::PeakAlloc;
use support::{Random, have_qemu, qemu_create, qemu_img, qemu_io};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// What opening and refusing may take: the largest L1 table is half of it, read in 32 pieces.
const OPEN_BYTES: usize = 64 * MIB;
const OPEN_CALLS: u64 = 48;

/// Fields of the header: offset and length.
const FIELDS: [(usize, usize); 19] = [
    (0, 4),
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 8),
];

/// Each power of two, its neighbours, and the largest values.
fn boundaries(len: usize) -> Vec<u64> {
    let bits = len as u32 * 8;
    let powers = (0..bits).flat_map(|bit| {
        let power = 1_u64 << bit;
        [power - 1, power, power + 1]
    });
    let most = u64::MAX >> (64 - bits);
    powers.chain([most - 1, most, 4_194_304, 65_537]).collect()
}

/// Every field of the header with every value on a boundary, in a file that has room for all that
/// the values claim.
#[test]
fn opening_and_refusing_is_bounded() {
    let _alone = alone();
    let mut opened = 0;
    let mut worst = (0, 0);
    for cluster_size in [512, 65536, 2 << 20] {
        let start = valid(cluster_size);
        for (at, len) in FIELDS {
            for value in boundaries(len) {
                let mut bad = start[..start.len().min(4 << 20)].to_vec();
                bad[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
                let storage = Endless::new(bad, Rule::Same(0));
                for read_only in [true, false] {
                    let (peak, calls, image) = cost(&storage, || open(&storage, read_only));
                    let what = format!("{at}: {value:#x}, clusters of {cluster_size}");
                    assert!(peak <= OPEN_BYTES, "{what}: {peak} bytes");
                    assert!(calls <= OPEN_CALLS, "{what}: {calls} calls");
                    worst = (peak.max(worst.0), calls.max(worst.1));
                    let Ok(image) = image else { continue };
                    opened += 1;
                    assert!(image.size() <= i64::MAX as u64);
                    let (peak, calls, _) = cost(&storage, || image.read(0, &mut [0; 512]));
                    assert!(
                        peak <= MIB && calls <= 4,
                        "{what}: {peak} bytes, {calls} calls"
                    );
                }
            }
        }
    }
    assert!(opened > 100, "nothing was valid: {opened}");
    eprintln!("at most {} bytes and {} calls", worst.0, worst.1);
}

/// The largest tables that a header may claim, all at once, with entries that all say the same or
/// all something else.
#[test]
fn the_largest_tables() {
    let _alone = alone();
    let rules = [
        ("zeros", 65536_u32, Rule::Same(0)),
        ("0x01", 65536, Rule::Same(1)),
        ("0x80", 65536, Rule::Same(0x80)),
        ("0xff", 65536, Rule::Same(0xff)),
        ("L2 tables of their own", 0, Rule::Distinct),
        ("blocks of their own", 0, Rule::DistinctBlocks),
    ];
    for (name, snapshots, rule) in rules {
        let start = with_largest_tables(snapshots);
        let storage = Endless::new(start, rule);
        let (peak, calls, image) = cost(&storage, || open(&storage, false));
        assert!(peak <= OPEN_BYTES, "{name}: {peak} bytes");
        assert!(calls <= OPEN_CALLS, "{name}: {calls} calls");
        let image = image.unwrap();
        let (peak, calls, _) = cost(&storage, || image.read(1 << 49, &mut [0; 512]));
        assert!(
            peak <= MIB && calls <= 4,
            "{name}: {peak} bytes, {calls} calls"
        );
        // The first write looks where all metadata is.
        let (peak, calls, written) = cost(&storage, || image.write(0, &[1; 512]));
        eprintln!("{name}: a write takes {peak} bytes, {calls} calls: {written:?}");
        assert!(peak <= 64 * MIB, "{name}: {peak} bytes");
        assert!(calls <= 128, "{name}: {calls} calls");
    }
}

/// As many bitmaps as there may be, with names as long as the largest directory has room for.
#[test]
fn the_largest_bitmap_directory() {
    let _alone = alone();
    let directory = 1 << 20;
    let (count, name_len) = (65535, 231);
    let mut start = valid(65536);
    start.resize(directory, 0);
    start[88..96].copy_from_slice(&1_u64.to_be_bytes());
    let len = count as u64 * (24 + name_len as u64 + 1);
    let extension = [
        0x2385_2875,
        24,
        count,
        0,
        0,
        len as u32,
        0,
        directory as u32,
        0,
    ];
    let extension = extension.map(u32::to_be_bytes).concat();
    start[112..112 + extension.len()].copy_from_slice(&extension);
    for i in 0..count {
        start.extend((u64::from(i + 1) << 30).to_be_bytes()); // the table
        start.extend([0, 0, 0, 1, 0, 0, 0, 0, 1, 16, 0, name_len, 0, 0, 0, 0]);
        start.extend(format!("{i:0231} ").bytes());
    }
    let storage = Endless::new(start, Rule::Same(0));
    let image = open(&storage, false).unwrap();
    let (peak, calls, listed) = cost(&storage, || image.bitmaps().map(|found| found.len()));
    assert_eq!(listed.unwrap(), count as usize);
    assert!(
        peak <= 64 * MIB && calls <= 4,
        "{peak} bytes, {calls} calls"
    );
    // The first write looks for each table, once.
    let (peak, calls, written) = cost(&storage, || image.write(0, &[1; 512]));
    eprintln!("a write takes {peak} bytes, {calls} calls: {written:?}");
    assert!(
        peak <= 64 * MIB && calls <= 65535 * 2,
        "{peak} bytes, {calls} calls"
    );
}

/// A small stream for a large cluster, and streams that ask for the largest windows.
#[test]
fn compression_bombs_are_bounded() {
    let _alone = alone();
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("zeros"), vec![b'x'; 16 * MIB]).unwrap();
    for method in ["zlib", "zstd"] {
        let options = format!("cluster_size=2M,compression_type={method}");
        let args = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options];
        qemu_img(folder, &[&args[..], &["zeros", method]].concat());
        let bytes = std::fs::read(folder.join(method)).unwrap();
        let storage = Endless::new(bytes, Rule::Same(0));
        let image = open(&storage, true).unwrap();
        let mut buf = vec![0; MIB];
        let (peak, calls, read) = cost(&storage, || {
            (0..16).try_for_each(|i| image.read(i * MIB as u64, &mut buf))
        });
        read.unwrap();
        assert!(peak <= 16 * MIB, "{method}: {peak} bytes");
        assert!(calls <= 32, "{method}: {calls} calls");
    }
    // The frame's header asks for a window of 128 MiB, the most that is allowed, and for more.
    for (window, most) in [(27, 136 * MIB), (28, MIB), (31, MIB)] {
        let mut bytes = std::fs::read(folder.join("zstd")).unwrap();
        let frame = bytes
            .windows(4)
            .position(|w| w == [0x28, 0xb5, 0x2f, 0xfd])
            .unwrap();
        bytes[frame + 4] = 0; // no content size, no single segment
        bytes[frame + 5] = (window - 10) << 3;
        let storage = Endless::new(bytes, Rule::Same(0));
        let image = open(&storage, true).unwrap();
        let mut buf = vec![0; 512];
        let (peak, _, read) = cost(&storage, || image.read(0, &mut buf));
        assert!(read.is_err() || window == 27, "a window of 2^{window}");
        assert!(peak <= most + 8 * MIB, "2^{window}: {peak} bytes");
    }
}

/// Valid images that end at any cluster: what is gone is refused, and nothing is made up.
#[test]
fn truncation_at_every_cluster() {
    let _alone = alone();
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for options in [
        "cluster_size=512",
        "cluster_size=4k,compat=0.10",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=64k,refcount_bits=1",
    ] {
        qemu_create(folder, options, "disk", "1M");
        let writes = [
            "write -P 1 0 40k",
            "write -P 2 500k 20k",
            "write -z 600k 64k",
        ];
        qemu_io(folder, "disk", &writes.map(String::from));
        let whole = std::fs::read(folder.join("disk")).unwrap();
        let cluster = 1 << u32::from_be_bytes(whole[20..24].try_into().unwrap());
        let mut model = vec![0; MIB];
        model[..40 << 10].fill(1);
        model[500 << 10..520 << 10].fill(2);
        let mut random = Random(1);
        for len in (0..=whole.len()).step_by(cluster) {
            let storage = Arc::new(MemoryStorage::new(whole[..len].to_vec()));
            let _ = check(Path::new(NAME), storage.clone(), &CheckOptions::default());
            let options = OpenOptions::new(Format::Qcow2);
            let opened = Image::open_over(Path::new(NAME), storage.clone(), &options, None);
            let Ok(image) = opened else { continue };
            for at in (0..MIB).step_by(4096) {
                let mut part = [0xee; 4096];
                if image.read(at as u64, &mut part).is_ok() {
                    assert!(
                        part[..] == model[at..at + 4096],
                        "{options:?}, {len}: {at:#x}"
                    );
                }
            }
            for _ in 0..20 {
                let at = random.below(2000) * 512;
                let _ = image.write(at, &[3; 8192]);
                let _ = image.discard(at, 16384);
                let _ = image.flush();
            }
            assert!(
                storage.to_vec().len() <= whole.len() + 2 * MIB,
                "{len}: grew"
            );
        }
        std::fs::remove_file(folder.join("disk")).unwrap();
    }
}
