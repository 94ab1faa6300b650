//! A disk for tests, and a driver on it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use crate::virtio::block::disk::{Disk, Extent, Geometry, Plan};
use crate::virtio::block::{Block, BlockStats, Engine, Options};
use crate::virtio::device::feature;
use crate::virtio::testing::{Driver, EVENT_IDX, WRITE};

pub(super) const SIZE: u64 = 8 << 20;
pub(super) const FLUSH: u64 = feature(9);
pub(super) const DISCARD: u64 = feature(13) | feature(14);
pub(super) const OK: u8 = 0;
pub(super) const IOERR: u8 = 1;
pub(super) const UNSUPPORTED: u8 = 2;

/// A raw disk in a file. Its first MiB lies at the file's end, its second is a hole that reads
/// as zeros and is written slowly, and what follows is as in the file, which is shorter. Writes to
/// its sixth are to be committed.
pub(super) struct RawDisk {
    geometry: Geometry,
    pub(super) file: File,
    /// What the engine works with.
    handle: File,
    direct: bool,
    flushes: AtomicU64,
    /// Its flushes are syncs of the file, and those that were.
    pub(super) sync_only: AtomicBool,
    pub(super) syncs: AtomicU64,
    /// Reads by buffer wait until this opens.
    pub(super) gate: Arc<(Mutex<bool>, Condvar)>,
    /// Reads by buffer that were begun.
    pub(super) begun: AtomicU64,
    pub(super) fails: AtomicBool,
    pub(super) fills: Arc<Fills>,
    pub(super) zeroed: Mutex<Vec<(&'static str, u64, u64, bool)>>,
}

pub(super) const MIB: u64 = 1 << 20;

/// Writes that are to be committed.
#[derive(Default)]
pub(super) struct Fills {
    /// Planned, and neither committed nor given up.
    pub(super) open: AtomicU64,
    pub(super) committed: AtomicU64,
    /// Commits fail.
    pub(super) fail: AtomicBool,
    /// They are to go where no file can be written.
    pub(super) nowhere: AtomicBool,
}

struct Filling(Arc<Fills>);

impl Filling {
    fn new(fills: &Arc<Fills>) -> Self {
        fills.open.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(fills))
    }

    fn commit(&self) -> io::Result<()> {
        if self.0.fail.load(Ordering::SeqCst) {
            return Err(io::Error::other("no room for its name"));
        }
        self.0.committed.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

impl RawDisk {
    fn new(read_only: bool, direct: bool) -> Arc<Self> {
        let file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..4 * MIB).map(|n| (n / 512 + n) as u8).collect();
        file.write_all_at(&content, 0).unwrap();
        let handle = match direct {
            true => open_direct(&file),
            false => file.try_clone().unwrap(),
        };
        let serial = "cow-serial-number-01".into();
        Arc::new(Self {
            geometry: Geometry {
                size: SIZE,
                read_only,
                block_size: 65536,
                discard_size: 65536,
                serial,
            },
            file,
            handle,
            direct,
            flushes: AtomicU64::new(0),
            sync_only: AtomicBool::new(false),
            syncs: AtomicU64::new(0),
            gate: Arc::new((Mutex::new(true), Condvar::new())),
            begun: AtomicU64::new(0),
            fails: AtomicBool::new(false),
            fills: Arc::default(),
            zeroed: Mutex::default(),
        })
    }

    pub(super) fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::SeqCst)
    }

    fn at(&self, offset: u64) -> u64 {
        if offset < MIB {
            offset + 7 * MIB
        } else {
            offset
        }
    }

    fn plan(&self, offset: u64, len: u64, write: bool) -> Plan {
        let (mut extents, mut fill) = (Vec::new(), false);
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let len = (end - at).min(MIB - at % MIB);
            fill |= write && at / MIB == 5;
            extents.push(match at / MIB {
                1 if write => return Plan::Slow,
                1 => Extent::Zero { len },
                3 => return Plan::Slow,
                _ => Extent::File {
                    file: 0,
                    offset: self.at(at),
                    len,
                },
            });
            at += len;
        }
        if fill {
            if self.fills.nowhere.load(Ordering::SeqCst) {
                let offset = 1 << 62;
                extents = vec![Extent::File {
                    file: 0,
                    offset,
                    len,
                }];
            }
            let filling = Filling::new(&self.fills);
            return Plan::Fill(extents, Box::new(move || filling.commit()));
        }
        Plan::Fast(extents, Box::new(()))
    }

    /// What the guest is to read at `offset`.
    pub(super) fn content(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = Vec::new();
        for (at, len) in pieces(offset, len) {
            let mut piece = vec![0; len];
            let mut filled = 0;
            while at / MIB != 1 && filled < len {
                let place = self.at(at) + filled as u64;
                match self.file.read_at(&mut piece[filled..], place).unwrap() {
                    0 => break,
                    more => filled += more,
                }
            }
            data.extend(piece);
        }
        data
    }
}

/// A range of the disk cut where its parts begin.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize)> {
    let end = offset + len as u64;
    let mut at = offset;
    std::iter::from_fn(move || {
        let len = (end - at).min(MIB - at % MIB);
        at += len;
        (len > 0).then_some((at - len, len as usize))
    })
}

