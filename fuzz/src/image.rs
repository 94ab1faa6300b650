//! The images that are mutated, and how.

use std::sync::LazyLock;

use arbitrary::Arbitrary;

/// Made by `images/make`.
static IMAGES: LazyLock<Vec<(&str, Vec<u8>)>> = LazyLock::new(|| {
    [
        ("bitmaps", include_str!("../images/bitmaps.hex")),
        ("narrow", include_str!("../images/narrow.hex")),
        ("overlay", include_str!("../images/overlay.hex")),
        ("plain", include_str!("../images/plain.hex")),
        ("snapshots", include_str!("../images/snapshots.hex")),
        ("subclusters", include_str!("../images/subclusters.hex")),
        ("usual", include_str!("../images/usual.hex")),
        ("version2", include_str!("../images/version2.hex")),
        ("wide", include_str!("../images/wide.hex")),
        ("zlib", include_str!("../images/zlib.hex")),
        ("zstd", include_str!("../images/zstd.hex")),
    ]
    .map(|(name, hex)| (name, from_hex(hex)))
    .into()
});

/// Reads the text that `od -A x -t x1` writes: `*` repeats the line before it, and the last line is
/// the length.
pub fn from_hex(text: &str) -> Vec<u8> {
    let hex = |word: &str| usize::from_str_radix(word, 16).unwrap();
    let mut bytes: Vec<u8> = Vec::new();
    let mut row = Vec::new();
    for line in text.lines().filter(|&line| line != "*") {
        let mut words = line.split(' ');
        let at = hex(words.next().unwrap());
        while bytes.len() < at {
            bytes.extend(&row);
        }
        row = words.map(|word| hex(word) as u8).collect();
        bytes.extend(&row);
    }
    bytes
}

/// A valid image, and what is to be changed in it.
#[derive(Arbitrary, Debug)]
pub(crate) struct Mutated {
    image: u8,
    edits: Vec<Edit>,
    truncate: Option<u8>,
}

#[derive(Arbitrary, Debug)]
struct Edit {
    table: Table,
    /// In units of the value's length.
    index: u16,
    value: Value,
}

/// Where to change something. Tables are found as the valid image has them.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Table {
    Header,
    L1,
    /// That of the n-th L1 entry.
    L2(u8),
    Refcounts,
    Block(u8),
    Snapshots,
    Anywhere,
}

#[derive(Arbitrary, Debug)]
enum Value {
    Byte(u8),
    Flip(u8),
    Half(u32),
    Number(u64),
    /// A table's entry that leads to a cluster of the image, or a little further.
    Entry {
        flags: u8,
        cluster: u8,
        within: u16,
    },
}

impl Mutated {
    /// Whether the image is as QEMU made it.
    pub(crate) fn is_valid(&self) -> bool {
        self.edits.is_empty() && self.truncate.is_none()
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let (_, valid) = &IMAGES[usize::from(self.image) % IMAGES.len()];
        let mut bytes = valid.clone();
        for edit in self.edits.iter().take(64) {
            edit.apply(valid, &mut bytes);
        }
        if let Some(parts) = self.truncate {
            bytes.truncate(valid.len() * usize::from(parts) / 256);
        }
        bytes
    }
}

impl Edit {
    fn apply(&self, valid: &[u8], bytes: &mut [u8]) {
        let bits = number(valid, 20, 4);
        let (flip, value): (bool, Vec<u8>) = match self.value {
            Value::Byte(byte) => (false, vec![byte]),
            Value::Flip(bit) => (true, vec![1 << (bit % 8)]),
            Value::Half(value) => (false, value.to_be_bytes().into()),
            Value::Number(value) => (false, value.to_be_bytes().into()),
            Value::Entry {
                flags,
                cluster,
                within,
            } => {
                let top = u64::from(flags & 7) << 61;
                let entry = top | u64::from(cluster) << bits | u64::from(within);
                (false, entry.to_be_bytes().into())
            }
        };
        let index = usize::from(self.index) * value.len();
        let at = match self.table {
            Table::Header => index % 256,
            table => table.offset(valid).saturating_add(index) % valid.len(),
        };
        let place = bytes.iter_mut().skip(at);
        for (byte, value) in place.zip(value) {
            *byte = if flip { *byte ^ value } else { value };
        }
    }
}

impl Table {
    fn offset(self, valid: &[u8]) -> usize {
        const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
        let entry = |table, index: u8| {
            let at = number(valid, table, 8) as usize + usize::from(index) * 8;
            (number(valid, at, 8) & OFFSET) as usize
        };
        match self {
            Table::Header | Table::Anywhere => 0,
            Table::L1 => number(valid, 40, 8) as usize,
            Table::L2(index) => entry(40, index % 4),
            Table::Refcounts => number(valid, 48, 8) as usize,
            Table::Block(index) => entry(48, index % 2),
            Table::Snapshots => number(valid, 64, 8) as usize,
        }
    }
}

pub(crate) fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let number = |value, &byte| value << 8 | u64::from(byte);
    bytes.iter().skip(at).take(len).fold(0, number)
}
