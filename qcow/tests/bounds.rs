//! What hostile images cost: calls of the storage and bytes of memory, counted. A suite of its own,
//! because the allocator counts for the whole program.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cowshed_qcow::{
    CheckOptions, CreateOptions, Format, Image, MemoryStorage, NewSnapshot, OpenOptions, Storage,
    check, create,
};
use peak_alloc::PeakAlloc;
use support::{Random, have_qemu, qemu_create, qemu_img, qemu_io, to_version};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// One test at a time: the others' memory is not to be counted.
static ALONE: Mutex<()> = Mutex::new(());

const NAME: &str = "hostile.qcow2";
const MIB: usize = 1 << 20;

/// What opening and refusing may take: the largest L1 table is half of it, read in 32 pieces.
const OPEN_BYTES: usize = 64 * MIB;
const OPEN_CALLS: u64 = 48;

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What bytes an endless file has.
#[derive(Clone, Copy)]
enum Rule {
    Same(u8),
    /// An L1 table whose entries name an L2 table each, none of them the same; all else is a hole.
    Distinct,
    /// The same, and a refcount table whose entries name a block each.
    DistinctBlocks,
}

/// A file as long as a file can be: its first bytes, then what a rule says. Writes are forgotten.
struct Endless {
    start: Vec<u8>,
    rule: Rule,
    len: u64,
    calls: AtomicU64,
}

impl Endless {
    fn new(start: Vec<u8>, rule: Rule) -> Arc<Self> {
        Arc::new(Endless {
            start,
            rule,
            len: i64::MAX as u64,
            calls: AtomicU64::new(0),
        })
    }

    fn call(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
    }

    /// What is no hole.
    fn runs(&self) -> [Range<u64>; 3] {
        match self.rule {
            Rule::Same(_) => [0..self.len, 0..0, 0..0],
            _ => [
                0..self.start.len() as u64,
                L1..L1_END,
                REFCOUNTS..REFCOUNTS_END,
            ],
        }
    }
}

impl Storage for Endless {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.call();
        match self.rule {
            Rule::Same(byte) => buf.fill(byte),
            Rule::Distinct | Rule::DistinctBlocks => {
                let blocks = matches!(self.rule, Rule::DistinctBlocks);
                for (byte, at) in buf.iter_mut().zip(offset..) {
                    *byte = match at {
                        REFCOUNTS..REFCOUNTS_END if blocks => named(BLOCKS, at - REFCOUNTS),
                        L1..L1_END => named(1 << 63 | L2, at - L1),
                        _ => 0,
                    }
                }
            }
        }
        if let Some(start) = self.start.get(offset as usize..) {
            let len = start.len().min(buf.len());
            buf[..len].copy_from_slice(&start[..len]);
        }
        Ok(())
    }
    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        self.call();
        Ok(())
    }
    fn zero(&self, _: u64, _: u64) -> io::Result<()> {
        self.call();
        Ok(())
    }
    fn punch(&self, _: u64, _: u64) -> io::Result<()> {
        self.call();
        Ok(())
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        self.call();
        Ok(self.len)
    }
    fn set_len(&self, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn allocated(&self) -> io::Result<u64> {
        self.call();
        match self.rule {
            Rule::Same(_) => Ok(self.len),
            _ => Ok(self.runs().iter().map(|run| run.end - run.start).sum()),
        }
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.call();
        let next = self.runs().into_iter().find(|run| offset < run.end);
        Ok(next.map(|run| run.start.max(offset)..run.end))
    }
}

/// Bytes at the peak and calls of the storage that `work` takes.
fn cost<T>(storage: &Endless, work: impl FnOnce() -> T) -> (usize, u64, T) {
    let (before, calls) = (
        MEMORY.current_usage(),
        storage.calls.load(Ordering::Relaxed),
    );
    MEMORY.reset_peak_usage();
    let done = work();
    let peak = MEMORY.peak_usage().saturating_sub(before);
    (peak, storage.calls.load(Ordering::Relaxed) - calls, done)
}

fn open(storage: &Arc<Endless>, read_only: bool) -> cowshed_qcow::Result<Image> {
    let options = OpenOptions {
        read_only,
        ..OpenOptions::new(Format::Qcow2)
    };
    Image::open_over(Path::new(NAME), storage.clone(), &options, None)
}

