//! Files that claim more than they have, and what it costs to believe them. A suite that uses them
//! has `PeakAlloc` for its allocator, and runs one test at a time.
// Each suite uses a part, and what fails here fails the test.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cowshed_qcow::{CreateOptions, Format, Image, MemoryStorage, OpenOptions, Storage, create};
use peak_alloc::PeakAlloc;

/// One test at a time: the others' memory is not to be counted.
static ALONE: Mutex<()> = Mutex::new(());

pub const NAME: &str = "hostile.qcow2";
pub const MIB: usize = 1 << 20;

pub fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What bytes an endless file has.
#[derive(Clone, Copy)]
pub enum Rule {
    Same(u8),
    /// An L1 table whose entries name an L2 table each, none of them the same; all else is a hole.
    Distinct,
    /// The same, and a refcount table whose entries name a block each.
    DistinctBlocks,
    /// An L1 table whose entries all name one L2 table.
    Shared,
}

/// A file as long as a file can be: its first bytes, then what a rule says. Writes are forgotten.
pub struct Endless {
    start: Vec<u8>,
    rule: Rule,
    pub len: u64,
    calls: AtomicU64,
}

impl Endless {
    pub fn new(start: Vec<u8>, rule: Rule) -> Arc<Self> {
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
            Rule::Shared | Rule::Distinct | Rule::DistinctBlocks => {
                let blocks = matches!(self.rule, Rule::DistinctBlocks);
                let shared = matches!(self.rule, Rule::Shared);
                for (byte, at) in buf.iter_mut().zip(offset..) {
                    *byte = match at {
                        REFCOUNTS..REFCOUNTS_END if blocks => named(BLOCKS, at - REFCOUNTS),
                        L1..L1_END if shared => named(1 << 63 | L2, at % 8),
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
pub fn cost<T>(storage: &Endless, work: impl FnOnce() -> T) -> (usize, u64, T) {
    let (before, calls) = (
        PeakAlloc.current_usage(),
        storage.calls.load(Ordering::Relaxed),
    );
    PeakAlloc.reset_peak_usage();
    let done = work();
    let peak = PeakAlloc.peak_usage().saturating_sub(before);
    (peak, storage.calls.load(Ordering::Relaxed) - calls, done)
}

pub fn open(storage: &Arc<Endless>, read_only: bool) -> cowshed_qcow::Result<Image> {
    let options = OpenOptions {
        read_only,
        ..OpenOptions::new(Format::Qcow2)
    };
    Image::open_over(Path::new(NAME), storage.clone(), &options, None)
}

/// The start of a valid image.
pub fn valid(cluster_size: u32) -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions {
        cluster_size,
        ..CreateOptions::new(1 << 30)
    };
    create(Path::new(NAME), storage.clone(), &options).unwrap();
    storage.to_vec()
}

/// Where the largest L1 table is, and the L2 tables that its entries name, one each.
pub const L1: u64 = 1 << 40;
pub const L1_END: u64 = L1 + (32 << 20);
pub const L2: u64 = 5 << 40;
/// The same of the largest refcount table and its blocks.
pub const REFCOUNTS: u64 = 2 << 40;
pub const REFCOUNTS_END: u64 = REFCOUNTS + (8 << 20);
pub const BLOCKS: u64 = 3 << 40;

/// A byte of a table of offsets, the first of which is given; each next is a cluster further.
pub fn named(first: u64, at: u64) -> u8 {
    (first + at / 8 * 65536).to_be_bytes()[at as usize % 8]
}

/// The start of an image whose L1 and refcount table are the largest.
pub fn with_largest_tables(snapshots: u32) -> Vec<u8> {
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
