//! Making an overlay independent of what changes when it gets another backing file.

use super::task::Task;
use super::window::Windows;
use super::zeros::is_zero;
use crate::error::Result;
use crate::image::Image;
use crate::layer::{check_tables, nothing_until, walk};

/// Writes to `top` what its backing file gives it and `new` would not: all that is not zeros if
/// there is no `new`. It takes `threads` threads. `top` then has the same content over either, and
/// is durable; a change of its header follows. After a crash this can be run again. With `compress`
/// clusters that `top` has nothing of are written compressed.
///
/// # Errors
/// One of them cannot be read or written, `top` can have no compressed clusters, or `task` was
/// stopped.
pub fn rebase(
    top: &Image,
    new: Option<&Image>,
    compress: bool,
    threads: usize,
    task: &Task,
) -> Result<()> {
    let size = top.size();
    let compressor = compress.then(|| top.compressor(None)).transpose()?;
    task.begin(size);
    let unit = u64::from(top.cluster_size());
    let own = top.layers.get(..1).unwrap_or_default();
    let new_layers = new.map_or(&[][..], |new| &new.layers);
    check_tables(&top.layers, 0, size)?;
    check_tables(new_layers, 0, size)?;
    let nothing_until =
        |at| Ok(nothing_until(&top.layers, at)?.min(nothing_until(new_layers, at)?));
    Windows::new(size, top.cluster_size()).run(threads, nothing_until, |window, buffer| {
        let len = window.len();
        if window.empty {
            return task.advance(len);
        }
        let mut below = Vec::new();
        let mut at = window.range.start;
        walk(own, at, len, &mut |index, run| {
            if index > 0 {
                below.push(at..at + run.len);
            }
            at += run.len;
            Ok(())
        })?;
        for range in below {
            let (old, other) = buffer.pair(range.end - range.start);
            top.read(range.start, old)?;
            read_or_zeros(new, range.start, other)?;
            let mut at = range.start;
            while at < range.end {
                // A cluster at most, so that what is the same stays where it is.
                let next = (at / unit + 1).saturating_mul(unit).min(range.end);
                let part = (at - range.start) as usize..(next - range.start) as usize;
                let old = old.get(part.clone()).unwrap_or_default();
                if Some(old) != other.get(part) {
                    let whole = at.is_multiple_of(unit) && (next - at == unit || next == size);
                    let smaller = compressor.filter(|_| whole);
                    if is_zero(old) {
                        top.write_zeroes_over_all(at, next - at)?;
                    } else if let Some(cluster) = smaller.and_then(|by| by.compress(old)) {
                        top.place_compressed(at, &cluster)?;
                    } else {
                        top.write(at, old)?;
                    }
                }
                at = next;
            }
        }
        task.advance(len)
    })?;
    top.flush()
}

fn read_or_zeros(image: Option<&Image>, offset: u64, buf: &mut [u8]) -> Result<()> {
    let size = image.map_or(0, Image::size);
    let inside = (buf.len() as u64).min(size.saturating_sub(offset)) as usize;
    let (head, tail) = buf.split_at_mut(inside);
    tail.fill(0);
    match image {
        Some(image) if !head.is_empty() => image.read(offset, head),
        _ => Ok(()),
    }
}
