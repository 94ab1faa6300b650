//! Changing bitmaps: everything that changes is written anew beside what there is, and the header
//! then names the new directory at once. A crash leaves the old bitmaps or the new ones.

use std::ops::Range;

use super::bits;
use super::directory::{self, AUTO, BITMAPS_VALID, Directory, Entry, IN_USE};
use super::table::{Part, Piece, Table, touched};
use crate::alone::Alone;
use crate::error::{Error, Result};
use crate::extension::BITMAPS;
use crate::header::Header;
use crate::qcow2::{Qcow2, Tables};
use crate::writing::Writing;

/// The bitmaps as they are to be.
pub(crate) struct Edit<'a> {
    qcow2: &'a Qcow2,
    alone: &'a Alone<'a>,
    tables: &'a mut Tables,
    writing: &'a mut Writing,
    entries: Vec<Entry>,
    /// Clusters that only the new directory names.
    made: Vec<Range<u64>>,
    /// Clusters that only the old directory names.
    gone: Vec<Range<u64>>,
}

impl Qcow2 {
    /// Changes the bitmaps, after what was marked is in them, and with them whatever else of the
    /// header `header` changes: both or neither are there after a crash. The change is durable
    /// afterwards; what it frees is given back by the next flush.
    pub(crate) fn edit_bitmaps(
        &self,
        alone: &Alone<'_>,
        change: impl FnOnce(&mut Edit<'_>) -> Result<()>,
        header: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let mut state = self.state();
        let (tables, writing) = self.split(&mut state)?;
        let old = Directory::load(&self.host, &tables.header, tables.file_len)?;
        let had_none = old.entries.is_empty();
        let mut edit = Edit {
            qcow2: self,
            alone,
            tables,
            writing,
            entries: old.entries,
            made: Vec::new(),
            gone: Vec::from([self.geometry.span(old.offset, old.len)]),
        };
        let written = edit
            .store_marks()
            .and_then(|()| change(&mut edit))
            .and_then(|()| edit.write_directory());
        let Edit {
            entries,
            made,
            gone,
            ..
        } = edit;
        drop(state);
        // The new clusters are counted, and their bytes are there, before anything names them.
        let ready = written.and_then(|place| self.flush_alone().map(|()| place));
        let mut state = self.state();
        let (tables, writing) = self.split(&mut state)?;
        let place = match ready {
            Ok(place) => place,
            Err(error) => {
                made.into_iter().for_each(|row| writing.drop_table(row));
                return Err(error);
            }
        };
        self.change_header(tables, |next| {
            header(next);
            if entries.is_empty() && had_none {
                // An extension that is not valid may stay: nothing is known of what it names.
            } else if entries.is_empty() {
                next.autoclear &= !BITMAPS_VALID;
                next.extensions.set(BITMAPS, None);
            } else {
                let data = directory::extension(entries.len(), place.0, place.1);
                next.autoclear |= BITMAPS_VALID;
                next.extensions.set(BITMAPS, Some(data));
            }
        })?;
        gone.into_iter().for_each(|row| writing.drop_table(row));
        writing.tracked = None;
        Ok(())
    }
}

impl Edit<'_> {
    /// The bitmap of that name, if it can be used.
    pub(crate) fn usable(&self, name: &str) -> Result<usize> {
        let index = self.find(name)?;
        let trouble = |entry: &Entry| entry.trouble(self.qcow2.size(), self.qcow2.geometry);
        match self.entries.get(index).and_then(trouble) {
            Some(reason) => Err(self.wrong(name, format!("{reason}: it can be removed"))),
            None => Ok(index),
        }
    }

    fn find(&self, name: &str) -> Result<usize> {
        let found = self.entries.iter().position(|entry| entry.name() == name);
        found.ok_or_else(|| self.wrong(name, "there is none of that name".into()))
    }

    fn wrong(&self, name: &str, reason: String) -> Error {
        self.qcow2.bitmap_error(name, reason)
    }

