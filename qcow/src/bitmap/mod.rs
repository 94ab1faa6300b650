//! Persistent bitmaps: each says, for every few kilobytes of the disk, whether they changed since
//! somebody asked. Section "Bitmaps" of the specification.
//!
//! The header's extension names the *directory*, which has an entry for each bitmap; that names
//! its *table*, whose entries name clusters of bits.

mod bits;
pub(crate) mod directory;
mod edit;
mod table;
mod track;

use std::ops::Range;

use crate::addr::Geometry;
use crate::error::{Error, Result};
use crate::header::Header;
use crate::host::Host;
use crate::image::Image;
use crate::layer::Layer;
use crate::metadata::Span;
use crate::qcow2::{Qcow2, State, Tables};

pub(crate) use directory::BITMAPS_VALID;
use directory::{AUTO, Directory, Entry, IN_USE};
use edit::Edit;
use table::Table;
pub(crate) use track::Tracked;

/// A persistent bitmap of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name, unique in the image; what is no UTF-8 is replaced.
    pub name: String,
    /// Bytes of the disk that one bit stands for: a power of two from 512 to 2 GiB.
    pub granularity: u64,
    /// What is written is marked.
    pub enabled: bool,
    /// Flag `in_use` of the file, unless it is this image that uses it.
    pub in_use: bool,
    /// Why it cannot be used, only be removed: marks are missing since a crash, or it has what
    /// this crate does not know.
    pub inconsistent: Option<String>,
}

/// The bitmaps that an image's file has.
pub(crate) fn list(host: &Host, header: &Header, file_len: u64) -> Result<Vec<Bitmap>> {
    let directory = Directory::load(host, header, file_len)?;
    let entries = directory.entries.iter();
    Ok(entries
        .map(|entry| entry.describe(header.size, header.geometry))
        .collect())
}

impl Entry {
    fn describe(&self, size: u64, geometry: Geometry) -> Bitmap {
        Bitmap {
            name: self.name(),
            granularity: 1_u64.checked_shl(self.granularity_bits).unwrap_or(0),
            enabled: self.flags & AUTO != 0,
            in_use: self.flags & IN_USE != 0,
            inconsistent: self.trouble(size, geometry),
        }
    }
}

/// # Bitmaps
///
/// While an image is written its enabled bitmaps are marked in memory, and the file says that they
/// are in use. [`close`](Self::close), [`store_bitmaps`](Self::store_bitmaps), each of the
/// changes below and dropping the image store them. After a crash they are
/// [inconsistent](Bitmap::inconsistent). So are those whose marks do not fit into the 64 MiB that all
/// of an image's may take, from the first write on. If the file's autoclear bit says that something wrote the
/// image without knowing of bitmaps, there are none.
///
/// Changes wait until every request in flight has ended: who holds a plan's [`Pin`](crate::Pin)
/// waits for itself. They are durable when they return.
///
/// ```
/// # use std::{path::Path, sync::Arc};
/// # use cowshed_qcow::{CreateOptions, Format, Image, MemoryStorage, OpenOptions, create};
/// # fn main() -> cowshed_qcow::Result<()> {
/// # let storage = Arc::new(MemoryStorage::default());
/// # let path = Path::new("disk");
/// # create(path, storage.clone(), &CreateOptions::new(1 << 20))?;
/// # let disk = Image::open_over(path, storage, &OpenOptions::new(Format::Qcow2), None)?;
/// disk.add_bitmap("since-monday", Some(4096), true)?;
/// disk.write(10_000, b"moo")?;
/// assert_eq!(disk.dirty_ranges("since-monday", 0..disk.size())?, [8192..12288]);
///
/// // The next backup has only what changes from here on.
/// disk.clear_bitmap("since-monday")?;
/// assert_eq!(disk.dirty_bytes("since-monday")?, 0);
/// disk.close()?;
/// # Ok(())
/// # }
/// ```
impl Image {
    /// The bitmaps of the top image, in the directory's order. A raw file has none.
    pub fn bitmaps(&self) -> Result<Vec<Bitmap>> {
        let Some(Layer::Qcow2(qcow2)) = self.layers.first() else {
            return Ok(Vec::new());
        };
        let state = qcow2.state();
        let entries = qcow2.bitmap_entries(&state)?;
        Ok(entries
            .into_iter()
            .map(|entry| entry.describe(qcow2.size(), qcow2.geometry))
            .collect())
    }

