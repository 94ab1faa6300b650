//! What a writer keeps beside the tables.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::ops::Range;

use crate::bitmap::{BITMAPS_VALID, Tracked};
use crate::entry::Mapping;
use crate::error::{Error, Result, Violation};
use crate::header::{CORRUPT, DIRTY, Encryption, Header, LAZY_REFCOUNTS, RAW_DATA};
use crate::qcow2::{Qcow2, Tables};
use crate::refcount::Refcounts;
use crate::snapshot::table::Table;

/// Clusters that may wait to be freed, or to be reused after that: a bound on memory. Past it
/// discards do nothing, and zeroed clusters stay allocated.
const MAX_WAITING: usize = 1 << 18;
/// A flush is made when this many wait for one.
const FLUSH_AT: usize = 1 << 16;

/// Bytes of L1, refcount and snapshot tables in an image that is written.
const MAX_SPANS: u64 = 256 << 20;

/// What a writer keeps beside the tables.
pub(crate) struct Writing {
    pub(crate) refcounts: Refcounts,
    /// Sectors of the L1 table that differ from the file's.
    pub(crate) l1_dirty: BTreeSet<u64>,
    /// Clusters of metadata: never handed out, never a place for data.
    pub(crate) metadata: HashSet<u64>,
    /// Bytes of the disk that are being allocated: other changes of their mapping wait.
    pub(crate) allocating: Vec<Range<u64>>,
    /// References that are gone, by cluster; the refcount follows in the next flush.
    pub(crate) dropped: BTreeMap<u64, u64>,
    /// Clusters whose refcount became zero in the cache, perhaps not yet in the file.
    pub(crate) freed: Vec<u64>,
    /// Clusters whose refcount is zero in the file, reusable when the epoch has drained.
    pub(crate) draining: VecDeque<(u64, Vec<u64>)>,
    /// All of `freed` and `draining`.
    pub(crate) held: HashSet<u64>,
    /// The first free byte behind the last compressed cluster, in a host cluster that the next one
    /// may share.
    pub(crate) packing: Option<u64>,
    /// Refcounts are not written by each flush: the dirty bit is set.
    pub(crate) lazy: bool,
    /// A flush runs.
    pub(crate) flushing: bool,
    /// An operation runs that must be alone.
    pub(crate) alone: bool,
    /// Marks of bitmaps, from the first change on.
    pub(crate) tracked: Option<Tracked>,
    /// Nothing below this cluster is free, as far as is known.
    pub(crate) low: u64,
    /// Everything from this cluster on is free, as far as is known.
    pub(crate) high: u64,
}

impl Writing {
    /// A reference to each cluster of a mapping is gone.
    pub(crate) fn drop_mapping(&mut self, mapping: Mapping, qcow2: &Qcow2) {
        // A data file's clusters have no refcounts.
        if !qcow2.data.is_external() {
            self.drop_clusters(mapping.clusters(qcow2.geometry));
        }
    }

    /// A reference to each of these clusters is gone.
    pub(crate) fn drop_clusters(&mut self, clusters: Range<u64>) {
        for cluster in clusters {
            *self.dropped.entry(cluster).or_default() += 1;
        }
    }

    /// The same for what held a table.
    pub(crate) fn drop_table(&mut self, clusters: Range<u64>) {
        for cluster in clusters.clone() {
            self.metadata.remove(&cluster);
        }
        self.drop_clusters(clusters);
    }

    /// Whether the bounds allow that more clusters wait to be freed.
    pub(crate) fn may_drop(&self) -> bool {
        self.dropped.len() + self.held.len() < MAX_WAITING
    }

    /// Whether it is time for a flush, to keep within bounds.
    pub(crate) fn is_strained(&self) -> bool {
        self.dropped.len() >= FLUSH_AT || self.refcounts.blocks.is_strained()
    }

    pub(crate) fn is_allocating(&self, guest: &Range<u64>) -> bool {
        self.allocating
            .iter()
            .any(|range| range.start < guest.end && guest.start < range.end)
    }
}

