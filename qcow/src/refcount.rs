//! Refcounts of every width: the table of blocks, and the blocks through a cache.

use std::collections::BTreeSet;

use crate::addr::{Geometry, be64};
use crate::cache::Cache;
use crate::entry;
use crate::error::{Result, Violation};
use crate::header::Header;
use crate::host::Host;
use crate::lookup::load;

/// Entries of 8 bytes in a sector, the unit in which tables of offsets are written.
pub(crate) const SECTOR_ENTRIES: u64 = 64;

/// The refcounts, as they will be in the file once everything is flushed. Decrements that wait
/// for a flush are not among them.
pub(crate) struct Refcounts {
    pub(crate) table: Vec<u64>,
    pub(crate) table_offset: u64,
    /// Sectors of the table that differ from the file's.
    pub(crate) dirty: BTreeSet<u64>,
    pub(crate) blocks: Cache,
    order: u32,
    geometry: Geometry,
}

impl Refcounts {
    /// Reads the table.
    pub(crate) fn load(host: &Host, header: &Header, cache_bytes: usize) -> Result<Self> {
        let geometry = header.geometry;
        let mut bytes = vec![0; (header.refcount_table_clusters * geometry.cluster()) as usize];
        host.read(header.refcount_table_offset, &mut bytes)?;
        Ok(Refcounts {
            table: bytes.chunks_exact(8).map(|entry| be64(entry, 0)).collect(),
            table_offset: header.refcount_table_offset,
            dirty: BTreeSet::new(),
            blocks: Cache::new(geometry.slice(), cache_bytes),
            order: header.refcount_order,
            geometry,
        })
    }

    /// The most that a refcount can be.
    pub(crate) fn most(&self) -> u64 {
        u64::MAX >> (64 - (1 << self.order))
    }

    /// Clusters that one block counts.
    pub(crate) fn per_block(&self) -> u64 {
        (self.geometry.cluster() * 8) >> self.order
    }

    /// Clusters that one slice of a block counts.
    pub(crate) fn per_slice(&self) -> u64 {
        (self.geometry.slice() * 8) >> self.order
    }

    /// Clusters that the table can count without growing.
    pub(crate) fn covered(&self) -> u64 {
        self.table.len() as u64 * self.per_block()
    }

    /// The block that counts a cluster, if there is one.
    pub(crate) fn block(&self, host: &Host, cluster: u64) -> Result<Option<u64>> {
        let index = cluster / self.per_block();
        let entry = self.table.get(index as usize).copied().unwrap_or(0);
        entry::refcount_block(entry, self.geometry).map_err(|expected| {
            let at = self.table_offset + index * 8;
            let value = format!("{entry:#018x}");
            host.invalid(Violation::new("refcount table entry", at, value, expected))
        })
    }

    /// Names a new block; its sector of the table is dirty now.
    pub(crate) fn set_block(&mut self, cluster: u64, block: u64) {
        let index = cluster / self.per_block();
        if let Some(entry) = self.table.get_mut(index as usize) {
            *entry = block;
            self.dirty.insert(index / SECTOR_ENTRIES);
        }
    }

    /// The slice that counts a cluster, loaded, and the cluster's index in it.
    fn slice(&mut self, host: &Host, cluster: u64) -> Result<Option<(u64, u64)>> {
        let Some(block) = self.block(host, cluster)? else {
            return Ok(None);
        };
        let in_block = cluster % self.per_block();
        let at = block + in_block / self.per_slice() * self.geometry.slice();
        load(host, &mut self.blocks, at)?;
        Ok(Some((at, in_block % self.per_slice())))
    }

    /// How many references a cluster has.
    pub(crate) fn get(&mut self, host: &Host, cluster: u64) -> Result<u64> {
        let found = self.slice(host, cluster)?;
        Ok(found.map_or(0, |(at, index)| {
            get(self.blocks.get(at).unwrap_or_default(), index, self.order)
        }))
    }