    /// What of a range of the disk a bitmap has marked, in bytes, in order and apart. What comes
    /// back has at most an entry for each two [granules](Bitmap::granularity): ask piece by piece
    /// where that is too much.
    pub fn dirty_ranges(&self, name: &str, within: Range<u64>) -> Result<Vec<Range<u64>>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        self.for_each_dirty(name, within, &mut |next| match ranges.last_mut() {
            Some(last) if last.end == next.start => last.end = next.end,
            _ => ranges.push(next),
        })?;
        Ok(ranges)
    }

    /// How many bytes of the disk a bitmap has marked.
    pub fn dirty_bytes(&self, name: &str) -> Result<u64> {
        let mut bytes = 0;
        self.for_each_dirty(name, 0..self.size(), &mut |range| {
            bytes += range.end - range.start;
        })?;
        Ok(bytes)
    }

    /// Adds a bitmap with nothing marked. The default granularity is that of QEMU: the cluster
    /// size, but 4 KiB at least and 64 KiB at most.
    pub fn add_bitmap(&self, name: &str, granularity: Option<u32>, enabled: bool) -> Result<()> {
        let granularity = granularity.unwrap_or(self.cluster_size().clamp(4096, 65536));
        self.edit_bitmap(name, |edit| edit.add(name, granularity, enabled))
    }

    /// Removes a bitmap, an inconsistent one too.
    pub fn remove_bitmap(&self, name: &str) -> Result<()> {
        self.edit_bitmap(name, |edit| edit.remove(name))
    }

    /// Unmarks everything in a bitmap.
    pub fn clear_bitmap(&self, name: &str) -> Result<()> {
        self.edit_bitmap(name, |edit| edit.clear(name))
    }

    /// What is written from now on is marked in a bitmap.
    pub fn enable_bitmap(&self, name: &str) -> Result<()> {
        self.edit_bitmap(name, |edit| edit.enable(name, true))
    }

    /// What is written from now on is not marked in a bitmap.
    pub fn disable_bitmap(&self, name: &str) -> Result<()> {
        self.edit_bitmap(name, |edit| edit.enable(name, false))
    }

    /// Marks in a bitmap what is marked in another of the same image. Granularities may differ:
    /// a bit is set if anything that it stands for is marked.
    pub fn merge_bitmap(&self, name: &str, source: &str) -> Result<()> {
        self.edit_bitmap(name, |edit| edit.merge(name, source))
    }

    /// Marks ranges of the disk in a bitmap: those that [`dirty_ranges`](Self::dirty_ranges) of
    /// another image gave, for one.
    pub fn mark_bitmap(&self, name: &str, ranges: &[Range<u64>]) -> Result<()> {
        for range in ranges {
            self.check_inside(range)?;
        }
        let mut sorted = ranges.to_vec();
        sorted.sort_unstable_by_key(|range| range.start);
        sorted.dedup_by(|next, last| {
            let joined = next.start <= last.end;
            if joined {
                last.end = last.end.max(next.end);
            }
            joined
        });
        self.edit_bitmap(name, |edit| edit.mark_ranges(name, &sorted))
    }

    /// Stores the marks in the file, which says no more that bitmaps are in use, until the next
    /// write. Everything is [flushed](Self::flush) as well.
    pub fn store_bitmaps(&self) -> Result<()> {
        if let Some(Layer::Qcow2(qcow2)) = self.layers.first()
            && qcow2.has_marks()
        {
            let alone = qcow2.alone()?;
            qcow2.edit_bitmaps(&alone, |_| Ok(()), |_| {})?;
        }
        self.flush()
    }

    /// Makes everything durable that was written, marks of bitmaps too. Dropping an image does the
    /// same, but can only warn of a failure.
    pub fn close(self) -> Result<()> {
        let stored = match self.layers.first() {
            Some(Layer::Qcow2(qcow2)) => qcow2.store_marks_at_last(),
            _ => Ok(()),
        };
        self.flush()?;
        if let Some(Layer::Qcow2(qcow2)) = self.layers.first()
            && qcow2.writable
        {
            qcow2.close()?;
        }
        stored
    }

    fn edit_bitmap(
        &self,
        name: &str,
        change: impl FnOnce(&mut Edit<'_>) -> Result<()>,
    ) -> Result<()> {
        let Some(qcow2) = self.writable_top()? else {
            return Err(self.no_bitmap(name));
        };
        let alone = qcow2.alone()?;
        qcow2.edit_bitmaps(&alone, change, |_| {})
    }

    fn for_each_dirty(
        &self,
        name: &str,
        within: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>),
    ) -> Result<()> {
        self.check_inside(&within)?;
        let Some(Layer::Qcow2(qcow2)) = self.layers.first() else {
            return Err(self.no_bitmap(name));
        };
        let state = qcow2.state();
        let entries = qcow2.bitmap_entries(&state)?;
        let found = entries.iter().find(|entry| entry.name() == name);
        let entry = found.ok_or_else(|| self.no_bitmap(name))?;
        if let Some(reason) = entry.trouble(qcow2.size(), qcow2.geometry) {
            return Err(qcow2.bitmap_error(name, reason));
        }
        let table = qcow2.bitmap_table(&state.tables, entry)?;
        let marks = state.tracked().and_then(|tracked| tracked.marks(name));
        let more = |index: usize, bits: &mut [u8]| {
            if let Some(marks) = marks {
                marks.add_to(index, bits);
            }
        };
        table.for_each_dirty(&qcow2.host, within, &more, visit)
    }

    fn check_inside(&self, range: &Range<u64>) -> Result<()> {
        let size = self.size();
        if range.start <= range.end && range.end <= size {
            return Ok(());
        }
        let (offset, len) = (range.start, range.end.saturating_sub(range.start));
        Err(Error::OutOfRange { offset, len, size })
    }

    fn no_bitmap(&self, name: &str) -> Error {
        let top = self.layers.first();
        Error::Bitmap {
            file: top.map(|top| top.host().path.clone()).unwrap_or_default(),
            name: name.into(),
            reason: "there is none of that name".into(),
        }
    }
}

