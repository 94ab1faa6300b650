//! The parts of a file tree as they travel.

use crate::wire::{Reader, WireError, Writer};

/// Permission bits and the time of the last modification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// The permission bits, `0o777` at most: no set-user-ID, set-group-ID or sticky bit travels.
    pub mode: u32,
    /// Seconds since 1970-01-01.
    pub seconds: i64,
    /// Nanoseconds after that second, below 1,000,000,000.
    pub nanoseconds: u32,
}

/// A part of a file tree, in depth-first order. A tree has one root, a file, a symbolic link or a
/// directory, and ends with [`Item::End`]. Names are single components: a path that leaves the
/// tree cannot be said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item<'a> {
    /// A directory; what follows, to its [`Item::Leave`], is in it. The root's name is not used.
    Enter {
        /// Its name.
        name: &'a [u8],
        /// Its permissions and time.
        stamp: Stamp,
    },
    /// The end of the innermost directory.
    Leave,
    /// A regular file, whose bytes are the [`Item::Data`] that follow.
    File {
        /// Its name.
        name: &'a [u8],
        /// Its permissions and time.
        stamp: Stamp,
    },
    /// At most [`MAX_DATA`](crate::MAX_DATA) more bytes of the last file.
    Data(&'a [u8]),
    /// A symbolic link.
    Symlink {
        /// Its name.
        name: &'a [u8],
        /// What it holds, not looked at.
        target: &'a [u8],
    },
    /// Something of another kind (a device, a socket, a FIFO) that is left out.
    Skipped {
        /// Its name.
        name: &'a [u8],
    },
    /// The tree is complete.
    End,
    /// The sender could not go on; the tree is incomplete.
    Failed {
        /// Why, for a person to read.
        message: &'a str,
    },
}

const ENTER: u8 = 1;
const LEAVE: u8 = 2;
const FILE: u8 = 3;
const DATA: u8 = 4;
const SYMLINK: u8 = 5;
const SKIPPED: u8 = 6;
const END: u8 = 7;
const FAILED: u8 = 8;

impl<'a> Item<'a> {
    pub(crate) fn read(reader: &mut Reader<'a>) -> Result<Self, WireError> {
        Ok(match reader.u8()? {
            ENTER => Self::Enter {
                stamp: stamp(reader)?,
                name: reader.bytes()?,
            },
            LEAVE => Self::Leave,
            FILE => Self::File {
                stamp: stamp(reader)?,
                name: reader.bytes()?,
            },
            DATA => {
                let data = reader.rest();
                if data.len() > crate::MAX_DATA {
                    return Err(reader.bad("amount of data"));
                }
                Self::Data(data)
            }
            SYMLINK => Self::Symlink {
                name: reader.bytes()?,
                target: reader.bytes()?,
            },
            SKIPPED => Self::Skipped {
                name: reader.bytes()?,
            },
            END => Self::End,
            FAILED => Self::Failed {
                message: text(reader)?,
            },
            _ => return Err(reader.bad("part of a file tree")),
        })
    }

    pub(crate) fn write(&self, out: &mut Writer<'_>) {
        match *self {
            Self::Enter { name, stamp } => stamped(out, ENTER, stamp, name),
            Self::Leave => out.u8(LEAVE),
            Self::File { name, stamp } => stamped(out, FILE, stamp, name),
            Self::Data(data) => {
                out.u8(DATA);
                out.raw(data);
            }
            Self::Symlink { name, target } => {
                out.u8(SYMLINK);
                out.bytes(name);
                out.bytes(target);
            }
            Self::Skipped { name } => {
                out.u8(SKIPPED);
                out.bytes(name);
            }
            Self::End => out.u8(END),
            Self::Failed { message } => {
                out.u8(FAILED);
                out.bytes(message.as_bytes());
            }
        }
    }
}

pub(crate) fn text<'a>(reader: &mut Reader<'a>) -> Result<&'a str, WireError> {
    core::str::from_utf8(reader.bytes()?).map_err(|_| reader.bad("text"))
}

fn stamp(reader: &mut Reader<'_>) -> Result<Stamp, WireError> {
    let stamp = Stamp {
        mode: reader.u32()?,
        seconds: reader.i64()?,
        nanoseconds: reader.u32()?,
    };
    if stamp.mode > 0o777 {
        return Err(reader.bad("file mode"));
    }
    if stamp.nanoseconds >= 1_000_000_000 {
        return Err(reader.bad("time"));
    }
    Ok(stamp)
}

fn stamped(out: &mut Writer<'_>, kind: u8, stamp: Stamp, name: &[u8]) {
    out.u8(kind);
    out.u32(stamp.mode);
    out.i64(stamp.seconds);
    out.u32(stamp.nanoseconds);
    out.bytes(name);
}
