//! Flushing: tables reach the file in an order in which no crash can break the image.
//!
//! `|` is a sync, left out when its side is empty: data, new L2 tables, new refcount blocks and
//! increments `|` refcount table entries `|` L2 and L1 entries `|` decrements. The bytes of new
//! tables and blocks are written where they are made, so that they are always on the first side.
//!
//! An image with lazy refcounts has the dirty bit set while it is written. Refcounts wait then: what
//! is left is data `|` L2 and L1 entries. They are written as the image is closed, before the bit
//! is cleared; after a crash they are rebuilt as it is opened.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use crate::error::{Error, Result};
use crate::header::DIRTY;
use crate::image::Image;
use crate::layer::Layer;
use crate::qcow2::{Qcow2, State, Tables};
use crate::refcount::SECTOR_ENTRIES;
use crate::writing::Writing;

/// Pieces of a table by their offset in the file.
type Pieces = Vec<(u64, Vec<u8>)>;

/// Adjacent pieces are written together up to this many bytes.
const JOIN_BYTES: usize = 1 << 20;

/// What one flush writes, taken at one moment.
struct Batch {
    refcounts: Pieces,
    refcount_table: Pieces,
    l2: Pieces,
    l1: Pieces,
    dropped: BTreeMap<u64, u64>,
}

impl Image {
    /// Makes every write that has ended durable.
    pub fn flush(&self) -> Result<()> {
        match self.layers.first() {
            Some(Layer::Qcow2(qcow2)) if qcow2.writable => qcow2.flush(),
            Some(layer) if layer.writable() => layer.host().sync(),
            _ => Ok(()),
        }
    }

    /// Whether a [`flush`](Self::flush) would be nothing but an fdatasync(2) of the first of
    /// [`files`](Self::files). The caller may begin that now instead, and hands what became of it to
    /// [`synced`](Self::synced).
    pub fn needs_sync_only(&self) -> bool {
        self.layers.first().is_some_and(|layer| match layer {
            Layer::Qcow2(qcow2) => qcow2.writable && qcow2.needs_sync_only(),
            Layer::Raw(raw) => layer.writable() && raw.host.storage.syncs_file(),
        })
    }

    /// Ends a flush that was a sync: what [`flush`](Self::flush) would have said.
    pub fn synced(&self, result: io::Result<()>) -> Result<()> {
        match self.layers.first() {
            Some(layer) => layer.host().synced(result),
            None => Ok(()),
        }
    }
}

impl Qcow2 {
    /// Writes out what was changed before the call, in order, and frees what was dropped.
    pub(crate) fn flush(&self) -> Result<()> {
        self.flush_unless(|writing| writing.flushing || writing.alone)
    }

    /// The same for who has the image [alone](Self::alone).
    pub(crate) fn flush_alone(&self) -> Result<()> {
        self.flush_unless(|writing| writing.flushing)
    }

    fn flush_unless(&self, busy: impl Fn(&Writing) -> bool) -> Result<()> {
        let mut state = self.state();
        while state.writing.as_deref().is_some_and(&busy) {
            state = self.wait(state);
        }
        if let Some(reason) = &state.tables.stopped {
            return Err(Error::Corrupt {
                file: self.host.path.clone(),
                reason: reason.clone(),
            });
        }
        let State {
            tables,
            writing: Some(writing),
        } = &mut *state
        else {
            drop(state);
            self.data.sync()?;
            return self.host.sync();
        };
        writing.flushing = true;
        let batch = self.take(tables, writing);
        drop(state);
        let written = self.write_out(&batch);
        let flushed = self.settle(batch, written);
        let mut state = self.state();
        if let Some(writing) = &mut state.writing {
            writing.flushing = false;
        }
        drop(state);
        self.notify();
        flushed
    }

    fn needs_sync_only(&self) -> bool {
        let state = self.state();
        // A flush gives back clusters that are held, and has the tables of another one to wait for.
        let idle =
            |writing: &Writing| !writing.flushing && !writing.alone && writing.held.is_empty();
        state.tables.stopped.is_none()
            && state.writing.as_deref().is_none_or(idle)
            && is_clean(&state)
            && !self.data.is_external()
            && self.host.storage.syncs_file()
    }

