//! Taking a snapshot: it keeps the disk's L1 table, and the disk goes on with a copy.

use std::time::UNIX_EPOCH;

use super::recount::Recount;
use super::switch::{Disk, Switch};
use super::table::Entry;
use super::tree::Tree;
use super::{NewSnapshot, Snapshot};
use crate::entry::COPIED;
use crate::error::Result;
use crate::image::Image;

/// Bytes of a name that QEMU's tools can select.
const MAX_NAME: usize = 255;

impl Image {
    /// Keeps the disk as it is now in a snapshot, which takes the VM state with it. What was
    /// written before is in it, what is written from now on is not; it is durable when this
    /// returns. Writers wait as long as it takes, and whoever holds a [`Pin`](crate::Pin) or a
    /// [`Fill`](crate::Fill) of a plan must come to its end first.
    ///
    /// Nothing has changed if a refcount is not wide enough for one more reference: a width of 1
    /// holds no snapshot, of 2 bits three states of the disk.
    pub fn create_snapshot(&self, new: &NewSnapshot) -> Result<Snapshot> {
        let qcow2 = self.with_snapshots()?;
        let wrong = |reason: &str| qcow2.cannot_change(reason.into());
        if new.name.is_empty() || new.name.len() > MAX_NAME || new.name.contains('\0') {
            return Err(wrong("a name has 1 to 255 bytes, none of them zero"));
        }
        let date = new.date.duration_since(UNIX_EPOCH).ok();
        let date = date.and_then(|d| Some((d.as_secs().try_into().ok()?, d.subsec_nanos())));
        let date = date.ok_or_else(|| wrong("a date is between 1970 and 2106"))?;
        let vm_clock = u64::try_from(new.vm_clock.as_nanos());
        let vm_clock = vm_clock.map_err(|_| wrong("the VM's clock has 64 bits of nanoseconds"))?;

        let alone = qcow2.alone()?;
        let before = alone.before()?;
        let size = before.header.size;
        // The VM state begins where an L1 entry does.
        let mut l1 = before.l1.clone();
        l1.truncate(qcow2.geometry.l1_entries(size) as usize);
        let disk = Tree::new(qcow2, before.header.l1_offset, &l1, before.file_len)?;
        let behind = (before.l1.len() - l1.len()) as u64;
        let room = behind.saturating_mul(qcow2.geometry.l2_entries() * qcow2.geometry.cluster());
        if new.vm_state_size > room {
            return Err(wrong("more VM state is named than was written"));
        }
        l1.iter_mut().for_each(|entry| *entry &= !COPIED);
        l1.resize(l1.len().max(1), 0); // A table without an entry would have no place.

        let id = before
            .snapshots
            .next_id()
            .map_err(|reason| wrong(&reason))?;
        let entry = Entry {
            l1_offset: before.header.l1_offset,
            l1_entries: before.l1.len(),
            id: id.into_bytes(),
            name: new.name.clone().into_bytes(),
            date,
            vm_clock,
            // Who knows only this field should see a disk rather than half of a VM.
            vm_state_size: new.vm_state_size.try_into().unwrap_or(0),
            extra: Entry::extra(new.vm_state_size, size, new.icount),
        };
        let made = entry.describe(size);
        let mut recount = Recount::new(qcow2, before.file_len);
        recount.tree(&disk, 1);
        recount.drop_table(before.snapshots.clusters(qcow2.geometry));
        let mut snapshots = before.snapshots.entries;
        snapshots.push(entry);
        let switch = Switch {
            recount,
            shared: Some(&before.tree),
            disk: Some(Disk {
                size,
                l1,
                trees: (&before.tree, &disk),
            }),
            snapshots: Some(snapshots),
        };
        alone.switch(switch)?;
        Ok(made)
    }
}
