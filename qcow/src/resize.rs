//! Changing a disk's size.
//!
//! Growing: what lies past the old end reads as zeros first, then the size changes. Shrinking: the
//! size changes first, then what lies past it is given back. So a crash leaves one size or the
//! other, and every byte that is in both.

use std::ops::Range;

use crate::alone::Alone;
use crate::entry::{Mapping, Standard};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::layer::Layer;
use crate::qcow2::{Place, Qcow2};

/// How to change a disk's size.
#[derive(Clone, Copy, Debug, Default)]
pub struct ResizeOptions {
    /// The disk may become smaller: what lies past its new end is lost.
    pub shrink: bool,
}

impl Image {
    /// Makes the disk `size` bytes long, a multiple of 512. New bytes are zeros, whatever a backing
    /// file has there. Waits for requests that run; whoever holds a plan's pin waits for itself.
    pub fn resize(&self, size: u64, options: &ResizeOptions) -> Result<()> {
        self.check_range(0, 0)?;
        let refuse = |reason: String| {
            Err(Error::Change {
                file: self.path().to_owned(),
                reason,
            })
        };
        if size > i64::MAX as u64 || !size.is_multiple_of(512) {
            return refuse(format!("the size {size} is no multiple of 512"));
        }
        loop {
            let old = self.size();
            if size < old && !options.shrink {
                return refuse(format!(
                    "{size} bytes are fewer than its {old}, and shrinking was not allowed"
                ));
            }
            let Some(qcow2) = self.writable_top()? else {
                return match self.layers.first() {
                    Some(Layer::Raw(raw)) => raw.set_size(size),
                    _ => Ok(()),
                };
            };
            if qcow2.version < 3 && qcow2.state().tables.header.snapshots > 0 {
                return refuse("a version 2 image with snapshots has one size".into());
            }
            // Ordinary writes: a guest's other writes go on meanwhile.
            let past = size.min(old);
            let end = qcow2.geometry.clusters(past) * qcow2.geometry.cluster();
            self.zero_tail(qcow2, past..end)?;
            let alone = qcow2.alone()?;
            if qcow2.size() != old {
                continue; // Another resize was faster.
            }
            return if size < old {
                alone.shrink(size)
            } else {
                alone.grow(old, size, self.layers.get(1).map_or(0, Layer::size))
            };
        }
    }

    /// Makes the rest of a cluster, from a disk's end on, read as zeros once it is part of a disk.
    fn zero_tail(&self, qcow2: &Qcow2, tail: Range<u64>) -> Result<()> {
        let mut runs = Vec::new();
        qcow2.resolve(tail.start, tail.end - tail.start, &mut runs)?;
        let below = self.layers.get(1).map_or(0, Layer::size) > tail.start;
        let zeros = runs.iter().all(|run| match run.place {
            Place::Zero => true,
            Place::Below => !below,
            Place::Data(_) | Place::Compressed(..) => false,
        });
        if zeros {
            return Ok(());
        }
        self.write_through(tail.start, &vec![0; (tail.end - tail.start) as usize])
    }
}

impl Alone<'_> {
    /// `below` is the size of the backing file: where it has bytes, nothing is not zeros.
    fn grow(&self, old: u64, size: u64, below: u64) -> Result<()> {
        let geometry = self.qcow2.geometry;
        let clusters = geometry.clusters(old)..geometry.clusters(size);
        let zeroed = geometry.clusters(below.min(size));
        if self.qcow2.version < 3 && zeroed > clusters.start {
            return Err(Error::Change {
                file: self.qcow2.host.path.clone(),
                reason: "its backing file is longer, and version 2 cannot hide what it has there: \
                         make it version 3 first"
                    .into(),
            });
        }
        self.grow_l1(geometry.l1_entries(size))?;
        self.clear(clusters, zeroed)?;
        self.qcow2.flush_alone()?;
        self.set_size(size)
    }

    fn shrink(&self, size: u64) -> Result<()> {
        let geometry = self.qcow2.geometry;
        self.set_size(size)?;
        self.clear(geometry.clusters(size)..u64::MAX, 0)?;
        self.qcow2.flush_alone()
    }

    fn set_size(&self, size: u64) -> Result<()> {
        let mut state = self.qcow2.state();
        let (tables, _) = self.qcow2.split(&mut state)?;
        self.qcow2
            .change_header(tables, |header| header.size = size)
    }

    /// Gives back whole clusters, in or past the disk. Those before the cluster `zeroed` become
    /// zero clusters, the others unallocated.
    fn clear(&self, clusters: Range<u64>, zeroed: u64) -> Result<()> {
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
