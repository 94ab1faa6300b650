//! Copying without moving bytes: two files that share blocks until one of them is written.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use super::copy::CopyOptions;
use crate::content::FileRange;
use crate::error::Result;
use crate::image::Image;
use crate::map::MapEntry;

/// File systems share blocks of this many bytes, and place what they share at multiples of it.
const BLOCK: u64 = 4096;
/// A shorter run is written: it costs the same as a call, and two files are in pieces less.
const LEAST: u64 = 64 << 10;

/// What a target gets from its source by way of the host.
pub(super) struct Sharing<'a> {
    source: &'a Image,
    target: &'a Image,
    /// The host is asked; not again when it refused once.
    asked: AtomicBool,
    /// It may copy what cannot be shared.
    may_copy: bool,
}

impl<'a> Sharing<'a> {
    pub(super) fn new(source: &'a Image, target: &'a Image, options: &CopyOptions) -> Self {
        let may_copy = options.blindly();
        let data = target.layers.first().filter(|top| top.is_plain());
        let can = data.is_some_and(|top| may_copy || top.data().storage.shares_blocks());
        Sharing {
            source,
            target,
            // What cannot be read of the source is only found by reading it.
            asked: AtomicBool::new(can && !options.salvage),
            may_copy,
        }
    }

    /// Writes a range of the source's disk, which is as `entries` say, to `at` bytes further on in
    /// the target's: what the host does not do is left to `write`.
    pub(super) fn write(
        &self,
        range: &Range<u64>,
        at: u64,
        entries: &[MapEntry],
        write: &mut dyn FnMut(Range<u64>) -> Result<()>,
    ) -> Result<()> {
        let mut done = range.start;
        for entry in entries {
            if !self.asked.load(Ordering::Relaxed) {
                break;
            }
            let Some((part, file)) = self.part(range, at, entry) else {
                continue;
            };
            if done < part.start {
                write(done..part.start)?;
            }
            done = part.start;
            match self.target.write_from(at + part.start, file) {
                Ok(()) => done = part.end,
                // Whatever it is that went wrong, writing it says so better.
                Err(_) => self.asked.store(false, Ordering::Relaxed),
            }
        }
        if done < range.end {
            write(done..range.end)?;
        }
        Ok(())
    }

    /// The part of a range that an entry has in a file, as whole clusters and blocks of the target.
    fn part(
        &self,
        range: &Range<u64>,
        at: u64,
        entry: &MapEntry,
    ) -> Option<(Range<u64>, FileRange<'a>)> {
        let place = entry.offset.filter(|_| entry.data)?;
        let unit = u64::from(self.target.cluster_size()).max(BLOCK);
        let both = range.start.max(entry.start)..range.end.min(entry.range().end);
        let start = (at + both.start).next_multiple_of(unit).checked_sub(at)?;
        let end = ((at + both.end) / unit * unit).checked_sub(at)?;
        let len = end.checked_sub(start)?;
        let from = place + (start - entry.start);
        if len < if self.may_copy { unit } else { LEAST } {
            return None;
        }
        if !self.may_copy && !from.is_multiple_of(BLOCK) {
            return None;
        }
        let file = self.source.layers.get(entry.depth)?.data().storage.file()?;
        Some((start..end, FileRange { file, from, len }))
    }
}
