//! The size of a snapshot's disk where its entry does not say it: that of the disk today, until
//! this changes.

use super::recount::Recount;
use super::switch::Switch;
use super::table::{Entry, Table};
use crate::alone::Alone;
use crate::error::Result;

impl Alone<'_> {
    /// Writes into the snapshot table what version 2 could leave out, and damaged or foreign images
    /// of version 3 leave out too. Nothing is written if it is all there.
    pub(crate) fn record_sizes(&self) -> Result<()> {
        let qcow2 = self.qcow2;
        let (header, file_len) = {
            let tables = &qcow2.state().tables;
            (tables.header.clone(), tables.file_len)
        };
        let table = Table::read(&qcow2.host, &header, file_len)?;
        if table.entries.iter().all(Entry::has_sizes) {
            return Ok(());
        }
        let mut recount = Recount::new(qcow2, file_len);
        recount.drop_table(table.clusters(qcow2.geometry));
        let mut entries = table.entries;
        entries
            .iter_mut()
            .for_each(|entry| entry.add_sizes(header.size));
        self.switch(Switch {
            recount,
            shared: None,
            disk: None,
            snapshots: Some(entries),
        })
    }
}
