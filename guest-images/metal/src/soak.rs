//! What a run of random requests does and writes, so that whoever reads the disk later can tell what
//! belongs there. Nothing here knows the machine: the tests on the host use this file, too.

use super::random::{Random, word};

/// Bytes of a block.
pub const BLOCK: u64 = 4096;
/// Most blocks of a request.
pub const LONGEST: u64 = 16;
/// Every so many steps one is a flush.
pub const FLUSH_EVERY: u64 = 128;
/// Most steps that are begun past the last one known to be durable.
pub const AHEAD: u64 = 1024;

/// A kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Writes what [`content`] says.
    Write,
    /// Writes zeros.
    Zero,
    /// Lets go of what is there: afterwards it is zeros, or something older.
    Discard,
    /// Reads, and compares.
    Read,
    /// Makes durable what has ended.
    Flush,
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// What is done.
    pub kind: Kind,
    /// The first block.
    pub first: u64,
    /// Blocks, at least one.
    pub count: u64,
}

impl Step {
    /// Step number `index` of a seed's run on so many blocks, at least [`LONGEST`].
    pub fn new(seed: u64, index: u64, blocks: u64) -> Self {
        let mut random = Random::new(word(seed, index));
        let kind = match random.below(100) {
            _ if index % FLUSH_EVERY == FLUSH_EVERY - 1 => Kind::Flush,
            0..55 => Kind::Write,
            55..60 => Kind::Zero,
            60..65 => Kind::Discard,
            _ => Kind::Read,
        };
        let longest = if random.below(4) == 0 { LONGEST } else { 1 };
        let count = 1 + random.below(longest);
        Self {
            kind,
            first: random.below(blocks - count + 1),
            count,
        }
    }

    /// Whether it is about a block.
    pub fn has(&self, block: u64) -> bool {
        self.kind != Kind::Flush && block >= self.first && block - self.first < self.count
    }

    /// Whether two requests are about a block in common.
    pub fn meets(&self, other: &Self) -> bool {
        self.kind != Kind::Flush
            && other.kind != Kind::Flush
            && self.first < other.first + other.count
            && other.first < self.first + self.count
    }
}

/// Who wrote a block: the first two words of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Writer {
    /// The run.
    pub seed: u64,
    /// The step.
    pub index: u64,
}

/// The 64-bit word number `at` of a block, below 512.
pub fn content(writer: Writer, block: u64, at: u64) -> u64 {
    match at {
        0 => writer.seed,
        1 => writer.index,
        2 => block,
        _ => word(writer.seed ^ writer.index.rotate_left(32) ^ block, at),
    }
}

/// Who wrote a block that has these words; `Ok(None)` if it is all zeros, an error if nobody did.
pub fn writer(block: u64, read: impl Fn(u64) -> u64) -> Result<Option<Writer>, &'static str> {
    let words = BLOCK / 8;
    if (0..words).all(|at| read(at) == 0) {
        return Ok(None);
    }
    let writer = Writer {
        seed: read(0),
        index: read(1),
    };
    if read(2) != block {
        return Err("a block has what was written elsewhere");
    }
    if (0..words).any(|at| read(at) != content(writer, block, at)) {
        return Err("a block has what nobody wrote");
    }
    Ok(Some(writer))
}