    /// Changes a cluster's refcount. There must be a block for it, and the width must hold it.
    pub(crate) fn set(&mut self, host: &Host, cluster: u64, value: u64) -> Result<()> {
        if let Some((at, index)) = self.slice(host, cluster)? {
            set(
                self.blocks.get_mut(at).unwrap_or_default(),
                index,
                self.order,
                value,
            );
        }
        Ok(())
    }

    /// Whether the cluster is free, and how many clusters from it on are the same, at most
    /// `most` and not past what one slice counts.
    pub(crate) fn run(&mut self, host: &Host, cluster: u64, most: u64) -> Result<(bool, u64)> {
        let Some((at, index)) = self.slice(host, cluster)? else {
            return Ok((
                true,
                (self.per_block() - cluster % self.per_block()).min(most),
            ));
        };
        let (order, end) = (self.order, self.per_slice().min(index.saturating_add(most)));
        let slice = self.blocks.get(at).unwrap_or_default();
        let free = get(slice, index, order) == 0;
        let same = |&i: &u64| (get(slice, i, order) == 0) == free;
        Ok((free, (index..end).take_while(same).count() as u64))
    }

    /// A block in which `of` alone are counted once: bytes of a whole cluster.
    pub(crate) fn new_block(&self, first: u64, of: std::ops::Range<u64>) -> Vec<u8> {
        let mut block = vec![0; self.geometry.cluster() as usize];
        let last = first + self.per_block();
        for cluster in of.start.max(first)..of.end.min(last) {
            set(&mut block, cluster - first, self.order, 1);
        }
        block
    }
}

/// Refcount number `index` of a block: below 8 bits the lowest bits of a byte come first, from 8
/// bits on they are big-endian.
pub(crate) fn get(block: &[u8], index: u64, order: u32) -> u64 {
    let bits = 1_u64 << order;
    let at = (index * bits / 8) as usize;
    if bits < 8 {
        let shift = index * bits % 8;
        let mask = (1_u64 << bits) - 1;
        return u64::from(block.get(at).copied().unwrap_or(0)) >> shift & mask;
    }
    match *block.get(at..at + bits as usize / 8).unwrap_or_default() {
        // The usual width, which whole images are counted in.
        [high, low] => u16::from_be_bytes([high, low]).into(),
        ref bytes => bytes
            .iter()
            .fold(0, |value, &byte| value << 8 | u64::from(byte)),
    }
}

/// Stores a refcount that the width must be able to hold.
pub(crate) fn set(block: &mut [u8], index: u64, order: u32, value: u64) {
    let bits = 1_u64 << order;
    let at = (index * bits / 8) as usize;
    if bits < 8 {
        let shift = index * bits % 8;
        let mask = ((1_u64 << bits) - 1) << shift;
        if let Some(byte) = block.get_mut(at) {
            *byte = *byte & !(mask as u8) | (value << shift & mask) as u8;
        }
        return;
    }
    let len = bits as usize / 8;
    if let Some(bytes) = block.get_mut(at..at + len) {
        bytes.copy_from_slice(value.to_be_bytes().get(8 - len..).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn narrow_refcounts_fill_a_byte_from_its_lowest_bit() {
        let mut block = [0; 2];
        set(&mut block, 0, 0, 1);
        set(&mut block, 9, 0, 1);
        assert_eq!(block, [0b1, 0b10]);
        let mut block = [0; 2];
        set(&mut block, 1, 1, 3);
        set(&mut block, 3, 2, 0xa);
        assert_eq!(block, [0b1100, 0xa0]);
    }

    #[test]
    fn every_width_keeps_its_largest_value_among_neighbours() {
        for order in 0..=6 {
            let most = u64::MAX >> (64 - (1 << order));
            let mut block = [0; 64];
            for index in 0..8 {
                set(&mut block, index, order, most);
            }
            set(&mut block, 3, order, 0);
            for index in 0..8 {
                let expected = if index == 3 { 0 } else { most };
                assert_eq!(get(&block, index, order), expected, "width {}", 1 << order);
            }
        }
    }
}
