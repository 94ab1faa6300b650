//! Applying a snapshot: the disk becomes what it was, its size too.

use super::Selector;
use super::recount::Recount;
use super::switch::{Disk, Switch};
use super::tree::Tree;
use crate::entry::COPIED;
use crate::error::{Result, Violation};
use crate::image::Image;

impl Image {
    /// Makes the disk what it was when the snapshot was made: content, [`size`](Image::size), VM
    /// state. The snapshot stays; what was written since the last one is lost. A crash leaves all of
    /// the one disk or all of the other. Writers wait, and whoever holds a [`Pin`](crate::Pin) or a
    /// [`Fill`](crate::Fill) of a plan must come to its end first.
    pub fn apply_snapshot(&self, which: &Selector) -> Result<()> {
        let qcow2 = self.with_snapshots()?;
        let alone = qcow2.alone()?;
        alone.record_sizes()?;
        let mut before = alone.before()?;
        let index = before.snapshots.find(&qcow2.host, which)?;
        let entry = before.snapshots.entries.swap_remove(index);
        let size = entry.disk_size(before.header.size);
        let mut l1 = qcow2.host.read_l1(entry.l1_offset, entry.l1_entries)?;
        let tree = Tree::new(qcow2, entry.l1_offset, &l1, before.file_len)?;
        {
            let mut state = qcow2.state();
            let (tables, writing) = qcow2.split(&mut state)?;
            let is_other = |&&table: &&u64| {
                let cluster = qcow2.geometry.index(table);
                writing.metadata.contains(cluster) && !before.tree.has(table)
            };
            if let Some(table) = tree.tables().iter().find(is_other) {
                let (field, value) = ("L1 entry of a snapshot", format!("{table:#x}"));
                let expected = "an L2 table that is no other metadata";
                let violation = Violation::new(field, entry.l1_offset, value, expected);
                return Err(qcow2.host.invalid(violation));
            }
            qcow2.check_bitmaps_fit(tables, size)?;
            qcow2.mark_dirty(tables, writing, 0..qcow2.size())?;
        }
        let entries = l1.len().max(qcow2.geometry.l1_entries(size) as usize);
        l1.resize(entries.max(1), 0);
        l1.iter_mut().for_each(|entry| *entry &= !COPIED);

        let mut recount = Recount::new(qcow2, before.file_len);
        recount.tree(&tree, 1);
        recount.tree(&before.tree, -1);
        let l1_bytes = before.header.l1_entries as u64 * 8;
        recount.drop_table(qcow2.geometry.span(before.header.l1_offset, l1_bytes));
        let switch = Switch {
            recount,
            shared: Some(&tree),
            disk: Some(Disk {
                size,
                l1,
                trees: (&before.tree, &tree),
            }),
            snapshots: None,
        };
        alone.switch(switch)?;
        alone.renew_copied()
    }
}
