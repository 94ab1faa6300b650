//! Guest data that lies where a table is gets a place of its own.
//!
//! What the disk reads there stays what it reads: the clusters are copied to the file's end, `|`
//! the entries name the copies, `|` where `|` is a sync. Refcounts are repaired afterwards.

use std::collections::{BTreeMap, BTreeSet};

use crate::entry::{COPIED, Mapping};
use crate::error::Result;

use super::Subject;
use super::repair::patch;
use super::survey::Survey;

/// Offsets up to here fit into every kind of entry.
const MAX_OFFSET: u64 = (1 << 49) - 1;

/// Moves what lies in `runs` of clusters, each of which holds a table too.
pub(super) fn relocate(
    subject: &Subject<'_>,
    survey: &Survey,
    runs: &BTreeSet<(u64, u64)>,
) -> Result<()> {
    let (host, geometry) = (subject.host, subject.header.geometry);
    let size = geometry.cluster();
    let mut copies = BTreeMap::new();
    let mut end = subject.clusters();
    for &(start, behind) in runs {
        copies.insert((start, behind), end);
        let mut bytes = vec![0; ((behind - start) * size) as usize];
        host.read(start * size, &mut bytes)?;
        host.write(end * size, &bytes)?;
        end += behind - start;
    }
    host.sync()?;
    survey.for_each_table(subject, |table, bytes| {
        let mut bytes = bytes.to_vec();
        let entry_bytes = geometry.l2_entry() as usize;
        patch(host, table.offset, &mut bytes, entry_bytes, &mut |entry| {
            let mapping = Mapping::decode(entry, subject.header.version, geometry).ok()?;
            let old = mapping.clusters(geometry);
            let copy = copies.get(&(old.start, old.end))?;
            if copy * size > MAX_OFFSET {
                return None;
            }
            // An offset moves by whole clusters, and COPIED is for the next step to set.
            Some((entry.descriptor & !COPIED) - old.start * size + copy * size)
        })?;
        Ok(())
    })?;
    host.sync()
}
