//! Where a request's bytes are, so that a caller with its own I/O can move them.

use crate::pin::Pin;
use crate::prepare::Prepared;

/// A run of a request's bytes, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// `len` bytes at `offset` of [`Image::files`](crate::Image::files)`[file]`. What lies past
    /// the file's end reads as zeros.
    File {
        /// Index into [`Image::files`](crate::Image::files).
        file: usize,
        /// Byte offset in that file.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// `len` bytes that read as zeros. Never in a write plan.
    Zero {
        /// Length in bytes.
        len: u64,
    },
}

/// How a request's bytes can be moved.
#[derive(Debug)]
pub enum Plan {
    /// Directly from or to these extents, which cover the request exactly. Neighbours are merged.
    Fast {
        /// Where the bytes are, in the request's order.
        extents: Vec<Extent>,
        /// Drop it after the last completion of the I/O.
        pin: Pin,
    },
    /// Directly to these extents, as above, of which some nothing names yet: whole subclusters get a
    /// place, and nothing has to be read for it.
    Fill {
        /// Where the bytes go, in the request's order.
        extents: Vec<Extent>,
        /// For [`Image::commit`](crate::Image::commit), after the last completion of the I/O.
        fill: Fill,
    },
    /// Through [`Image::read`](crate::Image::read) or [`Image::write`](crate::Image::write):
    /// there is something to copy or to decompress, or a file has no descriptor.
    Slow,
}

/// Clusters that are being written and that the tables do not name yet. Who writes to them otherwise
/// waits: it must come to [`Image::commit`](crate::Image::commit), whatever becomes of the I/O.
#[derive(Debug)]
#[must_use]
pub struct Fill {
    pub(crate) parts: Vec<Prepared>,
    /// For what is overwritten in place beside.
    pub(crate) _pin: Pin,
}

/// Appends an extent, merging it with its neighbour.
pub(crate) fn push(extents: &mut Vec<Extent>, next: Extent) {
    match (extents.last_mut(), next) {
        (
            Some(Extent::File { file, offset, len }),
            Extent::File {
                file: next_file,
                offset: next_offset,
                len: more,
            },
        ) if *file == next_file && offset.checked_add(*len) == Some(next_offset) => *len += more,
        (Some(Extent::Zero { len }), Extent::Zero { len: more }) => *len += more,
        _ => extents.push(next),
    }
}
