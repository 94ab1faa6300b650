//! Where a disk's bytes are, in words: which file of the chain, which place, zeros or not.

use std::ops::Range;

use crate::error::Result;
use crate::image::Image;
use crate::layer::{Layer, check_tables, nothing_until, walk};
use crate::qcow2::Place;

/// Clusters that are looked up at a time, a bound on memory.
const STEP_CLUSTERS: u64 = 1 << 16;

/// A run of the disk that is all in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First byte on the disk.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// The file of the chain that says what is here, 0 for the top; if none does, the last that
    /// was long enough to be asked.
    pub depth: usize,
    /// A file of the chain has it. What none has reads as zeros.
    pub present: bool,
    /// It reads as zeros, and the tables, or holes in a raw file, say so.
    pub zero: bool,
    /// Bytes are kept for it.
    pub data: bool,
    /// They are compressed.
    pub compressed: bool,
    /// Their place in that file, or in its data file, unless they are compressed or encrypted.
    pub offset: Option<u64>,
}

impl MapEntry {
    /// A range that has bytes, of which the place is not known.
    pub(crate) fn somewhere(start: u64, len: u64) -> Self {
        MapEntry {
            start,
            len,
            depth: 0,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            offset: None,
        }
    }

    /// The bytes of the disk.
    pub(crate) fn range(&self) -> Range<u64> {
        self.start..self.start + self.len
    }

    /// Lengthens it by what follows, if that is more of the same.
    fn join(&mut self, next: &MapEntry) -> bool {
        let same = MapEntry {
            start: next.start,
            len: next.len,
            offset: next.offset,
            ..*self
        };
        let goes_on = self.offset.map(|offset| offset + self.len) == next.offset;
        if same != *next || !goes_on {
            return false;
        }
        self.len += next.len;
        true
    }
}

impl Image {
    /// Visits where `len` bytes at `offset` are, in order, neighbours joined. Writes meanwhile may
    /// or may not be seen.
    ///
    /// # Errors
    /// The range is not on the disk, a table cannot be read or is named twice, or `visit` says so.
    pub fn map(
        &self,
        offset: u64,
        len: u64,
        visit: &mut dyn FnMut(MapEntry) -> Result<()>,
    ) -> Result<()> {
        self.check_range(offset, len)?;
        check_tables(&self.layers, offset, len)?;
        self.entries(offset, len, |layer| matches!(layer, Layer::Raw(_)), visit)
    }

    /// The same, with the holes of all files as zeros without a place: nothing need be read there.
    pub(crate) fn content(
        &self,
        offset: u64,
        len: u64,
        visit: &mut dyn FnMut(MapEntry) -> Result<()>,
    ) -> Result<()> {
        self.entries(offset, len, |_| true, visit)
    }

    /// Visits the entries of a range. `split_holes` says of which files the holes are told apart.
    fn entries(
        &self,
        offset: u64,
        len: u64,
        split_holes: impl Fn(&Layer) -> bool,
        visit: &mut dyn FnMut(MapEntry) -> Result<()>,
    ) -> Result<()> {
        self.check_range(offset, len)?;
        let step = u64::from(self.cluster_size()) * STEP_CLUSTERS;
        let mut last: Option<MapEntry> = None;
        let mut add = |next: MapEntry| {
            if last.as_mut().is_some_and(|last| last.join(&next)) {
                return Ok(());
            }
            last.replace(next).map_or(Ok(()), &mut *visit)
        };
        let (mut at, end) = (offset, offset + len);
        while at < end {
            // However long it is, nothing takes no memory.
            let next = match end - at {
                rest if rest <= step => end,
                _ => nothing_until(&self.layers, at)?.max(at + step).min(end),
            };
            walk(&self.layers, at, next - at, &mut |depth, run| {
                let entry = self.describe(at, run.len, depth, run.place);
                at += run.len;
                match self.layers.get(depth) {
                    Some(layer) if entry.data && split_holes(layer) => {
                        split(layer, entry, &mut add)
                    }
                    _ => add(entry),
                }
            })?;
        }
        last.map_or(Ok(()), visit)
    }

    fn describe(&self, start: u64, len: u64, depth: usize, place: Place) -> MapEntry {
        // What a layer is too short for, or what there is no layer for: the one above says so.
        let size = self.layers.get(depth).map_or(0, Layer::size);
        let present = start < size;
        let offset = match (place, self.layers.get(depth)) {
            (Place::Data(offset), Some(layer)) if layer.is_plain() => Some(offset),
            _ => None,
        };
        MapEntry {
            start,
            len,
            depth: if present {
                depth
            } else {
                depth.saturating_sub(1)
            },
            present,
            zero: matches!(place, Place::Zero | Place::Below),
            data: matches!(place, Place::Data(_) | Place::Compressed(..)),
            compressed: matches!(place, Place::Compressed(..)),
            offset,
        }
    }
}

/// Finds the holes in a run of a file.
fn split(
    layer: &Layer,
    entry: MapEntry,
    add: &mut dyn FnMut(MapEntry) -> Result<()>,
) -> Result<()> {
    let Some(mut offset) = entry.offset else {
        return add(entry);
    };
    let mut start = entry.start;
    layer.kept(offset, entry.len, &mut |len, data| {
        let part = MapEntry {
            start,
            len,
            zero: !data,
            data,
            offset: Some(offset),
            ..entry
        };
        (start, offset) = (start + len, offset + len);
        add(part)
    })
}
