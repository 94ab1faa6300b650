//! Reading tables, but for those in holes of the file.

use std::collections::BTreeSet;

use crate::error::Result;
use crate::holes::Data;

use super::Subject;
use super::survey::{L2Table, Survey};

/// Tables are read in pieces of this many bytes.
const PIECE: u64 = 1 << 20;

impl Survey {
    /// Where there is data.
    fn data<'a>(&self, subject: &'a Subject<'_>) -> Result<Data<'a>> {
        let named = self.blocks.iter().filter(|block| **block != 0).count();
        let tables = (self.tables.len() + named + self.empty_blocks.len()) as u64;
        let bytes = tables.saturating_mul(subject.header.geometry.cluster());
        Data::new(subject.host, bytes)
    }

    /// Sets the refcount blocks apart that lie in holes.
    pub(super) fn find_holes(&mut self, subject: &Subject<'_>) -> Result<()> {
        let cluster = subject.header.geometry.cluster();
        let mut data = self.data(subject)?;
        if !data.is_sparse() {
            return Ok(());
        }
        let named = self.blocks.iter().filter(|block| **block != 0);
        let mut blocks: Vec<u64> = named.copied().collect();
        blocks.sort_unstable();
        for block in blocks {
            if !data.is_in(block, cluster)? {
                self.empty_blocks.push(block);
            }
        }
        let empty = &self.empty_blocks;
        for block in &mut self.blocks {
            if empty.binary_search(block).is_ok() {
                *block = 0;
            }
        }
        Ok(())
    }

    /// Takes blocks that lie in holes for what they are to become: the `missing` entries of a refcount
    /// table, all entries of which are `offsets`.
    pub(super) fn fill_holes(&mut self, missing: &BTreeSet<usize>, offsets: &[u64]) {
        for (entry, (block, offset)) in self.blocks.iter_mut().zip(offsets).enumerate() {
            if missing.contains(&entry) {
                *block = *offset;
            }
        }
        let blocks: BTreeSet<u64> = self.blocks.iter().copied().collect();
        self.empty_blocks.retain(|block| !blocks.contains(block));
    }

    /// Reads the L2 tables in the order of the file, adjacent ones at once.
    pub(super) fn for_each_table(
        &self,
        subject: &Subject<'_>,
        mut visit: impl FnMut(&L2Table, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let size = subject.header.geometry.cluster();
        let mut data = self.data(subject)?;
        let most = if data.is_sparse() {
            1
        } else {
            (PIECE / size).max(1)
        };
        let mut bytes = Vec::new();
        let follows = |a: &L2Table, b: &L2Table| a.offset.checked_add(size) == Some(b.offset);
        for run in self.tables.chunk_by(follows) {
            for part in run.chunks(most as usize) {
                let (offset, len) = (part.first().map_or(0, |table| table.offset), part.len());
                if !data.is_in(offset, len as u64 * size)? {
                    continue;
                }
                bytes.resize(len * size as usize, 0);
                subject.host.read(offset, &mut bytes)?;
                for (table, bytes) in part.iter().zip(bytes.chunks_exact(size as usize)) {
                    visit(table, bytes)?;
                }
            }
        }
        Ok(())
    }
}
