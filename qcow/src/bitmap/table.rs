//! A bitmap's table: for each cluster of bits where it is, or that all of its bits are the same.

use std::ops::Range;

use super::bits;
use super::directory::Entry;
use crate::addr::{Geometry, be64};
use crate::error::{Result, Violation};
use crate::host::Host;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const ALL_ONES: u64 = 1;

/// What an entry of the table says of its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Zeros,
    Ones,
    /// They are at this offset of the file.
    At(u64),
}

impl Part {
    /// Where its bits are, if they are anywhere.
    pub(crate) fn place(self) -> Option<u64> {
        match self {
            Part::At(offset) => Some(offset),
            Part::Zeros | Part::Ones => None,
        }
    }
}

/// A table, loaded.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) parts: Vec<Part>,
    granularity_bits: u32,
    geometry: Geometry,
}

impl Table {
    /// With nothing marked.
    pub(crate) fn empty(parts: u32, granularity_bits: u32, geometry: Geometry) -> Self {
        Table {
            parts: vec![Part::Zeros; parts as usize],
            granularity_bits,
            geometry,
        }
    }

    /// Reads the table of a bitmap whose entry was checked.
    pub(crate) fn load(
        host: &Host,
        entry: &Entry,
        geometry: Geometry,
        file_len: u64,
    ) -> Result<Self> {
        let mut bytes = vec![0; entry.parts as usize * 8];
        host.read(entry.table, &mut bytes)?;
        let mut table = Table::empty(0, entry.granularity_bits, geometry);
        for (i, part) in bytes.chunks_exact(8).enumerate() {
            let part = be64(part, 0);
            table.parts.push(match part & OFFSET {
                0 if part == 0 => Part::Zeros,
                0 if part == ALL_ONES => Part::Ones,
                at if at == part && geometry.within(at) == 0 && at < file_len => Part::At(at),
                _ => {
                    let at = entry.table + i as u64 * 8;
                    let value = format!("{part:#018x}");
                    let expected = format!("0, 1 or a cluster before the file's end {file_len:#x}");
                    return Err(host.invalid(Violation::new(
                        "bitmap table entry",
                        at,
                        value,
                        expected,
                    )));
                }
            });
        }
        Ok(table)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let entry = |part: &Part| match *part {
            Part::Zeros => 0,
            Part::Ones => ALL_ONES,
            Part::At(offset) => offset,
        };
        self.parts
            .iter()
            .flat_map(|part| entry(part).to_be_bytes())
            .collect()
    }

    /// Bytes of the disk that the bits of one entry stand for.
    pub(crate) fn covers(&self) -> u64 {
        (self.geometry.cluster() * 8) << self.granularity_bits
    }

    /// Changes how many entries it has. What is new is clear, what is cut off comes back.
    pub(crate) fn resize(&mut self, parts: u32) -> Table {
        let len = parts as usize;
        let cut = self.parts.split_off(len.min(self.parts.len()));
        self.parts.resize(len, Part::Zeros);
        Table {
            parts: cut,
            ..*self
        }
    }

    /// The clusters of bits.
    pub(crate) fn clusters(&self) -> impl Iterator<Item = u64> {
        self.parts.iter().filter_map(|part| part.place())
    }

    /// The bits of an entry.
    pub(crate) fn bits(&self, host: &Host, index: usize) -> Result<Vec<u8>> {
        let part = self.parts.get(index).copied().unwrap_or(Part::Zeros);
        let same = if part == Part::Ones { 0xff } else { 0 };
        let mut bytes = vec![same; self.geometry.cluster() as usize];
        if let Part::At(offset) = part {
            host.read(offset, &mut bytes)?;
        }
        Ok(bytes)
    }

    /// No bits yet, for what an entry stands for on a disk of `size` bytes.
    pub(crate) fn piece(&self, index: usize, size: u64) -> Piece {
        let start = (index as u64).saturating_mul(self.covers());
        Piece {
            index,
            covered: start..start.saturating_add(self.covers()).min(size),
            bytes: vec![0; self.geometry.cluster() as usize],
            granularity_bits: self.granularity_bits,
        }
    }

    /// Visits what is marked within a range of the disk, in order. `more` can mark more: it gets
    /// the bits of one entry after the other, with the entry's index.
    pub(crate) fn for_each_dirty(
        &self,
        host: &Host,
        within: Range<u64>,
        more: &dyn Fn(usize, &mut [u8]),
        visit: &mut dyn FnMut(Range<u64>),
    ) -> Result<()> {
        if within.is_empty() {
            return Ok(());
        }
        let covers = self.covers();
        for index in within.start / covers..=(within.end - 1) / covers {
            let mut bytes = self.bits(host, index as usize)?;
            more(index as usize, &mut bytes);
            let first = index * covers;
            bits::for_each_run(&bytes, &mut |run| {
                let offset = |bit: u64| first.saturating_add(bit << self.granularity_bits);
                let (start, end) = (
                    offset(run.start).max(within.start),
                    offset(run.end).min(within.end),
                );
                if start < end {
                    visit(start..end);
                }
            });
        }
        Ok(())
    }
}

/// The bits of one entry, to be changed.
pub(crate) struct Piece {
    pub(crate) index: usize,
    /// What of the disk they stand for.
    pub(crate) covered: Range<u64>,
    pub(crate) bytes: Vec<u8>,
    granularity_bits: u32,
}

impl Piece {
    pub(crate) fn mark(&mut self, range: &Range<u64>) {
        let (start, end) = (
            range.start.max(self.covered.start),
            range.end.min(self.covered.end),
        );
        if start < end {
            let first = self.covered.start;
            let bits = touched(&(start - first..end - first), self.granularity_bits);
            bits::set(&mut self.bytes, bits);
        }
    }
}

/// The bits that a range of the disk touches.
pub(crate) fn touched(range: &Range<u64>, granularity_bits: u32) -> Range<u64> {
    if range.is_empty() {
        return 0..0;
    }
    range.start >> granularity_bits..((range.end - 1) >> granularity_bits) + 1
}
