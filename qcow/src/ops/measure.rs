//! How large an image's file would be.

use crate::create::{CreateOptions, Preallocation};
use crate::error::{Error, Result};
use crate::image::Image;

/// What a new image's file would take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measurement {
    /// Bytes of a file that has no more than the content.
    pub required: u64,
    /// Bytes of a file in which all of the disk has a place.
    pub fully_allocated: u64,
}

/// Says how large the file of an image with these options would be: an upper bound, for a disk
/// with the content of `source`, or with none.
///
/// # Errors
/// The options contradict each other, or `source` cannot be read.
pub fn measure(options: &CreateOptions, source: Option<&Image>) -> Result<Measurement> {
    let whole = CreateOptions {
        preallocation: Preallocation::Metadata,
        backing: None,
        ..options.clone()
    };
    let fully_allocated = whole.file_len().map_err(|reason| Error::Options {
        file: "a new image".into(),
        reason,
    })?;
    if options.preallocation != Preallocation::Off {
        return Ok(Measurement {
            required: fully_allocated,
            fully_allocated,
        });
    }
    let cluster = u64::from(options.cluster_size);
    let mut used = 0;
    // Clusters up to this one are counted.
    let mut counted = 0;
    if let Some(source) = source {
        source.map(0, source.size(), &mut |entry| {
            if !entry.zero {
                let first = (entry.start / cluster).max(counted);
                let end = (entry.start + entry.len).div_ceil(cluster);
                used += end.saturating_sub(first);
                counted = counted.max(end);
            }
            Ok(())
        })?;
    }
    let unused = options.size.div_ceil(cluster).saturating_sub(used) * cluster;
    Ok(Measurement {
        required: fully_allocated.saturating_sub(unused),
        fully_allocated,
    })
}
