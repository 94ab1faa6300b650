//! Finding clusters, and growing the refcount structures as the file grows.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::header::MAX_REFCOUNT_TABLE_BYTES;
use crate::qcow2::{Qcow2, State, Tables};
use crate::writing::Writing;

/// Slices of refcounts that one allocation searches before it appends to the file.
const SEARCH_SLICES: usize = 64;

/// Bytes that the host is asked for at a time, before they are written.
const RESERVED_AHEAD: std::ops::RangeInclusive<u64> = 1 << 20..=64 << 20;

/// Entries have room for offsets of 56 bits.
pub(crate) const MAX_HOST_OFFSET: u64 = 1 << 56;

/// Clusters that were just allocated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Allocation {
    pub(crate) clusters: Range<u64>,
    /// They lie past what was the file's end, so that they are zeros already.
    pub(crate) fresh: bool,
}

/// Why there is no allocation yet.
pub(crate) enum Blocked {
    /// The refcount table must grow first.
    TableFull,
    /// The file may not grow.
    FileFull,
}

impl Qcow2 {
    /// Allocates one to `most` clusters in a row, the lowest that are free. With `thorough` the
    /// whole file is searched before it grows.
    pub(crate) fn allocate(
        &self,
        tables: &mut Tables,
        writing: &mut Writing,
        most: u64,
        thorough: bool,
    ) -> Result<Result<Allocation, Blocked>> {
        loop {
            let found = match self.find(writing, most, thorough)? {
                Ok(found) => found,
                Err(blocked) => return Ok(Err(blocked)),
            };
            if let Some(cluster) = found.clone().find(|&c| writing.metadata.contains(c)) {
                return Err(self.free_metadata(tables, cluster));
            }
            let fresh = found.start >= self.geometry.clusters(tables.file_len);
            let covered = writing.refcounts.block(&self.host, found.start)?.is_some();
            let used = if covered {
                found
            } else {
                found.start..found.start + 1
            };
            let end = used.end * self.geometry.cluster();
            if covered {
                for cluster in used.clone() {
                    writing.refcounts.set(&self.host, cluster, 1)?;
                }
            } else {
                self.add_block(writing, used.start, used.start)?;
            }
            tables.file_len = tables.file_len.max(end);
            self.reserve_ahead(tables, writing);
            if used.start == writing.low {
                writing.low = used.end;
            }
            writing.high = writing.high.max(used.end);
            if covered {
                return Ok(Ok(Allocation {
                    clusters: used,
                    fresh,
                }));
            }
        }
    }

    /// Allocates exactly `count` clusters in a row: a table's.
    pub(crate) fn allocate_row(
        &self,
        tables: &mut Tables,
        writing: &mut Writing,
        count: u64,
    ) -> Result<Result<Range<u64>, Blocked>> {
        let limit = self.file_limit() / self.geometry.cluster();
        let (mut start, mut at) = (writing.low, writing.low);
        while at - start < count {
            if start.saturating_add(count) > limit {
                return Ok(Err(Blocked::FileFull));
            }
            if at >= writing.refcounts.covered() {
                writing.high = writing.high.max(at);
                return Ok(Err(Blocked::TableFull));
            }
            let missing = count - (at - start);
            if writing.refcounts.block(&self.host, at)?.is_none() {
                // Its place is the row's first cluster: a row may need more than one block.
                if writing.metadata.contains(start) {
                    return Err(self.free_metadata(tables, start));
                }
                self.add_block(writing, at, start)?;
                start += 1;
                at = at.max(start);
                writing.high = writing.high.max(start);
                tables.file_len = tables.file_len.max(start * self.geometry.cluster());
                continue;
            }
            match self.free_run(writing, &mut at, missing)? {
                Some(free) => at = free.end,
                None => start = at,
            }
        }
        let row = start..at;
        if let Some(cluster) = row.clone().find(|&c| writing.metadata.contains(c)) {
            return Err(self.free_metadata(tables, cluster));
        }
        for cluster in row.clone() {
            writing.refcounts.set(&self.host, cluster, 1)?;
        }
        writing.high = writing.high.max(row.end);
        tables.file_len = tables.file_len.max(row.end * self.geometry.cluster());
        Ok(Ok(row))
    }

    /// Asks for space ahead if the file has grown past what was asked for: as much again as it has,
    /// within bounds.
    fn reserve_ahead(&self, tables: &Tables, writing: &mut Writing) {
        let len = tables.file_len;
        if len <= writing.reserved {
            return;
        }
        let more = len.clamp(*RESERVED_AHEAD.start(), *RESERVED_AHEAD.end());
        let end = len.saturating_add(more).min(self.file_limit());
        // Without, the host finds space write by write.
        let reserved = self.host.storage.reserve(len, end.saturating_sub(len));
        writing.reserved = if reserved.is_ok() { end } else { u64::MAX };
    }

    /// Metadata is counted as free: the image is corrupt.
    fn free_metadata(&self, tables: &mut Tables, cluster: u64) -> Error {
        let at = cluster * self.geometry.cluster();
        self.mark_corrupt(
            tables,
            format!("the metadata at {at:#x} has the refcount 0"),
        )
    }

    /// Makes `block`, which is free, the refcount block of the range that `cluster` is in and
    /// that has none yet. `block` is in that range too, or counted already.
    fn add_block(&self, writing: &mut Writing, cluster: u64, block: u64) -> Result<()> {
        let at = block * self.geometry.cluster();
        self.host.zero(at, self.geometry.cluster())?;
        writing.refcounts.blocks.forget(at, self.geometry.cluster());
        writing.refcounts.set_block(cluster, at);
        writing.metadata.insert([block]);
        writing.refcounts.set(&self.host, block, 1)
    }

