//! From version 3 to version 2: what that does not have must not be there, or is made otherwise.

use std::ops::Range;

use crate::alone::Alone;
use crate::check::{self, L2Table};
use crate::compress::Compression;
use crate::create::Preallocation;
use crate::entry::{Entry, Mapping, Standard};
use crate::error::{Result, Violation};
use crate::extension::BITMAPS;
use crate::header::DATA_FILE;
use crate::image::Image;
use crate::layer::Layer;
use crate::qcow2::Qcow2;
use crate::snapshot::table::Table;

/// Bytes of changed L2 tables that wait in memory for the clusters that they name.
const BATCH_BYTES: usize = 4 << 20;

impl Image {
    /// Whether the image uses nothing that version 2 cannot say.
    pub(crate) fn check_downgrade(&self, qcow2: &Qcow2) -> Result<()> {
        self.check_range(0, 0)?;
        let (header, file_len) = {
            let tables = &qcow2.state().tables;
            (tables.header.clone(), tables.file_len)
        };
        let refuse = |what: &str, advice: &str| {
            Err(qcow2.cannot_change(format!("version 2 has no {what}: {advice}")))
        };
        if header.geometry.is_extended() {
            return refuse("extended L2 entries", "convert the image");
        }
        if header.compression != Compression::Zlib {
            return refuse("compression but zlib", "convert the image");
        }
        if header.incompatible & DATA_FILE != 0 {
            return refuse("data file", "convert the image");
        }
        if header.extensions.get(BITMAPS).is_some() {
            return refuse("bitmaps", "remove them first");
        }
        for entry in Table::read(&qcow2.host, &header, file_len)?.entries {
            let described = entry.describe(header.size);
            let (name, size) = (&described.name, described.disk_size);
            if size != header.size || described.vm_state_size > u32::MAX.into() {
                let what = format!("snapshot like {name:?}, of another size");
                return refuse(&what, "delete it first");
            }
        }
        Ok(())
    }

    pub(crate) fn downgrade(&self, qcow2: &Qcow2) -> Result<()> {
        let below = self.layers.get(1).map_or(0, Layer::size);
        let alone = qcow2.alone()?;
        alone.expand_zeros(qcow2.geometry.clusters(below))?;
        drop(alone);
        qcow2.close()?;
        qcow2.rewrite_header(|header| {
            header.version = 2;
            (header.incompatible, header.compatible, header.autoclear) = (0, 0, 0);
            header.tail.clear();
        })
    }
}

/// L2 tables without zero clusters, and what becomes true when they are written.
#[derive(Default)]
struct Batch {
    tables: Vec<(u64, Vec<u8>)>,
    /// New clusters that they name, and how many references each gets.
    added: Vec<(Range<u64>, u64)>,
    /// Clusters that they name no more, and how many references each loses.
    gone: Vec<(u64, u64)>,
}

