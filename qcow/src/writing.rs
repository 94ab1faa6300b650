//! What a writer keeps beside the tables.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::ops::Range;

use crate::bitmap::{BITMAPS_VALID, Tracked};
use crate::entry::Mapping;
use crate::error::{Error, Result};
use crate::header::{CORRUPT, DIRTY, LAZY_REFCOUNTS, RAW_DATA};
use crate::metadata::Metadata;
use crate::qcow2::{Qcow2, Tables};
use crate::refcount::Refcounts;

/// Clusters that may wait to be freed, or to be reused after that: a bound on memory. Past it
/// discards do nothing, and zeroed clusters stay allocated.
const MAX_WAITING: usize = 1 << 18;
/// A flush is made when this many wait for one.
const FLUSH_AT: usize = 1 << 16;

/// What a writer keeps beside the tables.
pub(crate) struct Writing {
    pub(crate) refcounts: Refcounts,
    /// Sectors of the L1 table that differ from the file's.
    pub(crate) l1_dirty: BTreeSet<u64>,
    /// Clusters of metadata: never handed out, never a place for data.
    pub(crate) metadata: Metadata,
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
    /// The host was asked for space up to this byte.
    pub(crate) reserved: u64,
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
        self.metadata.remove(clusters.clone());
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

    /// Whether a flush leaves the refcounts in the file old, which the dirty bit says. They wait for
    /// the image's end, until they need the room, or for an operation that reads them in the file.
    pub(crate) fn defers_refcounts(&self) -> bool {
        self.lazy && !self.alone && !self.refcounts.blocks.is_strained()
    }

    /// Lets go of a claim; who waits for it must be told.
    pub(crate) fn end_claim(&mut self, claim: &Range<u64>) {
        if let Some(at) = self.allocating.iter().position(|other| other == claim) {
            self.allocating.swap_remove(at);
        }
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
            reserved: 0,
        })
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
