//! Random numbers, the same for a seed everywhere: SplitMix64.

/// Word number `index` of the pattern of a seed.
pub fn word(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The words of a seed, one after the other.
#[derive(Debug)]
pub struct Random {
    seed: u64,
    index: u64,
}

impl Random {
    /// Starts at the first word.
    pub fn new(seed: u64) -> Self {
        Self { seed, index: 0 }
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.index += 1;
        word(self.seed, self.index) % bound
    }
}