impl Alone<'_> {
    /// Replaces zero clusters in all L2 tables, those of snapshots too: by clusters of zeros before
    /// the guest's cluster `below`, where a backing file has bytes, and by nothing elsewhere. A table
    /// that is shared is changed once, and what it names has as many references as it has itself.
    ///
    /// New clusters and their refcounts `|` L2 entries `|` the old clusters' refcounts, `|` being a
    /// sync.
    fn expand_zeros(&self, below: u64) -> Result<()> {
        self.record_sizes()?;
        let header = self.qcow2.state().tables.header.clone();
        let mut batch = Batch::default();
        let walked = check::for_each_l2_table(&self.qcow2.host, &header, |table, bytes| {
            self.expand_table(table, bytes, below, &mut batch)?;
            if batch.tables.len() * bytes.len() >= BATCH_BYTES {
                self.write_batch(&mut batch)?;
            }
            Ok(())
        });
        if let Err(error) = walked.and_then(|()| self.write_batch(&mut batch)) {
            self.give_up(batch);
            return Err(error);
        }
        self.qcow2.flush_alone()?;
        // A cluster that a snapshot kept for nothing may be the disk's alone now.
        match header.snapshots {
            0 => Ok(()),
            _ => self.renew_copied(),
        }
    }

    /// Adds a table to the batch if it has zero clusters.
    fn expand_table(
        &self,
        table: &L2Table,
        bytes: &[u8],
        below: u64,
        batch: &mut Batch,
    ) -> Result<()> {
        let qcow2 = self.qcow2;
        let geometry = qcow2.geometry;
        let (entry_bytes, references) = (geometry.l2_entry(), u64::from(table.references));
        let file_len = qcow2.state().tables.file_len;
        let mut zeros = Vec::new();
        for (index, entry) in (0..).zip(bytes.chunks_exact(entry_bytes as usize)) {
            let at = table.offset + index * entry_bytes;
            if let Mapping::Standard(standard) = qcow2.decode(Entry::read(entry), at, file_len)?
                && standard.zero != 0
            {
                zeros.push((index, standard.host));
            }
        }
        if zeros.is_empty() {
            return Ok(());
        }
        self.keep_within_bounds()?;
        let hosts = zeros.iter().filter_map(|(_, host)| *host);
        self.check_table(table, hosts.clone())?;
        let mut bytes = bytes.to_vec();
        let mut places = 0..0;
        let first = table.first_cluster(geometry);
        let filled = zeros.partition_point(|(index, _)| first + index < below);
        for (n, (index, _)) in zeros.iter().enumerate() {
            let mut mapping = Mapping::NONE;
            if n < filled {
                if places.is_empty() {
                    places = self.add_clusters((filled - n) as u64, references, batch)?;
                }
                let host = places.start * geometry.cluster();
                places.start += 1;
                let guest = (first + index) * geometry.cluster();
                if !qcow2.data.is_plain() {
                    qcow2.data.zero(guest, host, geometry.cluster())?;
                }
                mapping = Mapping::Standard(Standard {
                    host: Some(host),
                    copied: references == 1 && table.is_active(),
                    alloc: u32::MAX,
                    zero: 0,
                });
            }
            let from = (index * entry_bytes) as usize;
            mapping.encode(geometry).write(
                bytes
                    .get_mut(from..)
                    .unwrap_or_default()
                    .split_at_mut(entry_bytes as usize)
                    .0,
            );
        }
        let gone = hosts.map(|host| (geometry.index(host), references));
        batch.gone.extend(gone);
        batch.tables.push((table.offset, bytes));
        Ok(())
    }

    /// Whether a table counts all its references, and neither it nor what it gives back is metadata
    /// of another kind.
    fn check_table(&self, table: &L2Table, mut hosts: impl Iterator<Item = u64>) -> Result<()> {
        let qcow2 = self.qcow2;
        let mut state = qcow2.state();
        let (tables, writing) = qcow2.split(&mut state)?;
        let cluster = qcow2.geometry.index(table.offset);
        let wrong = |field: &str, value: String, expected: String| {
            let violation = Violation::new(field, table.offset, value, expected);
            Err(qcow2.host.invalid(violation))
        };
        if !table.is_active() && writing.metadata.contains(cluster) {
            let (value, expected) = ("other metadata", "a cluster of its own");
            return wrong("L2 table of a snapshot", value.into(), expected.into());
        }
        let count = writing.refcounts.get(&qcow2.host, cluster)?;
        if count < table.references.into() {
            let expected = format!("at least {}, its references", table.references);
            return wrong("refcount of the L2 table", count.to_string(), expected);
        }
        let is_table = |host: &u64| writing.metadata.contains(qcow2.geometry.index(*host));
        match hosts.find(is_table) {
            Some(host) => Err(qcow2.overlaps(tables, host)),
            None => Ok(()),
        }
    }

    /// Allocates one to `most` clusters in a row, which are zeros if they are not encrypted.
    fn add_clusters(&self, most: u64, references: u64, batch: &mut Batch) -> Result<Range<u64>> {
        let qcow2 = self.qcow2;
        let allocation = {
            let mut state = qcow2.state();
            let (tables, writing) = qcow2.split(&mut state)?;
            let allocation = self.allocate(tables, writing, most)?;
            for cluster in allocation.clusters.clone() {
                writing.refcounts.set(&qcow2.host, cluster, references)?;
            }
            allocation
        };
        batch.added.push((allocation.clusters.clone(), references));
        self.fill(0, &allocation, Preallocation::Metadata)?;
        Ok(allocation.clusters)
    }

    /// Writes the tables after what they name, and drops what they named.
    fn write_batch(&self, batch: &mut Batch) -> Result<()> {
        let qcow2 = self.qcow2;
        if !batch.added.is_empty() {
            qcow2.flush_alone()?;
        }
        // From here on the file may name what was added, and name no more what is gone.
        let Batch {
            tables: l2, gone, ..
        } = std::mem::take(batch);
        let mut state = qcow2.state();
        let (tables, writing) = qcow2.split(&mut state)?;
        for (at, bytes) in &l2 {
            tables.l2.forget(*at, bytes.len() as u64);
        }
        qcow2.write_pieces(&l2)?;
        for (cluster, references) in gone {
            *writing.dropped.entry(cluster).or_default() += references;
        }
        Ok(())
    }

    /// Gives back what no table came to name.
    fn give_up(&self, batch: Batch) {
        if let Some(writing) = &mut self.qcow2.state().writing {
            for (clusters, references) in batch.added {
                for cluster in clusters {
                    *writing.dropped.entry(cluster).or_default() += references;
                }
            }
        }
    }
}
