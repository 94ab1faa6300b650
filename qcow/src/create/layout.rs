//! Where things are in a new image: one after the other, in the order in which they are written.

use std::ops::Range;

use super::{CreateOptions, NewEncryption, Preallocation};
use crate::addr::Geometry;
use crate::alloc::MAX_HOST_OFFSET;
use crate::crypt::luks;
use crate::entry::{COPIED, ZERO};
use crate::error::Result;
use crate::header::{MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES};
use crate::host::Host;
use crate::refcount;

/// Bytes of a table that are in memory at a time.
const PIECE: usize = 1 << 20;

/// Counts of clusters: after the header come the refcount table, the refcount blocks, the L1 table
/// and, where preallocated, the L2 tables and the data. LUKS has its header before the data.
pub(super) struct Layout {
    geometry: Geometry,
    order: u32,
    pub(super) table: u64,
    blocks: u64,
    l1: u64,
    pub(super) l1_entries: u64,
    l2: u64,
    luks: u64,
    /// Entries of L2 tables say that what they name has no content.
    blank: bool,
    /// Clusters that L2 entries name.
    mapped: u64,
    /// What extended L2 entries say of their subclusters.
    bitmap: u64,
    /// Those of the clusters that are in the image itself.
    data: u64,
}

impl Layout {
    pub(super) fn new(geometry: Geometry, options: &CreateOptions) -> Result<Self, String> {
        // A table without an entry would have no place.
        let l1_entries = geometry.l1_entries(options.size).max(1);
        if l1_entries * 8 > MAX_L1_BYTES {
            let most = MAX_L1_BYTES / 8 * geometry.l2_entries() * geometry.cluster();
            return Err(format!(
                "a disk of {} bytes is too large for clusters of {}: they reach {most}",
                options.size,
                geometry.cluster()
            ));
        }
        let raw = options.data_file.as_ref().is_some_and(|file| file.raw);
        let mapped = if options.preallocation != Preallocation::Off || raw {
            geometry.clusters(options.size)
        } else {
            0
        };
        let layout = Layout {
            geometry,
            order: options.refcount_bits.trailing_zeros(),
            table: 1,
            blocks: 1,
            l1: geometry.clusters(l1_entries * 8),
            l1_entries,
            l2: mapped.div_ceil(geometry.l2_entries()),
            luks: match options.encryption {
                Some(NewEncryption::Luks { .. }) => geometry.clusters(luks::new_len()),
                _ => 0,
            },
            blank: options.encryption.is_some() && !options.extended_l2,
            mapped,
            // No subcluster has content yet, but in a raw data file, where zeros are content.
            bitmap: if raw { u32::MAX.into() } else { 0 },
            data: if options.data_file.is_some() {
                0
            } else {
                mapped
            },
        };
        layout.settle()
    }

    /// Finds how many refcount blocks count everything, themselves too.
    fn settle(mut self) -> Result<Self, String> {
        let per_block = (self.geometry.cluster() * 8) >> self.order;
        loop {
            let blocks = self.clusters().div_ceil(per_block);
            let table = blocks.div_ceil(self.geometry.table_entries());
            let len = self.clusters().checked_mul(self.geometry.cluster());
            if table * self.geometry.cluster() > MAX_REFCOUNT_TABLE_BYTES
                || len.is_none_or(|len| len > MAX_HOST_OFFSET)
            {
                return Err(format!(
                    "preallocation, a cluster size of {} and refcounts of {} bits together take \
                     more than a refcount table can count",
                    self.geometry.cluster(),
                    1 << self.order,
                ));
            }
            if blocks <= self.blocks && table <= self.table {
                return Ok(self);
            }
            (self.blocks, self.table) = (blocks.max(self.blocks), table.max(self.table));
        }
    }

    fn clusters(&self) -> u64 {
        1 + self.table + self.blocks + self.l1 + self.l2 + self.luks + self.data
    }

    fn at(&self, cluster: u64) -> u64 {
        cluster * self.geometry.cluster()
    }

    pub(super) fn refcount_table(&self) -> u64 {
        self.at(1)
    }

    fn refcount_blocks(&self) -> u64 {
        self.at(1 + self.table)
    }

    pub(super) fn l1(&self) -> u64 {
        self.at(1 + self.table + self.blocks)
    }

    fn l2(&self) -> u64 {
        self.at(1 + self.table + self.blocks + self.l1)
    }

    pub(super) fn luks(&self) -> u64 {
        self.at(1 + self.table + self.blocks + self.l1 + self.l2)
    }

    /// Where the guest's bytes are, if they are in the image.
    pub(super) fn data(&self) -> Range<u64> {
        self.at(self.clusters() - self.data)..self.file_len()
    }

    pub(super) fn file_len(&self) -> u64 {
        self.at(self.clusters())
    }

    /// Writes the tables. What they leave out are zeros already.
    pub(super) fn write_tables(&self, host: &Host) -> Result<()> {
        let row = |from: u64, count: u64, flags: u64| {
            (0..count).map(move |i| (from + self.at(i)) | flags)
        };
        let (table, blocks) = (self.refcount_table(), self.refcount_blocks());
        write(host, table, row(blocks, self.blocks, 0))?;
        write(host, blocks, self.refcounts())?;
        write(host, self.l1(), row(self.l2(), self.l2, COPIED))?;
        // A data file has the guest's bytes where the guest has them.
        let data = if self.data == 0 { 0 } else { self.data().start };
        // Zeros would be decrypted to noise.
        let blank = if self.blank { ZERO } else { 0 };
        let entries = row(data, self.mapped, COPIED | blank);
        if self.geometry.is_extended() {
            let bitmap = self.bitmap;
            write(host, self.l2(), entries.flat_map(|entry| [entry, bitmap]))
        } else {
            write(host, self.l2(), entries)
        }
    }

    /// The refcount blocks, 8 bytes at a time: all that is there is counted once.
    fn refcounts(&self) -> impl Iterator<Item = u64> {
        let (order, used) = (self.order, self.clusters());
        let per_word = 64 >> order;
        (0..used.div_ceil(per_word)).map(move |word| {
            let mut bytes = [0; 8];
            for index in 0..per_word.min(used - word * per_word) {
                refcount::set(&mut bytes, index, order, 1);
            }
            u64::from_be_bytes(bytes)
        })
    }
}

/// Writes a table of big-endian numbers, a piece at a time.
fn write(host: &Host, mut at: u64, words: impl Iterator<Item = u64>) -> Result<()> {
    let mut piece = Vec::new();
    let mut words = words.peekable();
    while words.peek().is_some() {
        piece.clear();
        piece.extend(words.by_ref().take(PIECE / 8).flat_map(u64::to_be_bytes));
        host.write(at, &piece)?;
        at += piece.len() as u64;
    }
    Ok(())
}
