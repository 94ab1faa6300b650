//! Moving what an overlay has into what lies beneath it.

use rustix::fs::{Advice, fadvise};

use super::task::Task;
use super::window::Windows;
use crate::error::Result;
use crate::image::Image;
use crate::layer::{Layer, check_tables, nothing_until, walk};
use crate::qcow2::Place;

/// How an overlay is committed.
#[derive(Clone, Debug)]
pub struct CommitOptions {
    /// Files of the chain that are committed, from the top on.
    pub above: usize,
    /// The top one is [made empty](Image::make_empty) when the others' bytes are durable.
    pub make_empty: bool,
    /// Threads that read and write.
    pub threads: usize,
}

/// Writes what the upper files of `top`'s chain have into `base`, the file beneath them, and makes
/// that durable. `base` is that file opened anew, for writing, and at least as long as the disk.
/// Until that is done `top` stays as it is, so that after a crash this can be run again.
///
/// # Errors
/// One of them cannot be read or written, or `task` was stopped.
pub fn commit(top: &Image, base: &Image, options: &CommitOptions, task: &Task) -> Result<()> {
    let above = options.above;
    let size = top.size();
    base.check_range(0, size)?;
    task.begin(size);
    let layers = top.layers.get(..above).unwrap_or(&top.layers);
    check_tables(layers, 0, size)?;
    let nothing_until = |at| nothing_until(layers, at);
    Windows::new(size, base.cluster_size()).run(
        options.threads,
        nothing_until,
        |window, buffer| {
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
        },
    )?;
    if !options.make_empty {
        return base.flush();
    }
    std::thread::scope(|scope| {
        // While the disk is busy: giving back what the host has in memory takes as long as that.
        scope.spawn(|| top.uncache());
        base.flush()
    })?;
    top.make_empty()
}

impl Image {
    /// Lets the host forget what it has in memory of the guest's bytes, which are of no use any
    /// more. That it does not always do so harms nothing.
    fn uncache(&self) {
        let data = self.layers.first().map(Layer::data);
        if let Some(file) = data.and_then(|data| data.storage.file()) {
            let _ = fadvise(file, 0, None, Advice::DontNeed);
        }
    }
}
