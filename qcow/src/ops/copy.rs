//! Copying what one disk has to another.

use std::ops::Range;

use super::share::Sharing;
use super::task::Task;
use super::window::{Window, Windows};
use super::zeros::{is_zero, nonzero};
use crate::compress::{CompressedCluster, Compressor};
use crate::error::Result;
use crate::image::Image;
use crate::layer::{check_tables, nothing_until};
use crate::map::MapEntry;

/// The least that is given up when it cannot be read.
const SECTOR: usize = 512;

/// How a disk is copied.
#[derive(Clone, Debug)]
pub struct CopyOptions {
    /// Zeros of at least this many bytes are not written where the target has zeros anyway; a
    /// multiple of 512. `None`: everything is written.
    pub sparse: Option<u32>,
    /// Threads that read, look for zeros, and write.
    pub threads: usize,
    /// They may write in any order, and need not wait for each other.
    pub out_of_order: bool,
    /// The target reads as zeros: none need to be written.
    pub target_is_zero: bool,
    /// Clusters of which the target reads the same already, from its backing file say, are not
    /// written.
    pub only_differences: bool,
    /// Clusters are compressed, if the target can have that.
    pub compress: bool,
    /// What cannot be read of the source is taken for zeros, with a warning.
    pub salvage: bool,
    /// The host copies what it can without these bytes being read here: no zeros are looked for
    /// in them. Of no effect with `compress`, `only_differences` and `salvage`.
    pub offload: bool,
}

impl CopyOptions {
    /// Whether data is copied without being looked at.
    pub(super) fn blindly(&self) -> bool {
        self.offload && !self.compress && !self.only_differences && !self.salvage
    }
}

impl Default for CopyOptions {
    /// As `qemu-img convert`: zeros of 4 KiB are left out, and the target is written in order.
    fn default() -> Self {
        CopyOptions {
            sparse: Some(4096),
            threads: 4,
            out_of_order: false,
            target_is_zero: false,
            only_differences: false,
            compress: false,
            salvage: false,
            offload: false,
        }
    }
}

/// Copies all of `source` to `target` from `at` on.
///
/// # Errors
/// `target` is too short, one of them cannot be read or written, or `task` was stopped: `target`
/// has a part of it then.
pub fn copy(
    source: &Image,
    target: &Image,
    at: u64,
    options: &CopyOptions,
    task: &Task,
) -> Result<()> {
    let size = source.size();
    target.check_range(at, size)?;
    task.begin(size);
    let compressor = options
        .compress
        .then(|| target.compressor(None))
        .transpose()?;
    let copying = Copying {
        source,
        target,
        at,
        options,
        sharing: Sharing::new(source, target, options),
        // Streams are small when they are of whole clusters.
        compressor: compressor.filter(|_| at.is_multiple_of(target.cluster_size().into())),
    };
    let windows = Windows::new(size, target.cluster_size());
    if !options.salvage {
        check_tables(&source.layers, 0, size)?;
    }
    let nothing_until = |at| copying.nothing_until(at);
    windows.run(options.threads, nothing_until, |window, buffer| {
        let len = window.len();
        let Window { range, empty } = window;
        let buffer = buffer.get(if empty { 0 } else { len });
        let (entries, pieces) = match empty {
            true => (Vec::new(), copying.nothing(&range)),
            false => copying.read(&range, buffer)?,
        };
        let mut write = || copying.write(&range, buffer, &entries, &pieces);
        if options.out_of_order {
            write()?;
        } else {
            windows.in_turn(&range, write)?;
        }
        task.advance(len)
    })
}

/// What is to be written to a range of the source's disk.
struct Piece {
    range: Range<u64>,
    what: What,
}

impl Piece {
    /// Whether bytes of this range are more of the same.
    fn goes_on(&self, range: &Range<u64>) -> bool {
        matches!(self.what, What::Bytes) && self.range.end == range.start
    }
}

enum What {
    Zeros,
    /// Bytes of the buffer.
    Bytes,
    Compressed(CompressedCluster),
}

struct Copying<'a> {
    source: &'a Image,
    target: &'a Image,
    at: u64,
    options: &'a CopyOptions,
    sharing: Sharing<'a>,
    compressor: Option<Compressor>,
}