impl Disk for RawDisk {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }
    fn files(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.handle.as_fd()]
    }
    fn alignment(&self, _: usize) -> u64 {
        if self.direct { 4096 } else { 1 }
    }
    fn plan_read(&self, offset: u64, len: u64, _: bool) -> io::Result<Plan> {
        if self.fails.load(Ordering::SeqCst) {
            return Err(io::Error::other("worn out"));
        }
        Ok(self.plan(offset, len, false))
    }
    fn plan_write(&self, offset: u64, len: u64, _: bool) -> io::Result<Plan> {
        Ok(self.plan(offset, len, true))
    }
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        let (open, opened) = &*self.gate;
        drop(
            opened
                .wait_while(open.lock().unwrap(), |open| !*open)
                .unwrap(),
        );
        buf.copy_from_slice(&self.content(offset, buf.len()));
        Ok(())
    }
    fn write(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let mut buf = buf;
        pieces(offset, buf.len()).try_for_each(|(at, len)| {
            let piece;
            (piece, buf) = buf.split_at(len);
            self.file.write_all_at(piece, self.at(at))
        })
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.zeroed
            .lock()
            .unwrap()
            .push(("zero", offset, len, unmap));
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zeroed
            .lock()
            .unwrap()
            .push(("discard", offset, len, true));
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn needs_sync_only(&self) -> bool {
        self.sync_only.load(Ordering::SeqCst)
    }
    fn synced(&self, result: io::Result<()>) -> io::Result<()> {
        self.syncs.fetch_add(1, Ordering::SeqCst);
        match self.fails.load(Ordering::SeqCst) {
            true => Err(io::Error::other("worn out")),
            false => result,
        }
    }
}

pub(super) struct Bench {
    pub(super) driver: Driver,
    pub(super) disk: Arc<RawDisk>,
    pub(super) stats: Arc<BlockStats>,
}

/// How bytes are moved.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub(super) engine: Engine,
    /// Past the page cache.
    pub(super) direct: bool,
}

pub(super) const WAYS: [Way; 4] = [
    Way::new(Engine::IoUring, false),
    Way::new(Engine::IoUring, true),
    Way::new(Engine::Threads, false),
    Way::new(Engine::Threads, true),
];

impl Way {
    const fn new(engine: Engine, direct: bool) -> Self {
        Self { engine, direct }
    }
}

/// The same file for direct I/O, if its file system has that.
fn open_direct(file: &File) -> File {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_DIRECT);
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    options.open(path).unwrap_or_else(|error| {
        let _ = writeln!(
            io::stderr(),
            "skipped: direct I/O is not to be had here: {error}"
        );
        file.try_clone().unwrap()
    })
}

pub(super) fn bench_with(read_only: bool, features: u64, options: Options) -> Bench {
    start(RawDisk::new(read_only, false), features, options)
}

pub(super) fn bench() -> Bench {
    bench_by(WAYS[0])
}

/// A disk that can do all, its bytes moved in that way.
pub(super) fn bench_by(way: Way) -> Bench {
    let options = Options {
        engine: way.engine,
        ..Options::default()
    };
    let disk = RawDisk::new(false, way.direct);
    start(disk, FLUSH | DISCARD | EVENT_IDX, options)
}

fn start(disk: Arc<RawDisk>, features: u64, options: Options) -> Bench {
    let stats = Arc::<BlockStats>::default();
    let block = Block::new(disk.clone(), options, stats.clone());
    let mut driver = Driver::new(Box::new(block));
    driver.start(features);
    Bench {
        driver,
        disk,
        stats,
    }
}

impl Bench {
    pub(super) fn header(&mut self, kind: u32, sector: u64) -> u64 {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend_from_slice(&[0; 4]);
        header.extend_from_slice(&sector.to_le_bytes());
        self.driver.put(&header)
    }

    /// Sends one request; returns its status.
    pub(super) fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> u8 {
        let header = self.header(kind, sector);
        let status = self.driver.put(&[0xaa]);
        let mut pieces = vec![(header, 16, 0)];
        pieces.extend_from_slice(data);
        pieces.push((status, 1, WRITE));
        let head = self.driver.add(0, &pieces);
        assert_eq!(self.driver.run(0, 1)[0].0, head);
        self.driver.bytes(status, 1)[0]
    }

    pub(super) fn read(&mut self, offset: u64, len: usize) -> (u8, Vec<u8>) {
        let at = self.driver.put(&vec![0x55; len]);
        let status = self.request(0, offset / 512, &[(at, len as u32, WRITE)]);
        (status, self.driver.bytes(at, len))
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> u8 {
        let at = self.driver.put(data);
        self.request(1, offset / 512, &[(at, data.len() as u32, 0)])
    }

    pub(super) fn range(&mut self, kind: u32, (sector, sectors, flags): (u64, u32, u32)) -> u8 {
        let mut range = sector.to_le_bytes().to_vec();
        range.extend_from_slice(&sectors.to_le_bytes());
        range.extend_from_slice(&flags.to_le_bytes());
        let at = self.driver.put(&range);
        self.request(kind, 0, &[(at, 16, 0)])
    }
}
