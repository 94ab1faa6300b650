//! Giving back what whole clusters have, and the tables that only they need.

use std::ops::Range;

use crate::alone::Alone;
use crate::entry::{Mapping, Standard};
use crate::error::{Error, Result};
use crate::image::Image;

impl Image {
    /// Forgets what the disk's clusters have: the backing file shows through, or zeros do.
    /// Internal snapshots stay, and so does what lies beyond the disk.
    ///
    /// # Errors
    /// The image is a raw file, cannot be written, or a table is wrong.
    pub fn make_empty(&self) -> Result<()> {
        if let Some(qcow2) = self.writable_top()? {
            let alone = qcow2.alone()?;
            if qcow2.data.is_raw() {
                return alone.zero_raw();
            }
            alone.clear(0..qcow2.geometry.clusters(qcow2.size()), 0)?;
            return qcow2.flush_alone();
        }
        Err(Error::Unsupported {
            file: self.path().to_owned(),
            feature: "the raw format".into(),
            advice: "only a qcow2 image can be empty",
        })
    }
}

impl Alone<'_> {
    /// Makes a raw data file zeros. Its clusters keep their places, as they do ever.
    fn zero_raw(&self) -> Result<()> {
        let (qcow2, size) = (self.qcow2, self.qcow2.size());
        let mut state = qcow2.state();
        let (tables, writing) = qcow2.split(&mut state)?;
        qcow2.mark_dirty(tables, writing, 0..size)?;
        drop(state);
        qcow2.data.zero(0, 0, size)?;
        qcow2.flush_alone()
    }

    /// Gives back whole clusters, in or past the disk. Those before the cluster `zeroed` become
    /// zero clusters, the others unallocated.
    pub(crate) fn clear(&self, clusters: Range<u64>, zeroed: u64) -> Result<()> {
        let per_table = self.qcow2.geometry.l2_entries();
        let first = clusters.start / per_table;
        let last = self.qcow2.state().tables.l1.len() as u64;
        for index in first..last.min(clusters.end.div_ceil(per_table)) {
            let table = index * per_table..(index + 1) * per_table;
            let part = table.start.max(clusters.start)..table.end.min(clusters.end);
            if part == table && part.start >= zeroed {
                self.clear_table(index as usize)?;
            } else {
                self.clear_entries(index as usize, part, zeroed)?;
            }
        }
        Ok(())
    }

    /// Gives back all clusters that an L2 table names, and the table.
    fn clear_table(&self, index: usize) -> Result<()> {
        let qcow2 = self.qcow2;
        self.keep_within_bounds()?;
        let mut state = qcow2.state();
        let (tables, writing) = qcow2.split(&mut state)?;
        let Some((table, _)) = qcow2.l2_table(tables, index)? else {
            return Ok(());
        };
        // All of them or, after an error, none.
        let mut gone = Vec::new();
        let covers = qcow2.geometry.l2_entries() * qcow2.geometry.cluster();
        let start = index as u64 * covers;
        qcow2.mark_dirty(tables, writing, start..start + covers)?;
        qcow2.mappings(tables, start, covers, &mut |_, _, mapping| {
            if mapping != Mapping::NONE {
                gone.push(mapping);
            }
            true
        })?;
        for mapping in gone {
            writing.drop_mapping(mapping, qcow2);
        }
        qcow2.set_l1(tables, writing, index, 0);
        writing.drop_table(qcow2.geometry.span(table, 1));
        Ok(())
    }

    /// Gives back some of the clusters that an L2 table names.
    fn clear_entries(&self, index: usize, clusters: Range<u64>, zeroed: u64) -> Result<()> {
        let qcow2 = self.qcow2;
        let per_slice = qcow2.geometry.slice() / qcow2.geometry.l2_entry();
        let mut at = clusters.start;
        while at < clusters.end {
            let part = at..((at / per_slice + 1) * per_slice).min(clusters.end);
            at = part.end;
            self.keep_within_bounds()?;
            let mut state = qcow2.state();
            let (tables, writing) = qcow2.split(&mut state)?;
            if qcow2.l2_table(tables, index)?.is_none() && part.start >= zeroed {
                return Ok(());
            }
            let cluster = qcow2.geometry.cluster();
            qcow2.mark_dirty(tables, writing, part.start * cluster..part.end * cluster)?;
            self.own_table(tables, writing, index)?;
            let mut cluster = part.start;
            qcow2.change(tables, writing, part, &mut |old| {
                let zero = cluster < zeroed;
                cluster += 1;
                let new = if zero {
                    Standard::ZERO
                } else {
                    Standard::default()
                };
                Some((Mapping::Standard(new), Some(old)))
            })?;
        }
        Ok(())
    }
}
