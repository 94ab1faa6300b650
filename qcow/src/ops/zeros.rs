//! Finding zeros in memory.

use std::ops::Range;

/// Whether all bytes are zeros.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Most data says so at once; a block of this size is or-ed without a branch.
    let (blocks, rest) = bytes.as_chunks::<256>();
    let zero = |block: &[u8]| block.iter().fold(0, |all, byte| all | byte) == 0;
    blocks.iter().all(|block| zero(block)) && zero(rest)
}

/// The runs of `bytes` that are not zeros, in multiples of `unit`.
pub(crate) fn nonzero(bytes: &[u8], unit: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (i, part) in bytes.chunks(unit).enumerate() {
        if is_zero(part) {
            continue;
        }
        let range = i * unit..i * unit + part.len();
        match runs.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => runs.push(range),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_anywhere_counts() {
        let mut bytes = vec![0; 1000];
        assert!(is_zero(&bytes));
        assert_eq!(nonzero(&bytes, 100), []);
        for at in [0, 255, 256, 767, 999] {
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
            bytes[at] = 0;
        }
        bytes[99] = 1;
        bytes[100] = 1;
        bytes[999] = 1;
        assert_eq!(nonzero(&bytes, 100), [0..200, 900..1000]);
        assert_eq!(nonzero(&bytes, 300), [0..300, 900..1000]);
    }
}
