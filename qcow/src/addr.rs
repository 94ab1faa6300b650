//! Every shift and mask that follows from an image's cluster size, once.

use std::ops::Range;

/// Smallest and largest cluster size, as powers of two. The upper bound is QEMU's.
pub(crate) const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;

/// Tables are read, cached and written in pieces of this many bytes, or a cluster if smaller.
const SLICE_BYTES: u64 = 4096;

/// Extended L2 entries: subclusters in a cluster, and the least cluster size as a power of two.
pub(crate) const SUBCLUSTERS: u64 = 32;
const EXTENDED_CLUSTER_BITS: u32 = 14;

/// How guest offsets fall into clusters and tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    cluster_bits: u32,
    extended: bool,
}

impl Geometry {
    /// `None` unless `cluster_bits` is in [`CLUSTER_BITS`].
    pub(crate) fn new(cluster_bits: u32) -> Option<Self> {
        CLUSTER_BITS.contains(&cluster_bits).then_some(Geometry {
            cluster_bits,
            extended: false,
        })
    }

    /// The same with extended L2 entries: `None` if clusters are too small for subclusters.
    pub(crate) fn extended(self) -> Option<Self> {
        (self.cluster_bits >= EXTENDED_CLUSTER_BITS).then_some(Geometry {
            extended: true,
            ..self
        })
    }

    /// Whether L2 entries have 16 bytes and say which subclusters are there.
    pub(crate) fn is_extended(self) -> bool {
        self.extended
    }

    pub(crate) fn cluster_bits(self) -> u32 {
        self.cluster_bits
    }

    /// Bytes in a cluster.
    pub(crate) fn cluster(self) -> u64 {
        1 << self.cluster_bits
    }

    /// The cluster that holds an offset.
    pub(crate) fn index(self, offset: u64) -> u64 {
        offset >> self.cluster_bits
    }

    /// Where an offset lies in its cluster.
    pub(crate) fn within(self, offset: u64) -> u64 {
        offset & (self.cluster() - 1)
    }

    /// The start of an offset's cluster.
    pub(crate) fn floor(self, offset: u64) -> u64 {
        offset - self.within(offset)
    }

    /// How many clusters hold `bytes`.
    pub(crate) fn clusters(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster())
    }

    /// The clusters that a run of bytes touches; saturating, so that no input overflows.
    pub(crate) fn span(self, offset: u64, len: u64) -> Range<u64> {
        let start = self.index(offset);
        let end = if len == 0 {
            start
        } else {
            self.index(offset.saturating_add(len - 1)) + 1
        };
        start..end
    }

    /// Bytes in a slice, the unit in which tables are cached.
    pub(crate) fn slice(self) -> u64 {
        SLICE_BYTES.min(self.cluster())
    }

    /// Offsets of 8 bytes in a cluster of the refcount table.
    pub(crate) fn table_entries(self) -> u64 {
        self.cluster() / 8
    }

    /// Bytes in an L2 entry.
    pub(crate) fn l2_entry(self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Entries in an L2 table.
    pub(crate) fn l2_entries(self) -> u64 {
        self.cluster() / self.l2_entry()
    }

    /// Bytes that can be allocated apart: a subcluster, or a cluster without extended entries.
    pub(crate) fn subcluster(self) -> u64 {
        if self.extended {
            self.cluster() / SUBCLUSTERS
        } else {
            self.cluster()
        }
    }

    /// The subclusters of a guest cluster that a range of the disk touches, a bit each; all of
    /// them without extended entries.
    pub(crate) fn touched(self, range: &Range<u64>, cluster: u64) -> u32 {
        if !self.extended {
            return u32::MAX;
        }
        let start = cluster * self.cluster();
        let from = range.start.saturating_sub(start) / self.subcluster();
        let to = range.end.saturating_sub(start).div_ceil(self.subcluster());
        let below = |n: u64| (1_u64 << n.min(SUBCLUSTERS)) - 1;
        (below(to) & !below(from)) as u32
    }

    /// A range of the disk, rounded outwards to what can be allocated apart.
    pub(crate) fn subclusters(self, range: Range<u64>) -> Range<u64> {
        let unit = self.subcluster();
        range.start - range.start % unit..range.end.next_multiple_of(unit)
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub(crate) fn l1_entries(self, size: u64) -> u64 {
        self.clusters(size).div_ceil(self.l2_entries())
    }

    /// The L1 entry of a guest offset, and the offset of its L2 entry in the L2 table.
    pub(crate) fn l1_index(self, guest: u64) -> (usize, u64) {
        let cluster = self.index(guest);
        (
            (cluster / self.l2_entries()) as usize,
            cluster % self.l2_entries() * self.l2_entry(),
        )
    }
}

/// Reads a big-endian number of 8 bytes; zero where `bytes` is too short.
pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |b| u64::from_be_bytes(*b))
}

/// Reads a big-endian number of 4 bytes; zero where `bytes` is too short.
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |b| u32::from_be_bytes(*b))
}