impl Copying<'_> {
    /// How far the source has nothing from `start` on, that need not be written for that.
    fn nothing_until(&self, start: u64) -> Result<u64> {
        if self.options.sparse.is_none() && self.compressor.is_none() {
            return Ok(start);
        }
        let until = match nothing_until(&self.source.layers, start) {
            Err(_) if self.options.salvage => start,
            until => until?,
        };
        if !self.options.only_differences {
            return Ok(until);
        }
        let there = nothing_until(&self.target.layers, self.at + start)?;
        Ok(until.min(there.saturating_sub(self.at)))
    }

    /// What is to be written of a range of which nothing is in the source; nor, where differences
    /// count, in the target.
    fn nothing(&self, range: &Range<u64>) -> Vec<Piece> {
        let (range, what) = (range.clone(), What::Zeros);
        match self.options.only_differences {
            true => Vec::new(),
            false => vec![Piece { range, what }],
        }
    }

    /// Reads a window into a buffer, and finds where it is and what there is to write.
    fn read(&self, window: &Range<u64>, buffer: &mut [u8]) -> Result<(Vec<MapEntry>, Vec<Piece>)> {
        let len = window.end - window.start;
        let blindly = self.options.blindly();
        let mut entries = Vec::new();
        let found = self.source.content(window.start, len, &mut |entry| {
            let bytes = buffer.get_mut(within(window, &entry.range()));
            let bytes = bytes.unwrap_or_default();
            if !entry.zero && !blindly {
                self.read_range(entry.start, bytes)?;
            } else if entry.zero && entry.len < len {
                bytes.fill(0);
            }
            entries.push(entry);
            Ok(())
        });
        match found {
            // The tables cannot be read: some parts of the window may be, one by one.
            Err(_) if self.options.salvage => {
                self.read_range(window.start, buffer)?;
                entries = vec![MapEntry::somewhere(window.start, len)];
            }
            found => found?,
        }
        let whole = matches!(&entries[..], [MapEntry { zero: true, .. }]);
        let unit = match &self.compressor {
            Some(compressor) => Some(compressor.cluster_size()),
            None => self.options.sparse.map(|unit| unit as usize),
        };
        let mut pieces = Vec::new();
        match unit {
            Some(_) if whole => pieces.push(Piece {
                range: window.clone(),
                what: What::Zeros,
            }),
            Some(unit) if self.compressor.is_some() => {
                find(buffer, window.start, unit, &mut pieces);
            }
            Some(unit) => {
                for entry in &entries {
                    let range = entry.range();
                    if entry.zero || blindly {
                        let what = if entry.zero { What::Zeros } else { What::Bytes };
                        pieces.push(Piece { range, what });
                    } else {
                        let bytes = buffer.get(within(window, &range)).unwrap_or_default();
                        find(bytes, range.start, unit, &mut pieces);
                    }
                }
            }
            None => {
                if whole {
                    buffer.fill(0);
                }
                let (range, what) = (window.clone(), What::Bytes);
                pieces.push(Piece { range, what });
            }
        }
        if self.options.only_differences {
            pieces = self.differences(pieces, window, buffer)?;
        }
        if let Some(compressor) = &self.compressor {
            let end = self.target.size().saturating_sub(self.at);
            pieces = compress(*compressor, pieces, window, buffer, end);
        }
        Ok((entries, pieces))
    }

    /// Reads from the source. To salvage what can be read, what cannot is zeros.
    fn read_range(&self, start: u64, bytes: &mut [u8]) -> Result<()> {
        let Err(error) = self.source.read(start, bytes) else {
            return Ok(());
        };
        if !self.options.salvage {
            return Err(error);
        }
        let mut lost = 0;
        for (sector, bytes) in (start..).step_by(SECTOR).zip(bytes.chunks_mut(SECTOR)) {
            if self.source.read(sector, bytes).is_err() {
                bytes.fill(0);
                lost += bytes.len();
            }
        }
        let error = &error as &dyn std::error::Error;
        tracing::warn!(
            error,
            start,
            lost,
            "what cannot be read is zeros in the copy"
        );
        Ok(())
    }

    /// The clusters of `pieces` that the target has not already.
    fn differences(
        &self,
        pieces: Vec<Piece>,
        window: &Range<u64>,
        buffer: &[u8],
    ) -> Result<Vec<Piece>> {
        let unit = u64::from(self.target.cluster_size());
        let mut there = Vec::new();
        let mut different = Vec::new();
        for Piece { range, what } in pieces {
            for range in parts(&range, unit) {
                there.resize((range.end - range.start) as usize, 0);
                self.target.read(self.at + range.start, &mut there)?;
                let same = match what {
                    What::Zeros => is_zero(&there),
                    _ => {
                        let from = (range.start - window.start) as usize;
                        buffer.get(from..from + there.len()) == Some(&there)
                    }
                };
                if !same {
                    let zeros = matches!(what, What::Zeros);
                    let what = if zeros { What::Zeros } else { What::Bytes };
                    different.push(Piece { range, what });
                }
            }
        }
        Ok(different)
    }

    fn write(
        &self,
        window: &Range<u64>,
        buffer: &mut [u8],
        entries: &[MapEntry],
        pieces: &[Piece],
    ) -> Result<()> {
        for Piece { range, what } in pieces {
            let (at, len) = (self.at + range.start, range.end - range.start);
            match what {
                What::Zeros if self.options.target_is_zero => {}
                What::Zeros => self.target.write_zeroes(at, len, true)?,
                What::Compressed(cluster) => self.target.place_compressed(at, cluster)?,
                What::Bytes => {
                    self.sharing.write(range, self.at, entries, &mut |range| {
                        let bytes = buffer.get_mut(within(window, &range));
                        let bytes = bytes.unwrap_or_default();
                        if self.options.blindly() {
                            self.source.read(range.start, bytes)?;
                        }
                        self.target.write(self.at + range.start, bytes)
                    })?;
                }
            }
        }
        Ok(())
    }
}

