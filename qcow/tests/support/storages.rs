//! Storages that go wrong: one that remembers what a crash could lose, one that fails on demand.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};

use cowshed_qcow::{MemoryStorage, Storage};

use super::Random;

/// A change of a storage.
#[derive(Clone, Debug)]
pub enum Change {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Punch(u64, u64),
    SetLen(u64),
    Sync,
}

/// Memory that logs what is done to it.
#[derive(Default)]
pub struct CrashStorage {
    pub now: MemoryStorage,
    pub log: Mutex<Vec<Change>>,
}

impl CrashStorage {
    fn log(&self, change: Change) {
        self.log.lock().unwrap().push(change);
    }

    pub fn position(&self) -> usize {
        self.log.lock().unwrap().len()
    }
}

impl Storage for CrashStorage {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.now.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.log(Change::Write(offset, buf.to_vec()));
        self.now.write_at(offset, buf)
    }
    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.log(Change::Zero(offset, len));
        self.now.zero(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.log(Change::Punch(offset, len));
        self.now.punch(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        self.log(Change::Sync);
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        self.now.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.log(Change::SetLen(len));
        self.now.set_len(len)
    }
}

/// Applies a change to bytes.
pub fn apply(bytes: &mut Vec<u8>, change: &Change) {
    let mut put = |offset: u64, data: &[u8]| {
        let (start, end) = (offset as usize, offset as usize + data.len());
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[start..end].copy_from_slice(data);
    };
    match change {
        Change::Write(offset, data) => put(*offset, data),
        Change::Zero(offset, len) => put(*offset, &vec![0; *len as usize]),
        Change::Punch(offset, len) => {
            let end = bytes.len().min((offset + len) as usize);
            let start = end.min(*offset as usize);
            bytes[start..end].fill(0);
        }
        Change::SetLen(len) => bytes.resize(*len as usize, 0),
        Change::Sync => {}
    }
}

/// Applies what a power cut might leave of changes that no sync covers: any of their sectors,
/// each as it was or as it was to be, later changes perhaps before earlier ones.
pub fn tear(bytes: &mut Vec<u8>, pending: &[Change], random: &mut Random) {
    let mut pieces = Vec::new();
    let keep = random.below(5);
    for change in pending {
        // Now and then all of a change, or nothing.
        let fate = random.below(8);
        match change {
            Change::Write(offset, data) => {
                let mut at = 0;
                while at < data.len() {
                    let sector = (offset + at as u64) / 512 + 1;
                    let end = data.len().min((sector * 512 - offset) as usize);
                    if fate == 0 || fate > 1 && random.below(4) < keep {
                        pieces.push(Change::Write(offset + at as u64, data[at..end].to_vec()));
                    }
                    at = end;
                }
            }
            Change::Zero(offset, len) | Change::Punch(offset, len) => {
                let grow = matches!(change, Change::Zero(..));
                let mut at = *offset;
                while at < offset + len {
                    let end = (at / 512 * 512 + 512).min(offset + len);
                    if fate == 0 || fate > 1 && random.below(4) < keep {
                        let part = end - at;
                        let zero = Change::Zero(at, part);
                        pieces.push(if grow { zero } else { Change::Punch(at, part) });
                    }
                    at = end;
                }
            }
            Change::SetLen(_) | Change::Sync => pieces.push(change.clone()),
        }
    }
    for i in (1..pieces.len()).rev() {
        if random.below(2) == 0 {
            pieces.swap(i, random.below(i as u64 + 1) as usize);
        }
    }
    for piece in &pieces {
        apply(bytes, piece);
    }
}

/// Visits what power cuts may leave after each change of a log from `from` on, `variants` of each.
pub fn crashes(
    log: &[Change],
    from: usize,
    variants: usize,
    random: &mut Random,
    visit: &mut dyn FnMut(usize, Vec<u8>),
) {
    let mut durable = Vec::new();
    log[..from]
        .iter()
        .for_each(|change| apply(&mut durable, change));
    let mut pending = from;
    for position in from..=log.len() {
        for _ in 0..variants {
            let mut bytes = durable.clone();
            tear(&mut bytes, &log[pending..position], random);
            visit(position, bytes);
        }
        if let Some(Change::Sync) = log.get(position) {
            log[pending..position]
                .iter()
                .for_each(|change| apply(&mut durable, change));
            pending = position + 1;
        }
    }
}

/// Memory whose n-th call fails, once.
pub struct FaultStorage {
    pub inner: MemoryStorage,
    /// Calls until the one that fails; negative afterwards.
    pub left: AtomicI64,
    pub kind: io::ErrorKind,
}

impl FaultStorage {
    fn call(&self) -> io::Result<()> {
        match self.left.fetch_sub(1, Ordering::Relaxed) {
            0 => Err(self.kind.into()),
            _ => Ok(()),
        }
    }
}

impl Storage for FaultStorage {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.call()?;
        self.inner.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        // A write that fails may have written a part, in sectors.
        if let Err(error) = self.call() {
            self.inner
                .write_at(offset, &buf[..buf.len() / 1024 * 512])?;
            return Err(error);
        }
        self.inner.write_at(offset, buf)
    }
    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.call()?;
        self.inner.zero(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.call()?;
        self.inner.punch(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        self.call()?;
        self.inner.sync()
    }
    fn len(&self) -> io::Result<u64> {
        self.call()?;
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.call()?;
        self.inner.set_len(len)
    }
}

/// Memory that lets other threads run inside each call, so that requests overlap.
#[derive(Default)]
pub struct YieldingStorage(pub MemoryStorage);

impl YieldingStorage {
    fn inner(&self) -> &MemoryStorage {
        (0..3).for_each(|_| std::thread::yield_now());
        &self.0
    }
}

impl Storage for YieldingStorage {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.inner().read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.inner().write_at(offset, buf)
    }
    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner().zero(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner().punch(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        self.inner().sync()
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner().set_len(len)
    }
}
