//! Copying what one disk has to another.

use std::ops::Range;

use super::task::Task;
use super::window::Windows;
use super::zeros::nonzero;
use crate::error::Result;
use crate::image::Image;

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
}

impl Default for CopyOptions {
    /// As `qemu-img convert`: zeros of 4 KiB are left out, and the target is written in order.
    fn default() -> Self {
        CopyOptions {
            sparse: Some(4096),
            threads: 4,
            out_of_order: false,
            target_is_zero: false,
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
    let windows = Windows::new(size);
    windows.run(options.threads, |window, buffer| {
        let len = window.end - window.start;
        buffer.resize(len as usize, 0);
        let pieces = read(source, &window, options, buffer)?;
        let write = || {
            for piece in &pieces {
                let (start, len) = (piece.range.start, piece.range.end - piece.range.start);
                let from = (start - window.start) as usize;
                if !piece.zero {
                    let bytes = buffer.get(from..from + len as usize);
                    target.write(at + start, bytes.unwrap_or_default())?;
                } else if !options.target_is_zero {
                    target.write_zeroes(at + start, len, true)?;
                }
            }
            Ok(())
        };
        if options.out_of_order {
            write()?;
        } else {
            windows.in_turn(&window, write)?;
        }
        task.advance(len)
    })
}

/// What is to be written: bytes of the buffer, or zeros.
struct Piece {
    range: Range<u64>,
    zero: bool,
}

/// Reads a window into a buffer of its size, and finds what of it is zeros.
fn read(
    source: &Image,
    window: &Range<u64>,
    options: &CopyOptions,
    buffer: &mut [u8],
) -> Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    source.map(window.start, window.end - window.start, &mut |entry| {
        let (start, end) = (entry.start, entry.start + entry.len);
        let mut add = |range: Range<u64>, zero| {
            if !range.is_empty() {
                pieces.push(Piece { range, zero });
            }
        };
        if entry.zero && options.sparse.is_some() {
            add(start..end, true);
            return Ok(());
        }
        let from = (start - window.start) as usize;
        let bytes = buffer.get_mut(from..from + entry.len as usize);
        let bytes = bytes.unwrap_or_default();
        source.read(start, bytes)?;
        let unit = options.sparse.map_or(bytes.len(), |unit| unit as usize);
        let mut at = start;
        for run in nonzero(bytes, unit) {
            add(at..start + run.start as u64, true);
            at = start + run.end as u64;
            add(start + run.start as u64..at, false);
        }
        add(at..end, options.sparse.is_some());
        Ok(())
    })?;
    Ok(pieces)
}
