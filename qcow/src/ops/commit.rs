//! Moving what an overlay has into what lies beneath it.

use super::task::Task;
use super::window::Windows;
use crate::error::Result;
use crate::image::Image;
use crate::layer::{check_tables, nothing_until, walk};
use crate::qcow2::Place;

/// Writes what the upper `above` files of `top`'s chain have into `base`, the file beneath them,
/// and makes that durable. `base` is that file opened anew, for writing, and at least as long as
/// the disk. It takes `threads` threads. `top` stays as it is, so that after a crash this can be
/// run again; [`Image::make_empty`] follows.
///
/// # Errors
/// One of them cannot be read or written, or `task` was stopped.
pub fn commit(top: &Image, base: &Image, above: usize, threads: usize, task: &Task) -> Result<()> {
    let size = top.size();
    base.check_range(0, size)?;
    task.begin(size);
    let layers = top.layers.get(..above).unwrap_or(&top.layers);
    check_tables(layers, 0, size)?;
    let nothing_until = |at| nothing_until(layers, at);
    Windows::new(size, base.cluster_size()).run(threads, nothing_until, |window, buffer| {
        let len = window.len();
        let mut at = window.range.start;
        walk(layers, at, len, &mut |index, run| {
            let start = at;
            at += run.len;
            if index == above {
                return Ok(());
            }
            let mut at = start;
            let mut put = |len: u64, data: bool| {
                let start = at;
                at += len;
                if !data {
                    return base.write_zeroes(start, len, true);
                }
                let bytes = buffer.get(len);
                top.read(start, bytes)?;
                base.write(start, bytes)
            };
            match (run.place, layers.get(index)) {
                (Place::Zero | Place::Below, _) => put(run.len, false),
                (Place::Data(host), Some(layer)) if layer.is_plain() => {
                    layer.kept(host, run.len, &mut put)
                }
                _ => put(run.len, true),
            }
        })?;
        task.advance(len)
    })?;
    base.flush()
}
