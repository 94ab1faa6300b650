//! COPIED, made right in the disk's own tables: set where the refcount is one, and only there.

use super::tree::Tree;
use crate::alone::Alone;
use crate::entry::{COPIED, Mapping};
use crate::error::Result;
use crate::holes::Data;
use crate::qcow2::Qcow2;
use crate::refcount;

/// Clusters of which it is known at a time whether they have one reference, in 16 MiB of memory: 8
/// TiB of 64 KiB clusters. The L2 tables are read again for each window.
const WINDOW: u64 = 1 << 27;

/// Which clusters from `first` on have one reference.
struct Single {
    first: u64,
    clusters: u64,
    bits: Vec<u64>,
}

impl Alone<'_> {
    /// Clears COPIED in the tree, and in the disk's L1 entries for its tables: more references are
    /// about to come. It is in the file then, without a sync.
    pub(crate) fn clear_copied(&self, tree: &Tree) -> Result<()> {
        self.rewrite_l1(&mut |table, entry| match tree.has(table) {
            true => entry & !COPIED,
            false => entry,
        })?;
        tree.rewrite(self.qcow2, &mut |_, entry| Ok(entry.descriptor & !COPIED))
    }

    /// Sets COPIED in the disk's L1 and L2 tables where there is one reference, clears it where
    /// there are more, and makes that durable. The refcounts are durable already.
    pub(crate) fn renew_copied(&self) -> Result<()> {
        let qcow2 = self.qcow2;
        let (file_len, per_block) = {
            let mut state = qcow2.state();
            let (tables, writing) = qcow2.split(&mut state)?;
            (tables.file_len, writing.refcounts.per_block())
        };
        let counted = qcow2.refcount_blocks()? * per_block;
        let clusters = qcow2.geometry.clusters(file_len).min(counted);
        let windows = (0..clusters).step_by(WINDOW as usize);
        let mut single = None;
        for first in windows.clone() {
            let single = &*single.insert(qcow2.single(first, WINDOW.min(clusters - first))?);
            self.rewrite_l1(&mut |table, entry| single.mark(qcow2.geometry.index(table), entry))?;
        }
        let tree = {
            let tables = &qcow2.state().tables;
            let mut own = tables.l1.clone();
            own.retain(|entry| entry & COPIED != 0);
            Tree::new(qcow2, tables.header.l1_offset, &own, file_len)?
        };
        for first in windows {
            let single = match single.take_if(|single| single.first == first) {
                Some(single) => single,
                None => qcow2.single(first, WINDOW.min(clusters - first))?,
            };
            tree.rewrite(qcow2, &mut |at, entry| {
                let host = match qcow2.decode(entry, at, file_len)? {
                    Mapping::Standard(standard) => standard.host,
                    Mapping::Compressed(_) => None,
                };
                let mark = |host| single.mark(qcow2.geometry.index(host), entry.descriptor);
                Ok(host.map_or(entry.descriptor, mark))
            })?;
        }
        qcow2.host.sync()
    }

    /// Changes the L1 entries that name a table, in memory and then in the file.
    fn rewrite_l1(&self, change: &mut dyn FnMut(u64, u64) -> u64) -> Result<()> {
        let qcow2 = self.qcow2;
        let mut state = qcow2.state();
        let tables = &mut state.tables;
        let mut changed = false;
        for index in 0..tables.l1.len() {
            let Some((table, _)) = qcow2.l2_table(tables, index)? else {
                continue;
            };
            if let Some(entry) = tables.l1.get_mut(index) {
                let new = change(table, *entry);
                changed |= new != *entry;
                *entry = new;
            }
        }
        if !changed {
            return Ok(());
        }
        let bytes: Vec<u8> = tables.l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        qcow2.host.write(tables.header.l1_offset, &bytes)
    }
}

impl Qcow2 {
    /// Entries of the refcount table up to the last that names a block.
    fn refcount_blocks(&self) -> Result<u64> {
        let mut state = self.state();
        let (_, writing) = self.split(&mut state)?;
        let last = writing
            .refcounts
            .table
            .iter()
            .rposition(|block| *block != 0);
        Ok(last.map_or(0, |last| last as u64 + 1))
    }

    /// Learns which clusters of a window have one reference.
    fn single(&self, first: u64, clusters: u64) -> Result<Single> {
        let mut bits = vec![0_u64; clusters.div_ceil(64) as usize];
        let cluster_bytes = self.geometry.cluster();
        let mut bytes = vec![0; cluster_bytes as usize];
        let mut data = Data::new(&self.host, self.refcount_blocks()? * cluster_bytes)?;
        let end = first + clusters;
        let mut next = first;
        while next < end {
            let (block, per_block, order) = {
                let mut state = self.state();
                let (tables, writing) = self.split(&mut state)?;
                let refcounts = &writing.refcounts;
                let block = refcounts.block(&self.host, next)?;
                (block, refcounts.per_block(), tables.header.refcount_order)
            };
            let block_start = next - next % per_block;
            let of_block = next..end.min(block_start + per_block);
            next = of_block.end;
            let Some(block) = block else { continue };
            if !data.is_in(block, cluster_bytes)? {
                continue;
            }
            self.host.read(block, &mut bytes)?;
            for cluster in of_block {
                if refcount::get(&bytes, cluster - block_start, order) == 1 {
                    let index = cluster - first;
                    if let Some(word) = bits.get_mut((index / 64) as usize) {
                        *word |= 1 << (index % 64);
                    }
                }
            }
        }
        Ok(Single {
            first,
            clusters,
            bits,
        })
    }
}

impl Single {
    /// The entry with COPIED as its cluster's refcount has it, if that is in the window.
    fn mark(&self, cluster: u64, entry: u64) -> u64 {
        let index = cluster.wrapping_sub(self.first);
        if index >= self.clusters {
            return entry;
        }
        let word = self.bits.get((index / 64) as usize).copied().unwrap_or(0);
        match word >> (index % 64) & 1 {
            1 => entry | COPIED,
            _ => entry & !COPIED,
        }
    }
}
