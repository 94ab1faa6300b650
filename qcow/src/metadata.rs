//! Where an image's tables are: clusters that are never handed out, and never a place for data.

use std::collections::HashMap;

use crate::error::{Error, Result, Violation};
use crate::header::{Encryption, Header};
use crate::qcow2::{Qcow2, Tables};
use crate::refcount::Refcounts;
use crate::snapshot::table::Table;

/// Bytes of L1, refcount and snapshot tables in an image that is written.
const MAX_SPANS: u64 = 256 << 20;

/// Clusters that hold metadata.
pub(crate) struct Metadata {
    /// Those that were found before the first write, sorted: 8 bytes for each table.
    found: Vec<u64>,
    /// What has changed since then: whether a cluster holds metadata now.
    changed: HashMap<u64, bool>,
}

impl Metadata {
    pub(crate) fn contains(&self, cluster: u64) -> bool {
        let found = || self.found.binary_search(&cluster).is_ok();
        self.changed.get(&cluster).copied().unwrap_or_else(found)
    }

    pub(crate) fn insert(&mut self, clusters: impl IntoIterator<Item = u64>) {
        self.changed.extend(clusters.into_iter().map(|c| (c, true)));
    }

    pub(crate) fn remove(&mut self, clusters: impl IntoIterator<Item = u64>) {
        self.changed
            .extend(clusters.into_iter().map(|c| (c, false)));
    }
}

/// What a table is, its offset and its length.
pub(crate) type Span = (&'static str, u64, u64);

/// What holds a cluster, in the bits below the cluster's number.
const KIND_BITS: u32 = 2;
const OTHER: u64 = 0;
const REFCOUNT_BLOCK: u64 = 1;
const L2_TABLE: u64 = 2;
/// An L2 table that is shared: it is never written, and several entries may name it.
const SHARED_L2_TABLE: u64 = 3;

impl Qcow2 {
    /// The clusters that hold metadata, or which two kinds of it overlap. An image may have
    /// millions of tables: it takes 8 bytes for each, once.
    pub(crate) fn find_metadata(
        &self,
        tables: &Tables,
        refcounts: &Refcounts,
    ) -> Result<Result<Metadata, String>> {
        let geometry = self.geometry;
        let spans = self.spans(tables, refcounts)?;
        let in_spans = spans
            .iter()
            .flat_map(|&(_, at, len)| geometry.span(at, len));
        let named = |table: &[u64]| table.iter().filter(|entry| **entry != 0).count();
        let most = in_spans.clone().count() + named(&refcounts.table) + named(&tables.l1);
        let mut found = Vec::with_capacity(most);
        found.extend(in_spans.map(|cluster| cluster << KIND_BITS | OTHER));
        for index in 0..refcounts.table.len() as u64 {
            if let Some(block) = refcounts.block(&self.host, index * refcounts.per_block())? {
                if block >= tables.file_len {
                    let at = refcounts.table_offset + index * 8;
                    let end = format!("a block before the file's end at {:#x}", tables.file_len);
                    let value = format!("{block:#018x}");
                    let wrong = Violation::new("refcount table entry", at, value, end);
                    return Err(self.host.invalid(wrong));
                }
                found.push(geometry.index(block) << KIND_BITS | REFCOUNT_BLOCK);
            }
        }
        for index in 0..tables.l1.len() {
            if let Some((table, copied)) = self.l2_table(tables, index)? {
                let kind = if copied { L2_TABLE } else { SHARED_L2_TABLE };
                found.push(geometry.index(table) << KIND_BITS | kind);
            }
        }
        found.sort_unstable();
        found.dedup_by(|a, b| a == b && *a & SHARED_L2_TABLE == SHARED_L2_TABLE);
        let twice = found
            .array_windows()
            .find(|[a, b]| a >> KIND_BITS == b >> KIND_BITS);
        if let Some([_, twice]) = twice {
            let cluster = twice >> KIND_BITS;
            let of_cluster = |what| (what, cluster * geometry.cluster(), geometry.cluster());
            let holds = |&&(_, at, len): &&Span| geometry.span(at, len).contains(&cluster);
            let (what, offset, _) = match twice & SHARED_L2_TABLE {
                REFCOUNT_BLOCK => of_cluster("refcount block"),
                L2_TABLE | SHARED_L2_TABLE => of_cluster("L2 table"),
                _ => spans
                    .iter()
                    .rfind(holds)
                    .copied()
                    .unwrap_or(of_cluster("table")),
            };
            return Ok(Err(format!(
                "the {what} at {offset:#x} overlaps other metadata"
            )));
        }
        found.iter_mut().for_each(|cluster| *cluster >>= KIND_BITS);
        let changed = HashMap::new();
        Ok(Ok(Metadata { found, changed }))
    }

    /// All tables but refcount blocks and L2 tables.
    fn spans(&self, tables: &Tables, refcounts: &Refcounts) -> Result<Vec<Span>> {
        let (header, cluster) = (&tables.header, self.geometry.cluster());
        let l1_bytes = header.l1_entries as u64 * 8;
        let refcount_bytes = refcounts.table.len() as u64 * 8;
        let mut spans = vec![
            ("header", 0, cluster),
            ("L1 table", header.l1_offset, l1_bytes),
            ("refcount table", refcounts.table_offset, refcount_bytes),
        ];
        if let Encryption::Luks { offset, len } = header.encryption {
            spans.push(("LUKS header", offset, len));
        }
        self.snapshot_spans(header, &mut spans)?;
        self.bitmap_spans(tables, &mut spans)?;
        Ok(spans)
    }

    /// Adds the snapshot table and the L1 tables of the snapshots.
    fn snapshot_spans(&self, header: &Header, spans: &mut Vec<Span>) -> Result<()> {
        let table = Table::read(&self.host, header, self.host.len()?)?;
        for entry in &table.entries {
            let l1_bytes = entry.l1_entries as u64 * 8;
            spans.push(("L1 table of a snapshot", entry.l1_offset, l1_bytes));
        }
        spans.push(("snapshot table", table.offset, table.len));
        let total = spans
            .iter()
            .fold(0_u64, |sum, (_, _, len)| sum.saturating_add(*len));
        if total > MAX_SPANS {
            return Err(Error::Unsupported {
                file: self.host.path.clone(),
                feature: format!("writing an image with {total} bytes of tables for snapshots"),
                advice: "delete some of its internal snapshots",
            });
        }
        Ok(())
    }
}
