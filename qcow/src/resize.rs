//! Changing a disk's size.
//!
//! Growing: what lies past the old end reads as zeros first, then the size changes. Shrinking: the
//! size changes first, then what lies past it is given back. So a crash leaves one size or the
//! other, and every byte that is in both.

use std::ops::Range;

use crate::alone::Alone;
use crate::content::Content;
use crate::create::Preallocation;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::layer::{Layer, Raw};
use crate::qcow2::{Load, Place, Qcow2};

/// How to change a disk's size.
#[derive(Clone, Copy, Debug, Default)]
pub struct ResizeOptions {
    /// The disk may become smaller: what lies past its new end is lost.
    pub shrink: bool,
    /// What is allocated of the bytes that a disk gains. A raw file has no
    /// [`Metadata`](Preallocation::Metadata).
    pub preallocation: Preallocation,
}

impl Image {
    /// Makes the disk `size` bytes long, a multiple of 512 if it is no raw file: that gets the length
    /// that is asked for. New bytes are zeros, whatever a backing file has there. Waits for requests that run; whoever holds a plan's pin waits for itself.
    pub fn resize(&self, size: u64, options: &ResizeOptions) -> Result<()> {
        self.check_range(0, 0)?;
        let refuse = |reason: String| {
            Err(Error::Change {
                file: self.path().to_owned(),
                reason,
            })
        };
        let most = i64::MAX as u64 / 512 * 512;
        if size > most {
            return refuse(format!("the size {size} is more than {most}"));
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
                    Some(Layer::Raw(raw)) => resize_raw(raw, size, options.preallocation),
                    _ => Ok(()),
                };
            };
            if !size.is_multiple_of(512) {
                return refuse(format!("the size {size} is no multiple of 512"));
            }
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
            alone.record_sizes()?;
            return if size < old {
                alone.shrink(size)
            } else {
                let below = self.layers.get(1).map_or(0, Layer::size);
                alone.grow(old, size, below, options.preallocation)
            };
        }
    }

    /// Makes the rest of a cluster, from a disk's end on, read as zeros once it is part of a disk.
    fn zero_tail(&self, qcow2: &Qcow2, tail: Range<u64>) -> Result<()> {
        let mut runs = Vec::new();
        qcow2.resolve(tail.start, tail.end - tail.start, Load::Now, &mut runs)?;
        let below = self.layers.get(1).map_or(0, Layer::size) > tail.start;
        let zeros = runs.iter().all(|run| match run.place {
            Place::Zero => true,
            Place::Below => !below,
            Place::Data(_) | Place::Compressed(..) => false,
        });
        if zeros {
            return Ok(());
        }
        let zeros = vec![0; (tail.end - tail.start) as usize];
        self.write_through(tail.start, Content::Bytes(&zeros))
    }
}

fn resize_raw(raw: &Raw, size: u64, preallocation: Preallocation) -> Result<()> {
    if preallocation == Preallocation::Metadata {
        return Err(Error::Change {
            file: raw.host.path.clone(),
            reason: "a raw file has no metadata to preallocate".into(),
        });
    }
    let end = raw.host.len()?;
    raw.host.set_len(size)?;
    preallocation.reserve(&raw.host, end..size)?;
    raw.set_size(size.next_multiple_of(512));
    raw.host.sync()
}

impl Alone<'_> {
    /// `below` is the size of the backing file: where it has bytes, nothing is not zeros.
    fn grow(&self, old: u64, size: u64, below: u64, preallocation: Preallocation) -> Result<()> {
        let geometry = self.qcow2.geometry;
        let clusters = geometry.clusters(old)..geometry.clusters(size);
        let zeroed = geometry.clusters(below.min(size));
        let hidden = preallocation != Preallocation::Off || zeroed <= clusters.start;
        if self.qcow2.version < 3 && !hidden {
            return Err(Error::Change {
                file: self.qcow2.host.path.clone(),
                reason: "its backing file is longer, and version 2 cannot hide what it has there: \
                         make it version 3 first"
                    .into(),
            });
        }
        let blank = preallocation != Preallocation::Off && !self.qcow2.data.is_plain();
        if self.qcow2.version < 3 && blank {
            return Err(Error::Change {
                file: self.qcow2.host.path.clone(),
                reason: "it is encrypted, and version 2 cannot preallocate encrypted zeros: make \
                         it version 3 first"
                    .into(),
            });
        }
        self.grow_l1(geometry.l1_entries(size))?;
        self.qcow2.data.resize(old, size)?;
        match preallocation {
            Preallocation::Off if !self.qcow2.data.is_raw() => self.clear(clusters, zeroed)?,
            _ => self.preallocate(clusters, zeroed, preallocation)?,
        }
        self.qcow2.flush_alone()?;
        self.set_size(size)
    }

    fn shrink(&self, size: u64) -> Result<()> {
        let (geometry, old) = (self.qcow2.geometry, self.qcow2.size());
        self.set_size(size)?;
        self.clear(geometry.clusters(size)..u64::MAX, 0)?;
        self.qcow2.flush_alone()?;
        self.cut_tail()?;
        self.qcow2.data.resize(old, size)
    }

    /// Cuts free clusters off the file's end. A crash before that is durable leaves the file long.
    fn cut_tail(&self) -> Result<()> {
        let qcow2 = self.qcow2;
        let mut state = qcow2.state();
        let (tables, writing) = qcow2.split(&mut state)?;
        let (mut at, end) = (0, qcow2.geometry.clusters(tables.file_len));
        let mut used = 0;
        while at < end {
            let (free, count) = writing.refcounts.run(&qcow2.host, at, end - at)?;
            at += count;
            if !free {
                used = at;
            }
        }
        if used < end {
            tables.file_len = used * qcow2.geometry.cluster();
            writing.high = writing.high.min(used);
            qcow2.host.set_len(tables.file_len)?;
        }
        Ok(())
    }

    /// Bitmaps get their new size with the disk.
    fn set_size(&self, size: u64) -> Result<()> {
        self.qcow2
            .edit_bitmaps(self, |edit| edit.resize(size), |header| header.size = size)
    }
}
