//! From one state of the image to the next: everything is made beside what there is, then the
//! header, in one sector, names the new tables instead of the old.

use std::ops::Range;

use super::recount::Recount;
use super::table::{Entry, Table};
use super::tree::Tree;
use crate::alone::Alone;
use crate::error::{Error, Result};
use crate::header::Header;
use crate::qcow2::Qcow2;

/// The image before an operation that has it alone.
pub(crate) struct Before {
    pub(crate) header: Header,
    pub(crate) l1: Vec<u64>,
    /// All that the L1 table leads to, VM state too.
    pub(crate) tree: Tree,
    pub(crate) snapshots: Table,
    pub(crate) file_len: u64,
}

/// What an operation makes of the image.
pub(crate) struct Switch<'a> {
    pub(crate) recount: Recount<'a>,
    /// What gets more references.
    pub(crate) shared: Option<&'a Tree>,
    pub(crate) disk: Option<Disk<'a>>,
    pub(crate) snapshots: Option<Vec<Entry>>,
}

/// The disk's new L1 table.
pub(crate) struct Disk<'a> {
    pub(crate) size: u64,
    pub(crate) l1: Vec<u64>,
    /// What the L1 table led to before, and what the new one leads to.
    pub(crate) trees: (&'a Tree, &'a Tree),
}

impl Alone<'_> {
    /// What there is before an operation.
    pub(crate) fn before(&self) -> Result<Before> {
        let qcow2 = self.qcow2;
        let state = qcow2.state();
        let (header, file_len) = (state.tables.header.clone(), state.tables.file_len);
        let l1 = state.tables.l1.clone();
        let snapshots = Table::read(&qcow2.host, &header, file_len)?;
        drop(state);
        let tree = Tree::new(qcow2, header.l1_offset, &l1, file_len)?;
        Ok(Before {
            header,
            l1,
            tree,
            snapshots,
            file_len,
        })
    }

    /// Makes the switch. After an error the image is as it was before, or else has leaks at worst.
    pub(crate) fn switch(&self, switch: Switch<'_>) -> Result<()> {
        let qcow2 = self.qcow2;
        let Switch {
            mut recount,
            shared,
            disk,
            snapshots,
        } = switch;
        let table = snapshots.as_deref().map(Table::encode).transpose();
        let table = table.map_err(|reason| qcow2.cannot_change(reason))?;
        recount.check()?;
        let l1 = disk.as_ref().map(|disk| {
            let entries = disk.l1.iter();
            entries.flat_map(|entry| entry.to_be_bytes()).collect()
        });
        let l1 = self.place(l1.unwrap_or_default())?;
        let table = match self.place(table.unwrap_or_default()) {
            Ok(table) => table,
            Err(error) => return Err(self.unplace([l1, 0..0], error)),
        };
        let ready = (|| {
            shared.map_or(Ok(()), |tree| self.clear_copied(tree))?;
            qcow2.flush_alone()?;
            recount.raise()
        })();
        if let Err(error) = ready {
            return Err(self.unplace([l1, table], error));
        }

        let cluster = qcow2.geometry.cluster();
        let mut state = qcow2.state();
        let (tables, writing) = qcow2.split(&mut state)?;
        qcow2.change_header(tables, |header| {
            if let Some(disk) = &disk {
                header.l1_offset = l1.start * cluster;
                header.l1_entries = disk.l1.len();
                header.size = disk.size;
            }
            if let Some(snapshots) = &snapshots {
                header.snapshots_offset = table.start * cluster;
                header.snapshots = snapshots.len() as u32;
            }
        })?;
        writing.packing = None; // Its cluster may be among what is about to be freed.
        writing.metadata.remove(recount.dropped());
        let moved = disk.is_some();
        if let Some(disk) = disk {
            tables.l1 = disk.l1;
            let (before, after) = disk.trees;
            let cluster_of = |table: &u64| qcow2.geometry.index(*table);
            writing
                .metadata
                .remove(before.tables().iter().map(cluster_of));
            writing
                .metadata
                .insert(after.tables().iter().map(cluster_of));
        }
        drop(state);
        if moved {
            // Who began to read before may be reading what is about to be freed.
            qcow2.pins.drain();
        }
        recount.lower()
    }

    /// Writes a table to clusters that nothing names yet; none if it is empty.
    fn place(&self, mut bytes: Vec<u8>) -> Result<Range<u64>> {
        if bytes.is_empty() {
            return Ok(0..0);
        }
        let geometry = self.qcow2.geometry;
        let count = geometry.clusters(bytes.len() as u64);
        let mut state = self.qcow2.state();
        let (tables, writing) = self.qcow2.split(&mut state)?;
        let row = self.allocate_table(tables, writing, count)?;
        drop(state);
        bytes.resize((count * geometry.cluster()) as usize, 0);
        match self
            .qcow2
            .host
            .write(row.start * geometry.cluster(), &bytes)
        {
            Ok(()) => Ok(row),
            Err(error) => Err(self.unplace([row, 0..0], error)),
        }
    }

    /// Gives back the clusters of tables that came to nothing.
    fn unplace(&self, tables: [Range<u64>; 2], error: Error) -> Error {
        if let Some(writing) = &mut self.qcow2.state().writing {
            for table in tables {
                writing.drop_table(table);
            }
        }
        error
    }
}

impl Qcow2 {
    pub(crate) fn cannot_change(&self, reason: String) -> Error {
        Error::Change {
            file: self.host.path.clone(),
            reason,
        }
    }
}