    pub(crate) fn add(&mut self, name: &str, granularity: u32, enabled: bool) -> Result<()> {
        let (size, geometry) = (self.qcow2.size(), self.qcow2.geometry);
        let bits = granularity.trailing_zeros();
        if !granularity.is_power_of_two() || !directory::GRANULARITY_BITS.contains(&bits) {
            let reason = format!(
                "its granularity is {granularity}, it can be a power of two from 512 to 2 GiB"
            );
            return Err(self.wrong(name, reason));
        }
        if name.is_empty() || name.len() > directory::MAX_NAME {
            let (len, most) = (name.len(), directory::MAX_NAME);
            let reason = format!("its name has {len} bytes, it can have 1 to {most}");
            return Err(self.wrong(name, reason));
        }
        if self.find(name).is_ok() {
            return Err(self.wrong(name, "there is one of that name".into()));
        }
        if self.qcow2.version < 3 {
            let reason = "version 2 of the format has no bitmaps: make it version 3 with \
                          `cowshed img amend -o compat=1.1`";
            return Err(self.wrong(name, reason.into()));
        }
        let parts = directory::parts(size, bits, geometry).filter(|&parts| parts > 0);
        let Some(parts) = parts else {
            let reason = format!(
                "a granularity of {granularity} does not fit a disk of {size} bytes: choose a \
                 larger one"
            );
            return Err(self.wrong(name, reason));
        };
        let flags = if enabled { AUTO } else { 0 };
        self.entries.push(Entry::new(name, bits, flags));
        let table = Table::empty(parts, bits, geometry);
        self.set_table(self.entries.len() - 1, &table)
    }

    /// Removes a bitmap, one that cannot be used too.
    pub(crate) fn remove(&mut self, name: &str) -> Result<()> {
        let index = self.find(name)?;
        let table = self.table(index)?;
        self.gone(table.clusters());
        let entry = self.entries.remove(index);
        self.drop_table(&entry);
        Ok(())
    }

    pub(crate) fn clear(&mut self, name: &str) -> Result<()> {
        let index = self.usable(name)?;
        let mut table = self.table(index)?;
        self.gone(table.clusters());
        table.parts.fill(Part::Zeros);
        self.set_table(index, &table)
    }

    pub(crate) fn enable(&mut self, name: &str, enabled: bool) -> Result<()> {
        let index = self.usable(name)?;
        if let Some(entry) = self.entries.get_mut(index) {
            entry.flags = entry.flags & !AUTO | if enabled { AUTO } else { 0 };
        }
        Ok(())
    }

    /// Marks in one bitmap what is marked in another.
    pub(crate) fn merge(&mut self, name: &str, source: &str) -> Result<()> {
        let source = self.table(self.usable(source)?)?;
        let index = self.usable(name)?;
        let host = &self.qcow2.host;
        self.mark(index, &mut |piece| {
            let mut ranges = Vec::new();
            source.for_each_dirty(host, piece.covered.clone(), &|_, _| {}, &mut |range| {
                ranges.push(range);
            })?;
            ranges.iter().for_each(|range| piece.mark(range));
            Ok(())
        })
    }

    /// Marks ranges of the disk, which are in order and apart.
    pub(crate) fn mark_ranges(&mut self, name: &str, ranges: &[Range<u64>]) -> Result<()> {
        let index = self.usable(name)?;
        self.mark(index, &mut |piece| {
            let from = ranges.partition_point(|range| range.end <= piece.covered.start);
            let rest = ranges.get(from..).unwrap_or_default();
            let end = piece.covered.end;
            for range in rest.iter().take_while(|range| range.start < end) {
                piece.mark(range);
            }
            Ok(())
        })
    }

    /// Fits the bitmaps to a disk of another size. What is new is not marked.
    pub(crate) fn resize(&mut self, size: u64) -> Result<()> {
        let (old_size, geometry) = (self.qcow2.size(), self.qcow2.geometry);
        for index in 0..self.entries.len() {
            let Some(entry) = self.entries.get_mut(index) else {
                continue;
            };
            if entry.trouble(old_size, geometry).is_some() {
                entry.flags |= IN_USE;
                continue;
            }
            let (name, granularity_bits) = (entry.name(), entry.granularity_bits);
            let parts = directory::parts(size, granularity_bits, geometry).filter(|&n| n > 0);
            let Some(parts) = parts else {
                let reason = format!("it does not fit a disk of {size} bytes: remove it first");
                return Err(self.wrong(&name, reason));
            };
            let mut table = self.table(index)?;
            // No bit past the smaller end may show when there is a disk again.
            let least = size.min(old_size);
            let last = (least / table.covers()) as usize;
            let piece = table.piece(last, least);
            let kept = touched(&piece.covered, granularity_bits);
            let old = table.bits(&self.qcow2.host, last)?;
            let mut bits = old.clone();
            bits::truncate(&mut bits, kept.end - kept.start);
            if bits != old && !kept.is_empty() {
                self.replace(&mut table, last, &bits)?;
            }
            let cut = table.resize(parts);
            self.gone(cut.clusters());
            self.set_table(index, &table)?;
        }
        Ok(())
    }