    fn take(&self, tables: &mut Tables, writing: &mut Writing) -> Batch {
        let deferred = writing.defers_refcounts();
        let refcounts = &mut writing.refcounts;
        let (blocks, table_sectors) = if deferred {
            Default::default()
        } else {
            (
                refcounts.blocks.take_dirty(),
                std::mem::take(&mut refcounts.dirty),
            )
        };
        let l1_sectors = std::mem::take(&mut writing.l1_dirty);
        Batch {
            refcounts: blocks,
            refcount_table: sectors(&refcounts.table, refcounts.table_offset, &table_sectors),
            l2: tables.l2.take_dirty(),
            l1: sectors(&tables.l1, tables.header.l1_offset, &l1_sectors),
            dropped: std::mem::take(&mut writing.dropped),
        }
    }

    fn write_out(&self, batch: &Batch) -> Result<()> {
        self.data.sync()?;
        self.write_pieces(&batch.refcounts)?;
        self.host.sync()?;
        if !batch.refcount_table.is_empty() {
            self.write_pieces(&batch.refcount_table)?;
            self.host.sync()?;
        }
        if !batch.l2.is_empty() || !batch.l1.is_empty() {
            self.write_pieces(&batch.l2)?;
            self.write_pieces(&batch.l1)?;
            self.host.sync()?;
        }
        Ok(())
    }

    /// Follows up on a batch: what was not written is dirty again, or else what it dropped is
    /// decremented, and what nothing can still be using becomes free.
    fn settle(&self, batch: Batch, written: Result<()>) -> Result<()> {
        let mut state = self.state();
        let State {
            tables,
            writing: Some(writing),
        } = &mut *state
        else {
            return written;
        };
        tables.l2.settle(written.is_ok());
        writing.refcounts.blocks.settle(written.is_ok());
        if let Err(error) = written {
            let sector = |base: u64, pieces: &Pieces| {
                let of = move |(at, _): &(u64, Vec<u8>)| (at - base) / (SECTOR_ENTRIES * 8);
                pieces.iter().map(of).collect::<Vec<_>>()
            };
            let table_offset = writing.refcounts.table_offset;
            writing
                .refcounts
                .dirty
                .extend(sector(table_offset, &batch.refcount_table));
            writing
                .l1_dirty
                .extend(sector(tables.header.l1_offset, &batch.l1));
            for (cluster, references) in batch.dropped {
                *writing.dropped.entry(cluster).or_default() += references;
            }
            return Err(error);
        }
        // Their refcounts were zero in the cache before the batch was taken.
        let mut freed = std::mem::take(&mut writing.freed);
        if !batch.dropped.is_empty() {
            let decremented = self.decrement(tables, writing, batch.dropped);
            let pieces = if writing.defers_refcounts() {
                Pieces::new()
            } else {
                writing.refcounts.blocks.take_dirty()
            };
            drop(state);
            let synced = decremented.and_then(|()| match pieces.is_empty() {
                true => Ok(()),
                false => self.write_pieces(&pieces).and_then(|()| self.host.sync()),
            });
            state = self.state();
            let State {
                writing: Some(writing),
                ..
            } = &mut *state
            else {
                return synced;
            };
            writing.refcounts.blocks.settle(synced.is_ok());
            if synced.is_err() {
                writing.freed.append(&mut freed);
                return synced;
            }
            freed.append(&mut writing.freed);
        }
        let State {
            writing: Some(writing),
            ..
        } = &mut *state
        else {
            return Ok(());
        };
        if !freed.is_empty() {
            writing.draining.push_back((self.pins.advance(), freed));
        }
        let mut reusable = Vec::new();
        while writing
            .draining
            .front()
            .is_some_and(|(epoch, _)| self.pins.drained(*epoch))
        {
            reusable.extend(
                writing
                    .draining
                    .pop_front()
                    .into_iter()
                    .flat_map(|(_, freed)| freed),
            );
        }
        drop(state);
        self.give_back(reusable);
        Ok(())
    }

