//! Marking what a guest changes. The first change says in the file that the bitmaps are in use,
//! and the marks stay in memory; a crash leaves that word, and who reads the image then knows that
//! marks are missing. Closing the image stores them and takes the word back.

use std::ops::Range;

use super::bits;
use super::directory::{AUTO, Directory, Entry, FLAGS_AT, IN_USE};
use super::table::touched;
use crate::error::Result;
use crate::qcow2::{Qcow2, Tables};
use crate::writing::Writing;

/// Bytes that the marks of one image's bitmaps take at most.
const MAX_MARKED_BYTES: u64 = 64 << 20;

/// The bitmaps whose marks are kept in memory since the first change.
#[derive(Debug, Default)]
pub(crate) struct Tracked {
    pub(crate) bitmaps: Vec<Marks>,
    /// Flags that must be in the file before the disk is changed, by their offset.
    flags: Vec<(u64, u32)>,
    /// They are there.
    pub(crate) announced: bool,
}

/// What was marked and is not yet in the file.
#[derive(Debug)]
pub(crate) struct Marks {
    pub(crate) name: String,
    granularity_bits: u32,
    bytes: Vec<u8>,
}

impl Marks {
    /// Adds the marks that belong to a part's bits.
    pub(crate) fn add_to(&self, index: usize, part: &mut [u8]) {
        let start = index.saturating_mul(part.len());
        let marks = self.bytes.get(start..).unwrap_or_default();
        for (to, from) in part.iter_mut().zip(marks) {
            *to |= from;
        }
    }
}

impl Tracked {
    pub(crate) fn marks(&self, name: &str) -> Option<&Marks> {
        self.bitmaps.iter().find(|marks| marks.name == name)
    }

    /// Whether bitmaps in the file are said to be in use because of us.
    pub(crate) fn is_open(&self) -> bool {
        self.announced && !self.bitmaps.is_empty()
    }
}

impl Qcow2 {
    /// Marks that a range of the disk changes. It is called under the lock under which the change
    /// gets its pin or its allocation, so that who has the image alone misses nothing.
    pub(crate) fn mark_dirty(
        &self,
        tables: &Tables,
        writing: &mut Writing,
        range: Range<u64>,
    ) -> Result<()> {
        // VM state and the rest of the last cluster are no part of the disk.
        let range = range.start..range.end.min(self.size());
        if range.is_empty() {
            return Ok(());
        }
        if !writing.tracked.as_ref().is_some_and(|t| t.announced) {
            self.start_tracking(tables, writing)?;
        }
        for marks in writing.tracked.iter_mut().flat_map(|t| &mut t.bitmaps) {
            bits::set(&mut marks.bytes, touched(&range, marks.granularity_bits));
        }
        Ok(())
    }

    /// Says in the file which bitmaps are in use, and is ready to mark. After a failure the next
    /// change tries again.
    fn start_tracking(&self, tables: &Tables, writing: &mut Writing) -> Result<()> {
        if writing.tracked.is_none() {
            let directory = Directory::load(&self.host, &tables.header, tables.file_len)?;
            writing.tracked = Some(self.track(directory.entries));
        }
        let Some(tracked) = &mut writing.tracked else {
            return Ok(());
        };
        for (at, flags) in &tracked.flags {
            self.host.write(*at, &flags.to_be_bytes())?;
        }
        if !tracked.flags.is_empty() {
            self.host.sync()?;
        }
        tracked.announced = true;
        Ok(())
    }

    /// Decides what to mark: enabled bitmaps. Those that cannot be kept right are in use for ever.
    fn track(&self, entries: Vec<Entry>) -> Tracked {
        let mut tracked = Tracked::default();
        let mut left = MAX_MARKED_BYTES;
        for entry in entries {
            let trouble = entry.trouble(self.size(), self.geometry);
            if entry.flags & IN_USE != 0 || trouble.is_none() && entry.flags & AUTO == 0 {
                continue;
            }
            let flags = entry.flags | IN_USE;
            tracked.flags.push((entry.at + FLAGS_AT, flags));
            let (name, granularity_bits) = (entry.name(), entry.granularity_bits);
            let reason = match trouble {
                Some(reason) => reason,
                None => {
                    let bytes = touched(&(0..self.size()), granularity_bits).end.div_ceil(8);
                    if bytes <= left {
                        left -= bytes;
                        tracked.bitmaps.push(Marks {
                            name,
                            granularity_bits,
                            bytes: vec![0; bytes as usize],
                        });
                        continue;
                    }
                    format!(
                        "the marks of all bitmaps would take more than {MAX_MARKED_BYTES} bytes"
                    )
                }
            };
            let file = self.host.path.display();
            tracing::warn!(%file, bitmap = name, reason, "a bitmap is inconsistent from now on");
        }
        tracked
    }
}