impl Qcow2 {
    /// Gets ready for the first write: loads the refcount table, learns where metadata is, and
    /// clears those autoclear bits that vouch for what is not kept up.
    pub(crate) fn start_writing(&self, tables: &mut Tables) -> Result<Writing> {
        let refcounts = Refcounts::load(&self.host, &tables.header, self.refcount_cache_bytes)?;
        let metadata = match self.find_metadata(tables, &refcounts)? {
            Ok(metadata) => metadata,
            Err(overlap) => return Err(self.mark_corrupt(tables, overlap)),
        };
        let raw = if self.data.is_raw() { RAW_DATA } else { 0 };
        let kept = BITMAPS_VALID | raw;
        if tables.header.autoclear & !kept != 0 {
            self.change_header(tables, |header| header.autoclear &= kept)?;
        }
        let lazy = tables.header.compatible & LAZY_REFCOUNTS != 0;
        if lazy {
            self.change_header(tables, |header| header.incompatible |= DIRTY)?;
        }
        Ok(Writing {
            refcounts,
            l1_dirty: BTreeSet::new(),
            metadata,
            allocating: Vec::new(),
            dropped: BTreeMap::new(),
            freed: Vec::new(),
            draining: VecDeque::new(),
            held: HashSet::new(),
            packing: None,
            lazy,
            flushing: false,
            alone: false,
            tracked: None,
            low: 1,
            high: self.geometry.clusters(tables.file_len),
        })
    }

    /// The clusters that hold metadata, or which two kinds of it overlap.
    fn find_metadata(
        &self,
        tables: &Tables,
        refcounts: &Refcounts,
    ) -> Result<Result<HashSet<u64>, String>> {
        let (header, geometry) = (&tables.header, self.geometry);
        let mut found = HashSet::from([0]);
        let mut shared = HashSet::new();
        let mut spans = vec![
            ("L1 table", header.l1_offset, header.l1_entries as u64 * 8),
            (
                "refcount table",
                header.refcount_table_offset,
                refcounts.table.len() as u64 * 8,
            ),
        ];
        if let Encryption::Luks { offset, len } = header.encryption {
            spans.push(("LUKS header", offset, len));
        }
        self.snapshot_spans(header, &mut spans)?;
        self.bitmap_spans(tables, &mut spans)?;
        for index in 0..refcounts.table.len() as u64 {
            if let Some(block) = refcounts.block(&self.host, index * refcounts.per_block())? {
                if block >= tables.file_len {
                    let at = header.refcount_table_offset + index * 8;
                    let end = format!("a block before the file's end at {:#x}", tables.file_len);
                    let value = format!("{block:#018x}");
                    let wrong = Violation::new("refcount table entry", at, value, end);
                    return Err(self.host.invalid(wrong));
                }
                spans.push(("refcount block", block, geometry.cluster()));
            }
        }
        for (what, offset, len) in spans {
            for cluster in geometry.span(offset, len) {
                if !found.insert(cluster) {
                    return Ok(Err(format!(
                        "the {what} at {offset:#x} overlaps other metadata"
                    )));
                }
            }
        }
        for index in 0..tables.l1.len() {
            let Some((table, copied)) = self.l2_table(tables, index)? else {
                continue;
            };
            let cluster = geometry.index(table);
            // Tables that are shared are never written; those that are not must be apart.
            let twice = if copied {
                shared.contains(&cluster)
            } else {
                false
            };
            let fresh = found.insert(cluster);
            if twice || !fresh && (copied || !shared.contains(&cluster)) {
                return Ok(Err(format!(
                    "the L2 table at {table:#x} overlaps other metadata"
                )));
            }
            if !copied {
                shared.insert(cluster);
            }
        }
        Ok(Ok(found))
    }

    /// Adds the snapshot table and the L1 tables of the snapshots.
    fn snapshot_spans(&self, header: &Header, spans: &mut Vec<(&str, u64, u64)>) -> Result<()> {
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

    /// Stops all writing, says so in the header if the version can, and makes the error.
    pub(crate) fn mark_corrupt(&self, tables: &mut Tables, reason: String) -> Error {
        if self.version >= 3 && tables.stopped.is_none() {
            let marked = self.change_header(tables, |header| header.incompatible |= CORRUPT);
            if let Err(error) = marked {
                tracing::warn!(%error, "cannot set the corrupt bit");
            }
        }
        tables.stopped = Some(reason.clone());
        Error::Corrupt {
            file: self.host.path.clone(),
            reason,
        }
    }
}
