//! Comparing what two disks have.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::task::Task;
use super::window::{Buffer, Windows};
use super::zeros::is_zero;
use crate::error::Result;
use crate::image::Image;
use crate::layer::{check_tables, nothing_until};
use crate::map::MapEntry;

/// How two disks compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// They are of different size; where only one has bytes these are zeros, or the difference.
    pub sizes_differ: bool,
    /// Where they differ first.
    pub difference: Option<Difference>,
}

/// A difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// This byte of the disk.
    Content {
        /// Its place on the disk.
        offset: u64,
    },
    /// The images do not keep the same here: bytes, compressed bytes, zeros, or nothing.
    Allocation {
        /// Where that begins.
        offset: u64,
    },
}

impl Difference {
    fn offset(self) -> u64 {
        match self {
            Difference::Content { offset } | Difference::Allocation { offset } => offset,
        }
    }
}

/// Compares two disks in `threads` threads. The tail of the longer one must be zeros to be equal
/// to nothing. With `strict` it is a difference too how they are kept: as bytes, compressed, as
/// zeros, or not at all.
///
/// # Errors
/// An image cannot be read, or `task` was stopped.
pub fn compare(
    a: &Image,
    b: &Image,
    strict: bool,
    threads: usize,
    task: &Task,
) -> Result<Comparison> {
    let common = a.size().min(b.size());
    let size = a.size().max(b.size());
    task.begin(size);
    let windows = Windows::new(size, 512);
    let first: Mutex<Option<Difference>> = Mutex::new(None);
    let least = || *first.lock().unwrap_or_else(PoisonError::into_inner);
    for image in [a, b] {
        check_tables(&image.layers, 0, size)?;
    }
    let nothing_until = |at| Ok(nothing_until(&a.layers, at)?.min(nothing_until(&b.layers, at)?));
    windows.run(threads, nothing_until, |window, buffer| {
        task.advance(window.len())?;
        let window = window.range;
        if least().is_some_and(|found| found.offset() <= window.start) {
            return Ok(());
        }
        let both = window.start..window.end.min(common).max(window.start);
        let mut found = if both.is_empty() {
            None
        } else {
            differ(a, b, &both, strict, buffer)?
        };
        if found.is_none() && both.end < window.end {
            let longer = if a.size() > b.size() { a } else { b };
            found = tail(longer, both.end..window.end, buffer)?;
        }
        if let Some(found) = found {
            let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
            match *first {
                Some(before) if before.offset() <= found.offset() => {}
                _ => *first = Some(found),
            }
        }
        Ok(())
    })?;
    Ok(Comparison {
        sizes_differ: a.size() != b.size(),
        difference: least(),
    })
}

/// Where a range is: with `strict` as the tables say, else with what is a hole in the file.
fn entries(image: &Image, range: &Range<u64>, strict: bool) -> Result<Vec<MapEntry>> {
    let mut entries = Vec::new();
    let (start, len) = (range.start, range.end - range.start);
    let mut add = |entry| {
        entries.push(entry);
        Ok(())
    };
    if strict {
        image.map(start, len, &mut add)?;
    } else {
        image.content(start, len, &mut add)?;
    }
    Ok(entries)
}

/// Whether two entries lead to the same bytes of the same file.
fn same_place(a: &Image, at_a: &MapEntry, b: &Image, at_b: &MapEntry, start: u64) -> bool {
    let offset = |entry: &MapEntry| Some(entry.offset? + (start - entry.start));
    let file = |image: &Image, entry: &MapEntry| image.identity(entry.depth);
    at_a.data
        && at_b.data
        && offset(at_a).is_some_and(|at| offset(at_b) == Some(at))
        && file(a, at_a).is_some_and(|at| file(b, at_b) == Some(at))
}

fn differ(
    a: &Image,
    b: &Image,
    range: &Range<u64>,
    strict: bool,
    buffer: &mut Buffer,
) -> Result<Option<Difference>> {
    let (of_a, of_b) = (entries(a, range, strict)?, entries(b, range, strict)?);
    let (mut of_a, mut of_b) = (of_a.iter().peekable(), of_b.iter().peekable());
    let mut start = range.start;
    while let (Some(at_a), Some(at_b)) = (of_a.peek(), of_b.peek()) {
        let (end_a, end_b) = (at_a.start + at_a.len, at_b.start + at_b.len);
        let part = start..end_a.min(end_b);
        start = part.end;
        let status = |at: &MapEntry| (at.present, at.zero, at.data, at.compressed);
        let found = if strict && status(at_a) != status(at_b) {
            let offset = part.start;
            Some(Difference::Allocation { offset })
        } else if at_a.zero && at_b.zero || same_place(a, at_a, b, at_b, part.start) {
            None
        } else if at_a.zero || at_b.zero {
            tail(if at_a.zero { b } else { a }, part, buffer)?
        } else {
            bytes_differ(a, b, part, buffer)?
        };
        if found.is_some() {
            return Ok(found);
        }
        if end_a == start {
            of_a.next();
        }
        if end_b == start {
            of_b.next();
        }
    }
    Ok(None)
}

/// The first byte of a range that is not zero.
fn tail(image: &Image, range: Range<u64>, buffer: &mut Buffer) -> Result<Option<Difference>> {
    for entry in entries(image, &range, false)?
        .iter()
        .filter(|entry| !entry.zero)
    {
        let bytes = buffer.get(entry.len);
        image.read(entry.start, bytes)?;
        if !is_zero(bytes) {
            let at = bytes.iter().position(|&byte| byte != 0).unwrap_or(0);
            let offset = entry.start + at as u64;
            return Ok(Some(Difference::Content { offset }));
        }
    }
    Ok(None)
}

fn bytes_differ(
    a: &Image,
    b: &Image,
    range: Range<u64>,
    buffer: &mut Buffer,
) -> Result<Option<Difference>> {
    let (of_a, of_b) = buffer.pair(range.end - range.start);
    a.read(range.start, of_a)?;
    b.read(range.start, of_b)?;
    if of_a == of_b {
        return Ok(None);
    }
    let at = of_a.iter().zip(&*of_b).position(|(a, b)| a != b);
    let offset = range.start + at.unwrap_or(0) as u64;
    Ok(Some(Difference::Content { offset }))
}