    /// What was marked since the first change gets into the file's bitmaps, which are not in use
    /// any more.
    fn store_marks(&mut self) -> Result<()> {
        let Some(tracked) = self.writing.tracked.take() else {
            return Ok(());
        };
        let stored = tracked.bitmaps.iter().try_for_each(|marks| {
            let index = self.find(&marks.name)?;
            if let Some(entry) = self.entries.get_mut(index) {
                entry.flags &= !IN_USE;
            }
            self.mark(index, &mut |piece| {
                marks.add_to(piece.index, &mut piece.bytes);
                Ok(())
            })
        });
        self.writing.tracked = Some(tracked);
        stored
    }

    /// Adds marks to a bitmap: `mark` gets the bits of one entry after the other, which are clear,
    /// and sets what is to be set.
    fn mark(&mut self, index: usize, mark: &mut dyn FnMut(&mut Piece) -> Result<()>) -> Result<()> {
        let mut table = self.table(index)?;
        let mut changed = false;
        for part in 0..table.parts.len() {
            if table.parts.get(part) == Some(&Part::Ones) {
                continue;
            }
            let mut piece = table.piece(part, self.qcow2.size());
            mark(&mut piece)?;
            if piece.bytes.iter().all(|&byte| byte == 0) {
                continue;
            }
            let old = table.bits(&self.qcow2.host, part)?;
            let mut bits = piece.bytes;
            bits.iter_mut().zip(&old).for_each(|(to, from)| *to |= from);
            if bits != old {
                self.replace(&mut table, part, &bits)?;
                changed = true;
            }
        }
        if changed {
            self.set_table(index, &table)?;
        }
        Ok(())
    }

    /// Puts the bits of an entry into a new cluster.
    fn replace(&mut self, table: &mut Table, part: usize, bits: &[u8]) -> Result<()> {
        let place = self.write(bits)?;
        if let Some(part) = table.parts.get_mut(part) {
            let old = std::mem::replace(part, Part::At(place));
            self.gone(old.place());
        }
        Ok(())
    }

    fn table(&self, index: usize) -> Result<Table> {
        let entry = self.entries.get(index);
        entry.map_or_else(
            || Ok(Table::empty(0, 0, self.qcow2.geometry)),
            |entry| {
                let qcow2 = self.qcow2;
                Table::load(&qcow2.host, entry, qcow2.geometry, self.tables.file_len)
            },
        )
    }

    /// Writes a bitmap's table to a new place.
    fn set_table(&mut self, index: usize, table: &Table) -> Result<()> {
        let place = self.write(&table.encode())?;
        if let Some(entry) = self.entries.get_mut(index) {
            let old = entry.clone();
            (entry.table, entry.parts) = (place, table.parts.len() as u32);
            self.drop_table(&old);
        }
        Ok(())
    }

    fn drop_table(&mut self, old: &Entry) {
        let len = u64::from(old.parts) * 8;
        self.gone.push(self.qcow2.geometry.span(old.table, len));
    }

    fn gone(&mut self, clusters: impl IntoIterator<Item = u64>) {
        let geometry = self.qcow2.geometry;
        self.gone
            .extend(clusters.into_iter().map(|at| geometry.span(at, 1)));
    }

    /// Writes the directory, if there is anything in it: where, and its length.
    fn write_directory(&mut self) -> Result<(u64, u64)> {
        if self.entries.is_empty() {
            return Ok((0, 0));
        }
        let bytes = directory::encode(&self.entries);
        if let Some(reason) = directory::too_much(&self.entries, bytes.len()) {
            let name = self.entries.last().map(Entry::name).unwrap_or_default();
            return Err(self.wrong(&name, reason));
        }
        let place = self.write(&bytes)?;
        Ok((place, bytes.len() as u64))
    }

    /// Writes bytes to new clusters.
    fn write(&mut self, bytes: &[u8]) -> Result<u64> {
        let cluster = self.qcow2.geometry.cluster();
        let count = (bytes.len() as u64).div_ceil(cluster);
        let row = self
            .alone
            .allocate_table(self.tables, self.writing, count)?;
        let place = row.start * cluster;
        self.made.push(row);
        // Whole clusters: what was there before is nobody's business.
        let mut whole = bytes.to_vec();
        whole.resize((count * cluster) as usize, 0);
        self.qcow2.host.write(place, &whole)?;
        Ok(place)
    }
}