/// Where a range of the disk is in the buffer of its window.
fn within(window: &Range<u64>, range: &Range<u64>) -> Range<usize> {
    (range.start - window.start) as usize..(range.end - window.start) as usize
}

/// Finds the zeros in bytes that are at `start` of the disk, in multiples of `unit`.
fn find(bytes: &[u8], start: u64, unit: usize, pieces: &mut Vec<Piece>) {
    let mut add = |range: Range<u64>, what| {
        if !range.is_empty() {
            pieces.push(Piece { range, what });
        }
    };
    let mut at = start;
    for run in nonzero(bytes, unit) {
        add(at..start + run.start as u64, What::Zeros);
        at = start + run.end as u64;
        add(start + run.start as u64..at, What::Bytes);
    }
    add(at..start + bytes.len() as u64, What::Zeros);
}

/// The parts of a range that lie in one unit each.
fn parts(range: &Range<u64>, unit: u64) -> impl Iterator<Item = Range<u64>> {
    let (mut at, end) = (range.start, range.end);
    std::iter::from_fn(move || {
        let next = (at / unit + 1).saturating_mul(unit).min(end);
        let part = at..next;
        at = next;
        (!part.is_empty()).then_some(part)
    })
}

/// Compresses the clusters that have bytes. A part of one is its whole content only at the target's
/// `end`.
fn compress(
    compressor: Compressor,
    pieces: Vec<Piece>,
    window: &Range<u64>,
    buffer: &[u8],
    end: u64,
) -> Vec<Piece> {
    let mut smaller = Vec::new();
    for Piece { range, what } in pieces {
        if !matches!(what, What::Bytes) {
            smaller.push(Piece { range, what });
            continue;
        }
        for range in parts(&range, compressor.cluster_size() as u64) {
            let from = (range.start - window.start) as usize;
            let len = (range.end - range.start) as usize;
            let content = buffer.get(from..from + len).unwrap_or_default();
            let whole = len == compressor.cluster_size() || range.end == end;
            let compressed = whole.then(|| compressor.compress(content)).flatten();
            match (compressed, smaller.last_mut()) {
                (Some(cluster), _) => {
                    let what = What::Compressed(cluster);
                    smaller.push(Piece { range, what });
                }
                // In one write with what comes before it.
                (None, Some(last)) if last.goes_on(&range) => last.range.end = range.end,
                (None, _) => {
                    let what = What::Bytes;
                    smaller.push(Piece { range, what });
                }
            }
        }
    }
    smaller
}
