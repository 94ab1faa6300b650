//! Bits as a bitmap's data has them: a byte's lowest bit stands for the lowest offset.

use std::ops::Range;

/// Sets a range of bits; what lies past the end is ignored.
pub(crate) fn set(bytes: &mut [u8], bits: Range<u64>) {
    let end = bits.end.min(bytes.len() as u64 * 8);
    if bits.start >= end {
        return;
    }
    let (first, last) = ((bits.start / 8) as usize, ((end - 1) / 8) as usize);
    let from_first = 0xff << (bits.start % 8);
    let to_last = 0xff >> (7 - (end - 1) % 8);
    let Some(touched) = bytes.get_mut(first..=last) else {
        return;
    };
    match touched {
        [only] => *only |= from_first & to_last,
        [first, middle @ .., last] => {
            *first |= from_first;
            middle.fill(0xff);
            *last |= to_last;
        }
        [] => {}
    }
}

/// Visits the runs of set bits in order.
pub(crate) fn for_each_run(bytes: &[u8], visit: &mut dyn FnMut(Range<u64>)) {
    let mut start = None;
    for (i, &byte) in bytes.iter().enumerate() {
        let same = if start.is_some() { 0xff } else { 0 };
        if byte == same {
            continue;
        }
        for bit in 0..8 {
            let at = i as u64 * 8 + bit;
            match (byte >> bit & 1 == 1, start) {
                (true, None) => start = Some(at),
                (false, Some(from)) => {
                    visit(from..at);
                    start = None;
                }
                _ => {}
            }
        }
    }
    if let Some(from) = start {
        visit(from..bytes.len() as u64 * 8);
    }
}

/// Clears all bits from one on.
pub(crate) fn truncate(bytes: &mut [u8], from: u64) {
    let at = (from / 8) as usize;
    if let Some([first, rest @ ..]) = bytes.get_mut(at..) {
        *first &= !(0xff << (from % 8));
        rest.fill(0);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::single_range_in_vec_init)] // A list of ranges may have one.

    use super::*;

    fn runs(bytes: &[u8]) -> Vec<Range<u64>> {
        let mut runs = Vec::new();
        for_each_run(bytes, &mut |run| runs.push(run));
        runs
    }

    #[test]
    fn what_is_set_is_found() {
        for start in 0..40 {
            for end in start + 1..41 {
                let mut bytes = [0; 5];
                set(&mut bytes, start..end);
                assert_eq!(runs(&bytes), [start..end.min(40)]);
                truncate(&mut bytes, start + 1);
                assert_eq!(runs(&bytes), [start..(start + 1).min(40)]);
            }
        }
        let mut bytes = [0; 5];
        set(&mut bytes, 50..60);
        set(&mut bytes, 3..3);
        assert_eq!(runs(&bytes), []);
        set(&mut bytes, 1..2);
        set(&mut bytes, 7..17);
        set(&mut bytes, 39..99);
        assert_eq!(runs(&bytes), [1..2, 7..17, 39..40]);
        assert_eq!(bytes, [0x82, 0xff, 0x01, 0, 0x80]);
    }
}
