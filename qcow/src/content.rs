//! What a write puts on a disk: bytes in memory, or a range of a file.

use std::os::fd::BorrowedFd;

/// What is written to a disk.
#[derive(Clone, Copy)]
pub(crate) enum Content<'a> {
    Bytes(&'a [u8]),
    /// For plain images only.
    File(FileRange<'a>),
}

impl<'a> Content<'a> {
    pub(crate) fn len(&self) -> u64 {
        match self {
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::File(range) => range.len,
        }
    }

    /// The first `len` bytes and the others.
    pub(crate) fn split_at(self, len: u64) -> (Content<'a>, Content<'a>) {
        match self {
            Content::Bytes(bytes) => {
                let (head, tail) = bytes.split_at(len as usize);
                (Content::Bytes(head), Content::Bytes(tail))
            }
            Content::File(range) => {
                let head = FileRange { len, ..range };
                let tail = FileRange {
                    from: range.from + len,
                    len: range.len - len,
                    ..range
                };
                (Content::File(head), Content::File(tail))
            }
        }
    }
}

/// A range of a file that the host copies from.
#[derive(Clone, Copy)]
pub(crate) struct FileRange<'a> {
    pub(crate) file: BorrowedFd<'a>,
    /// First byte.
    pub(crate) from: u64,
    pub(crate) len: u64,
}