    /// Free clusters in a row, all counted by one block.
    fn find(
        &self,
        writing: &mut Writing,
        most: u64,
        thorough: bool,
    ) -> Result<Result<Range<u64>, Blocked>> {
        let mut budget = if thorough { usize::MAX } else { SEARCH_SLICES };
        let mut at = if thorough { 1 } else { writing.low };
        while at < writing.high && at < writing.refcounts.covered() && budget > 0 {
            let limit = most.min(writing.high - at);
            if let Some(found) = self.free_run(writing, &mut at, limit)? {
                writing.low = at;
                return Ok(Ok(found));
            }
            budget -= 1;
            writing.low = at;
        }
        let mut at = writing.high;
        loop {
            if at >= writing.refcounts.covered() {
                return Ok(Err(Blocked::TableFull));
            }
            let limit = self.file_limit() / self.geometry.cluster();
            let most = most.min(limit.saturating_sub(at));
            if most == 0 {
                return Ok(Err(Blocked::FileFull));
            }
            if let Some(found) = self.free_run(writing, &mut at, most)? {
                return Ok(Ok(found));
            }
            writing.high = at;
        }
    }

    /// The free run at `at`, or `None` and `at` moved on past what is in use. What is free and
    /// still held counts as in use.
    fn free_run(
        &self,
        writing: &mut Writing,
        at: &mut u64,
        most: u64,
    ) -> Result<Option<Range<u64>>> {
        let slice = writing.refcounts.per_slice();
        let (free, _) = writing.refcounts.run(&self.host, *at, 1)?;
        if !free {
            *at += writing.refcounts.run(&self.host, *at, slice)?.1;
            return Ok(None);
        }
        if writing.held.contains(at) {
            *at += 1;
            return Ok(None);
        }
        let (_, len) = writing.refcounts.run(&self.host, *at, most)?;
        let end = (*at..*at + len).find(|cluster| writing.held.contains(cluster));
        Ok(Some(*at..end.unwrap_or(*at + len)))
    }

    /// Moves the refcount table to a place twice its size at the file's end: the new table, a
    /// sync, the header, a sync, and the old one is free. Nothing is in flight meanwhile.
    pub(crate) fn grow_refcount_table(&self) -> Result<()> {
        let mut state = self.state();
        while state
            .writing
            .as_ref()
            .is_some_and(|writing| writing.flushing || writing.alone)
        {
            state = self.wait(state);
        }
        let State { tables, writing } = &mut *state;
        writing
            .as_mut()
            .map_or(Ok(()), |writing| self.move_table(tables, writing))
    }

    pub(crate) fn move_table(&self, tables: &mut Tables, writing: &mut Writing) -> Result<()> {
        let refcounts = &mut writing.refcounts;
        if writing.high < refcounts.covered() {
            return Ok(()); // Another thread was faster.
        }
        let cluster = self.geometry.cluster();
        let entries_per_cluster = self.geometry.table_entries();
        let old_clusters = refcounts.table.len() as u64 / entries_per_cluster;
        let per_block = refcounts.per_block();
        let start = writing.high;
        let first_block = start / per_block;
        let most = MAX_REFCOUNT_TABLE_BYTES / cluster;
        let mut clusters = (old_clusters * 2)
            .max(first_block / entries_per_cluster + 1)
            .min(most);
        // The blocks that count the new table and themselves.
        let mut blocks = 1;
        loop {
            let last_block = (start + clusters + blocks - 1) / per_block;
            if blocks < last_block - first_block + 1 {
                blocks += 1;
            } else if last_block >= clusters * entries_per_cluster && clusters < most {
                clusters += 1;
            } else if last_block >= clusters * entries_per_cluster {
                return Err(self.full(refcounts.covered().saturating_mul(cluster)));
            } else {
                break;
            }
        }
        let region = start..start + clusters + blocks;
        if region.end > self.file_limit() / cluster {
            return Err(self.full(self.file_limit()));
        }
        let mut table = refcounts.table.clone();
        table.resize((clusters * entries_per_cluster) as usize, 0);
        for i in 0..blocks {
            let at = (start + clusters + i) * cluster;
            let block = refcounts.new_block((first_block + i) * per_block, region.clone());
            self.host.write(at, &block)?;
            refcounts.blocks.forget(at, cluster);
            if let Some(entry) = table.get_mut((first_block + i) as usize) {
                *entry = at;
            }
        }
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.host.write(start * cluster, &bytes)?;
        // The new table names blocks that count themselves, perhaps in the cache only.
        let counted = self.write_pieces(&refcounts.blocks.take_dirty());
        let counted = counted.and_then(|()| self.host.sync());
        refcounts.blocks.settle(counted.is_ok());
        counted?;

        // After a failure the header may name either table, and only one would be kept up.
        self.change_header(tables, |header| {
            header.refcount_table_offset = start * cluster;
            header.refcount_table_clusters = clusters;
        })?;
        let old = self
            .geometry
            .span(refcounts.table_offset, old_clusters * cluster);
        refcounts.table = table;
        refcounts.table_offset = start * cluster;
        refcounts.dirty.clear();
        writing.drop_table(old);
        writing.metadata.insert(region.clone());
        writing.high = region.end;
        tables.file_len = tables.file_len.max(region.end * cluster);
        Ok(())
    }

    /// How long the file may be.
    pub(crate) fn file_limit(&self) -> u64 {
        self.max_file_size.unwrap_or(u64::MAX).min(MAX_HOST_OFFSET)
    }

    pub(crate) fn full(&self, limit: u64) -> Error {
        Error::Full {
            file: self.host.path.clone(),
            limit,
        }
    }
}