impl Qcow2 {
    pub(crate) fn bitmap_error(&self, name: &str, reason: String) -> Error {
        Error::Bitmap {
            file: self.host.path.clone(),
            name: name.into(),
            reason,
        }
    }

    /// The directory's entries; those that this image uses are not said to be in use.
    fn bitmap_entries(&self, state: &State) -> Result<Vec<Entry>> {
        let tables = &state.tables;
        let directory = Directory::load(&self.host, &tables.header, tables.file_len)?;
        let mut entries = directory.entries;
        for entry in &mut entries {
            let ours = state
                .tracked()
                .and_then(|tracked| tracked.marks(&entry.name()));
            if ours.is_some() {
                entry.flags &= !IN_USE;
            }
        }
        Ok(entries)
    }

    fn bitmap_table(&self, tables: &Tables, entry: &Entry) -> Result<Table> {
        Table::load(&self.host, entry, self.geometry, tables.file_len)
    }

    /// Adds the clusters of the bitmaps: what each is, where, and its length.
    pub(crate) fn bitmap_spans(&self, tables: &Tables, spans: &mut Vec<Span>) -> Result<()> {
        let directory = Directory::load(&self.host, &tables.header, tables.file_len)?;
        if let Some(reason) = directory::too_much(&directory.entries, directory.len as usize) {
            let advice = "remove some bitmaps with `cowshed img bitmap --remove`";
            return Err(Error::Unsupported {
                file: self.host.path.clone(),
                feature: reason,
                advice,
            });
        }
        spans.push(("bitmap directory", directory.offset, directory.len));
        for entry in &directory.entries {
            spans.push(("bitmap table", entry.table, u64::from(entry.parts) * 8));
            let table = self.bitmap_table(tables, entry)?;
            spans.extend(
                table
                    .clusters()
                    .map(|at| ("bitmap", at, self.geometry.cluster())),
            );
        }
        Ok(())
    }

    /// Refuses a change to a disk of another size that leaves the bitmaps alone.
    pub(crate) fn check_bitmaps_fit(&self, tables: &Tables, size: u64) -> Result<()> {
        let directory = Directory::load(&self.host, &tables.header, tables.file_len)?;
        match directory.entries.first() {
            Some(entry) if size != self.size() => {
                let reason = format!("resize the disk to {size} bytes first, and it with it");
                Err(self.bitmap_error(&entry.name(), reason))
            }
            _ => Ok(()),
        }
    }

    /// Whether the file says of bitmaps that they are in use, because of this image.
    pub(crate) fn has_marks(&self) -> bool {
        let state = self.state();
        state.tables.stopped.is_none() && state.tracked().is_some_and(Tracked::is_open)
    }

    /// Stores the marks for who closes the image: nobody else is there to wait for.
    pub(crate) fn store_marks_at_last(&self) -> Result<()> {
        if !self.has_marks() {
            return Ok(());
        }
        let alone = self.alone_at_last();
        self.edit_bitmaps(&alone, |_| Ok(()), |_| {})
    }
}

impl State {
    fn tracked(&self) -> Option<&Tracked> {
        self.writing.as_ref()?.tracked.as_ref()
    }
}
