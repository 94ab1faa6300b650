//! Growing the L1 table: it moves to a place that has room.

use crate::alone::Alone;
use crate::error::{Error, Result};
use crate::header::MAX_L1_BYTES;

impl Alone<'_> {
    /// Makes sure that the L1 table has at least `entries` entries; new ones name nothing. The new
    /// table and its refcounts, a sync, the header, a sync, and the old one is dropped.
    pub(crate) fn grow_l1(&self, entries: u64) -> Result<()> {
        let qcow2 = self.qcow2;
        let geometry = qcow2.geometry;
        let mut state = qcow2.state();
        let (tables, writing) = qcow2.split(&mut state)?;
        if entries <= tables.l1.len() as u64 {
            return Ok(());
        }
        if entries > MAX_L1_BYTES / 8 {
            let most = MAX_L1_BYTES / 8 * geometry.l2_entries() * geometry.cluster();
            let cluster = geometry.cluster();
            return Err(Error::Change {
                file: qcow2.host.path.clone(),
                reason: format!("clusters of {cluster} bytes reach {most} bytes, no more"),
            });
        }
        let row = self.allocate_table(tables, writing, geometry.clusters(entries * 8))?;
        let mut bytes: Vec<u8> = tables.l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        bytes.resize(
            (row.end - row.start) as usize * geometry.cluster() as usize,
            0,
        );
        let at = row.start * geometry.cluster();
        drop(state);
        let written = qcow2.host.write(at, &bytes);
        let written = written.and_then(|()| qcow2.flush_alone());

        let mut state = qcow2.state();
        let (tables, writing) = qcow2.split(&mut state)?;
        if let Err(error) = written {
            writing.drop_table(row);
            return Err(error);
        }
        let old = geometry.span(tables.header.l1_offset, tables.l1.len() as u64 * 8);
        qcow2.change_header(tables, |header| {
            header.l1_offset = at;
            header.l1_entries = entries as usize;
        })?;
        tables.l1.resize(entries as usize, 0);
        writing.drop_table(old);
        Ok(())
    }
}
