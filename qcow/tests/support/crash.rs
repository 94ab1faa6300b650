//! Power cuts: a storage that remembers what one could lose, and what is left after one.

use std::io;
use std::sync::{Arc, Mutex};

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

/// Changes of one file or several, in one order, each with its file's number.
type Log = Arc<Mutex<Vec<(usize, Change)>>>;

/// Memory that logs what is done to it.
#[derive(Default)]
pub struct CrashStorage {
    pub now: MemoryStorage,
    file: usize,
    log: Log,
}

impl CrashStorage {
    /// Two files with one log.
    pub fn pair() -> [Arc<Self>; 2] {
        let log = Log::default();
        [0, 1].map(|file| {
            let (now, log) = (MemoryStorage::default(), log.clone());
            Arc::new(CrashStorage { now, file, log })
        })
    }

    fn log(&self, change: Change) {
        self.log.lock().unwrap().push((self.file, change));
    }

    /// Changes until now.
    pub fn position(&self) -> usize {
        self.log.lock().unwrap().len()
    }

    /// The changes until now, for which file each.
    pub fn all_changes(&self) -> Vec<(usize, Change)> {
        self.log.lock().unwrap().clone()
    }

    /// The same for a file that is alone.
    pub fn changes(&self) -> Vec<Change> {
        let log = self.log.lock().unwrap();
        log.iter().map(|(_, change)| change.clone()).collect()
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
    fn syncs_file(&self) -> bool {
        true
    }
    fn synced(&self, result: io::Result<()>) -> io::Result<()> {
        self.log(Change::Sync);
        result
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
fn tear(bytes: &mut Vec<u8>, pending: &[Change], random: &mut Random) {
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

/// What power cuts may leave of a file, while its changes are made one after the other.
#[derive(Default)]
pub struct Cuts {
    /// What is synced.
    pub durable: Vec<u8>,
    pending: Vec<Change>,
}

impl Cuts {
    /// Of a file that has these bytes.
    pub fn of(durable: Vec<u8>) -> Self {
        let pending = Vec::new();
        Cuts { durable, pending }
    }

    pub fn push(&mut self, change: &Change) {
        match change {
            Change::Sync => {
                (self.pending.drain(..)).for_each(|change| apply(&mut self.durable, &change))
            }
            _ => self.pending.push(change.clone()),
        }
    }

    /// The file after a power cut now: what is synced (0), everything (1), nothing but the last
    /// change beside what is synced (2), or by chance.
    pub fn cut(&self, variant: usize, random: &mut Random) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        let whole = match variant {
            0 => &[],
            1 => &self.pending[..],
            2 => &self.pending[self.pending.len().saturating_sub(1)..],
            _ => {
                tear(&mut bytes, &self.pending, random);
                return bytes;
            }
        };
        whole.iter().for_each(|change| apply(&mut bytes, change));
        bytes
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
    let mut cuts = Cuts::default();
    for position in 0..=log.len() {
        if let Some(change) = position.checked_sub(1).map(|i| &log[i]) {
            cuts.push(change);
        }
        if position >= from {
            (0..variants).for_each(|variant| visit(position, cuts.cut(variant, random)));
        }
    }
}
