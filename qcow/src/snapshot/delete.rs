//! Deleting a snapshot: what it alone refers to is freed.

use super::Selector;
use super::recount::Recount;
use super::switch::Switch;
use super::tree::Tree;
use crate::error::Result;
use crate::image::Image;

impl Image {
    /// Deletes a snapshot and frees what nothing else refers to. The disk stays as it is. Writers
    /// wait, and whoever holds a [`Pin`](crate::Pin) of a plan must drop it first.
    pub fn delete_snapshot(&self, which: &Selector) -> Result<()> {
        let qcow2 = self.with_snapshots()?;
        let alone = qcow2.alone()?;
        let mut before = alone.before()?;
        let index = before.snapshots.find(&qcow2.host, which)?;
        let old_table = before.snapshots.clusters(qcow2.geometry);
        let entry = before.snapshots.entries.remove(index);
        let l1 = qcow2.host.read_l1(entry.l1_offset, entry.l1_entries)?;
        let tree = Tree::new(qcow2, entry.l1_offset, &l1, before.file_len)?;

        let mut recount = Recount::new(qcow2, before.file_len);
        recount.tree(&tree, -1);
        recount.drop_table(entry.l1_clusters(qcow2.geometry));
        recount.drop_table(old_table);
        let switch = Switch {
            recount,
            shared: None,
            disk: None,
            snapshots: Some(before.snapshots.entries),
        };
        alone.switch(switch)?;
        alone.renew_copied()
    }
}
