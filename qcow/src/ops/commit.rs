//! Moving what an overlay has into what lies beneath it.

use super::task::Task;
use super::window::Windows;
use crate::error::Result;
use crate::image::Image;
use crate::layer::walk;
use crate::qcow2::Place;

/// Writes what the upper `above` files of `top`'s chain have into `base`, the file beneath them,
/// and makes that durable. `base` is that file opened anew, for writing, and at least as long as
/// the disk. `top` stays as it is, so that after a crash this can be run again;
/// [`Image::make_empty`] follows.
///
/// # Errors
/// One of them cannot be read or written, or `task` was stopped.
pub fn commit(top: &Image, base: &Image, above: usize, task: &Task) -> Result<()> {
    let size = top.size();
    base.check_range(0, size)?;
    task.begin(size);
    let layers = top.layers.get(..above).unwrap_or(&top.layers);
    Windows::new(size).run(1, |window, buffer| {
        let len = window.end - window.start;
        let mut at = window.start;
        walk(layers, window.start, len, &mut |index, run| {
            let start = at;
            at += run.len;
            if index == above {
                return Ok(());
            }
            if matches!(run.place, Place::Zero | Place::Below) {
                return base.write_zeroes(start, run.len, true);
            }
            buffer.resize(run.len as usize, 0);
            top.read(start, buffer)?;
            base.write(start, buffer)
        })?;
        task.advance(len)
    })?;
    base.flush()
}
