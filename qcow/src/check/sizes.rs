//! Sizes of snapshots' disks and VM state, which version 3 demands of the snapshot table.

use crate::error::{Error, Result};
use crate::header::{DIRTY, Header};
use crate::host::Host;
use crate::snapshot::table::Table;

use super::repair::change;

/// Writes the snapshot table anew at the file's end, all its entries with sizes, `|` and moves the
/// header to it, where `|` is a sync. It is not counted yet, which the dirty bit says until it is.
pub(super) fn add_sizes(host: &Host, header: &mut Header) -> Result<()> {
    let (file_len, cluster) = (host.len()?, header.geometry.cluster());
    let mut table = Table::read(host, header, file_len)?;
    for entry in &mut table.entries {
        entry.add_sizes(header.size);
    }
    let bytes = Table::encode(&table.entries).map_err(|reason| Error::Change {
        file: host.path.clone(),
        reason,
    })?;
    let at = header.geometry.clusters(file_len) * cluster;
    host.set_len(at + header.geometry.clusters(bytes.len() as u64) * cluster)?;
    host.write(at, &bytes)?;
    host.sync()?;
    change(host, header, |header| {
        header.snapshots_offset = at;
        header.incompatible |= DIRTY;
    })
}
