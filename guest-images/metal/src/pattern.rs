//! Data that can be checked without keeping a copy.

use crate::memory::Region;
use crate::random::word;

/// Fills memory with the pattern as it lies on a disk, from a sector on.
pub fn fill(seed: u64, sector: u64, data: Region) {
    for offset in data.words() {
        data.write(offset, word(seed, sector * 64 + offset / 8));
    }
}

/// Offset of the first word in memory that is not the pattern's.
pub fn mismatch(seed: u64, sector: u64, data: Region) -> Option<u64> {
    data.words()
        .find(|&offset| data.read::<u64>(offset) != word(seed, sector * 64 + offset / 8))
}