    /// Lowers the refcounts of what was dropped; what reaches zero is held.
    fn decrement(
        &self,
        tables: &mut Tables,
        writing: &mut Writing,
        dropped: BTreeMap<u64, u64>,
    ) -> Result<()> {
        for (cluster, references) in dropped {
            let count = writing.refcounts.get(&self.host, cluster)?;
            let Some(left) = count.checked_sub(references) else {
                let at = cluster * self.geometry.cluster();
                let reason =
                    format!("the cluster at {at:#x} has the refcount {count}, and more references");
                return Err(self.mark_corrupt(tables, reason));
            };
            writing.refcounts.set(&self.host, cluster, left)?;
            if left == 0 {
                writing.freed.push(cluster);
                writing.held.insert(cluster);
                // No compressed cluster is put behind those that were there.
                let index = |at| self.geometry.index(at);
                writing.packing = writing.packing.filter(|&at| index(at) != cluster);
            }
        }
        Ok(())
    }

    /// Lets clusters be reused, after their bytes went back to the host.
    pub(crate) fn give_back(&self, mut clusters: Vec<u64>) {
        clusters.sort_unstable();
        let size = self.geometry.cluster();
        for run in clusters.chunk_by(|a, b| a + 1 == *b) {
            let Some(first) = run.first() else { continue };
            if let Err(error) = self.host.punch(first * size, run.len() as u64 * size) {
                tracing::debug!(%error, "freed clusters keep their place on the host");
            }
        }
        if let (Some(lowest), Some(writing)) = (clusters.first(), &mut self.state().writing) {
            writing.low = writing.low.min(*lowest);
            for cluster in &clusters {
                writing.held.remove(cluster);
            }
        }
    }

    /// Writes pieces in order, adjacent ones together.
    pub(crate) fn write_pieces(&self, pieces: &Pieces) -> Result<()> {
        let mut joined: Vec<u8> = Vec::new();
        let mut start = 0;
        for (at, bytes) in pieces {
            if start + joined.len() as u64 != *at || joined.len() >= JOIN_BYTES {
                self.write_joined(start, &joined)?;
                joined.clear();
                start = *at;
            }
            joined.extend_from_slice(bytes);
        }
        self.write_joined(start, &joined)
    }

    fn write_joined(&self, at: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            Ok(())
        } else {
            self.host.write(at, bytes)
        }
    }
}

/// Whether nothing waits for a flush but data.
fn is_clean(State { tables, writing }: &State) -> bool {
    let Some(writing) = writing else { return true };
    let refcounts = &writing.refcounts;
    tables.l2.is_clean()
        && writing.l1_dirty.is_empty()
        && writing.dropped.is_empty()
        && (writing.defers_refcounts() || refcounts.dirty.is_empty() && refcounts.blocks.is_clean())
}

/// Those sectors of a table, as the file has them.
fn sectors(table: &[u64], offset: u64, dirty: &BTreeSet<u64>) -> Pieces {
    let entries = SECTOR_ENTRIES as usize;
    dirty
        .iter()
        .map(|&sector| {
            let from = sector as usize * entries;
            let to = table.len().min(from + entries);
            let entries = table.get(from..to).unwrap_or_default();
            let bytes = entries
                .iter()
                .flat_map(|entry| entry.to_be_bytes())
                .collect();
            (offset + sector * SECTOR_ENTRIES * 8, bytes)
        })
        .collect()
}

impl Qcow2 {
    /// Writes out what is left, and then vouches for the refcounts again.
    pub(crate) fn close(&self) -> Result<()> {
        if let Some(writing) = &mut self.state().writing {
            writing.lazy = false;
        }
        let unclean = {
            let state = self.state();
            state.tables.stopped.is_none() && !is_clean(&state)
        };
        if unclean {
            self.flush()?;
        }
        let tables = &mut self.state().tables;
        if tables.header.incompatible & DIRTY != 0 && tables.stopped.is_none() {
            self.change_header(tables, |header| header.incompatible &= !DIRTY)?;
        }
        Ok(())
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        // After a panic a flush may be under way for good, and nothing is known to be whole.
        if !self.writable || std::thread::panicking() {
            return;
        }
        let file = self.host.path.display();
        if let Err(error) = self.store_marks_at_last() {
            tracing::warn!(%file, %error, "an image is closed with inconsistent bitmaps");
        }
        if let Err(error) = self.close() {
            tracing::warn!(%file, %error, "cannot write out an image's tables as it is closed");
        }
    }
}