/// The start of a valid image.
fn valid(cluster_size: u32) -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions {
        cluster_size,
        ..CreateOptions::new(1 << 30)
    };
    create(Path::new(NAME), storage.clone(), &options).unwrap();
    storage.to_vec()
}

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

/// Where the largest L1 table is, and the L2 tables that its entries name, one each.
const L1: u64 = 1 << 40;
const L1_END: u64 = L1 + (32 << 20);
const L2: u64 = 5 << 40;
/// The same of the largest refcount table and its blocks.
const REFCOUNTS: u64 = 2 << 40;
const REFCOUNTS_END: u64 = REFCOUNTS + (8 << 20);
const BLOCKS: u64 = 3 << 40;

/// A byte of a table of offsets, the first of which is given; each next is a cluster further.
fn named(first: u64, at: u64) -> u8 {
    (first + at / 8 * 65536).to_be_bytes()[at as usize % 8]
}

/// The start of an image whose L1 and refcount table are the largest.
fn with_largest_tables(snapshots: u32) -> Vec<u8> {
    let mut start = valid(65536);
    let mut put = |at: usize, bytes: &[u8]| start[at..at + bytes.len()].copy_from_slice(bytes);
    put(24, &(1_u64 << 50).to_be_bytes());
    put(36, &((32_u32 << 20) / 8).to_be_bytes());
    put(40, &L1.to_be_bytes());
    put(48, &REFCOUNTS.to_be_bytes());
    put(56, &128_u32.to_be_bytes());
    put(60, &snapshots.to_be_bytes());
    put(64, &(3_u64 << 40).to_be_bytes());
    start.truncate(65536);
    start
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

/// Whole-image work is bounded by what the image has, and so are calls.
#[test]
fn checks_of_large_claims_are_bounded() {
    let _alone = alone();
    for fill in [0, 0x01, 0x80, 0xff] {
        let mut start = valid(65536);
        start[60..64].copy_from_slice(&65536_u32.to_be_bytes());
        start[64..72].copy_from_slice(&(3_u64 << 40).to_be_bytes());
        let mut storage = Endless::new(start, Rule::Same(fill));
        // Room for 64 Mi clusters.
        Arc::get_mut(&mut storage).unwrap().len = 4 << 40;
        let options = CheckOptions::default();
        let (peak, calls, checked) = cost(&storage, || {
            check(Path::new(NAME), storage.clone(), &options)
        });
        let found = checked.map(|report| report.corruptions);
        eprintln!("{fill:#x}: a check takes {peak} bytes, {calls} calls: {found:?}");
        assert!(peak <= 64 * MIB, "{fill:#x}: {peak} bytes");
        assert!(calls <= 1024, "{fill:#x}: {calls} calls");
    }
}

/// Tables by the million in holes of a small file are not read.
#[test]
fn checks_of_holes_are_bounded() {
    let _alone = alone();
    for rule in [Rule::Distinct, Rule::DistinctBlocks] {
        let storage = Endless::new(with_largest_tables(0), rule);
        let options = CheckOptions::default();
        let (peak, calls, checked) = cost(&storage, || {
            check(Path::new(NAME), storage.clone(), &options)
        });
        let found = checked.map(|report| report.corruptions);
        eprintln!("a check takes {peak} bytes, {calls} calls: {found:?}");
        assert!(peak <= 128 * MIB, "{peak} bytes");
        assert!(calls <= 128, "{calls} calls");
    }
}

/// What goes over all of an image reads no tables in holes either, and counts nothing in them.
#[test]
fn snapshots_of_holes_are_bounded() {
    let _alone = alone();
    for rule in [Rule::Distinct, Rule::DistinctBlocks] {
        let storage = Endless::new(with_largest_tables(0), rule);
        for work in ["snapshot", "downgrade"] {
            let image = open(&storage, false).unwrap();
            let (peak, calls, done) = cost(&storage, || match work {
                "snapshot" => image.create_snapshot(&NewSnapshot::new("one")).map(drop),
                _ => image.amend(&to_version(2)),
            });
            eprintln!("{work}: {peak} bytes, {calls} calls: {done:?}");
            // Nothing there is counted; and no zero clusters are there either.
            assert_eq!(done.is_err(), work == "snapshot", "{work}: {done:?}");
            // Some times what the L1 table has.
            assert!(peak <= 384 * MIB, "{work}: {peak} bytes");
            assert!(calls <= 1024, "{work}: {calls} calls");
        }
    }
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
