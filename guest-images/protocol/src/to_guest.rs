//! What the VMM says.

use alloc::vec::Vec;

use crate::frame::{Message, exactly, tagged};
use crate::item::Item;
use crate::wire::{Reader, WireError, Writer};

/// A message from the VMM to PID 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToGuest<'a> {
    /// The [`Item`]s that follow are a tree to copy into the guest.
    CopyIn {
        /// Where to, by the rules of [`files`](crate::files).
        destination: &'a [u8],
        /// The name of the tree's root, for a destination that is an existing directory; empty
        /// to copy what the root has in it rather than the root itself.
        name: &'a [u8],
    },
    /// A part of the tree that is being copied in.
    Item(Item<'a>),
    /// When the command has ended, send the tree at this path.
    CopyOut {
        /// A path in the guest, relative to `/`.
        source: &'a [u8],
    },
    /// Run this command.
    Start(Start<'a>),
    /// Send this signal to the command's process group.
    Signal {
        /// The signal's number on Linux, 1 to 64.
        number: u8,
    },
}

/// A command to run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Start<'a> {
    /// The command and its arguments, at least one. A command without a `/` is looked up in the
    /// `PATH` of its environment.
    pub argv: Vec<&'a [u8]>,
    /// `NAME=value` strings, over PID 1's defaults for `PATH`, `HOME` and `TERM`.
    pub env: Vec<&'a [u8]>,
    /// The working directory; empty for `/`.
    pub cwd: &'a [u8],
}

const COPY_IN: u8 = 1;
const ITEM: u8 = 2;
const COPY_OUT: u8 = 3;
const START: u8 = 4;
const SIGNAL: u8 = 5;

impl<'a> Message<'a> for ToGuest<'a> {
    fn parse(tag: u8, payload: &'a [u8]) -> Result<Self, WireError> {
        exactly(tag, payload, |reader| {
            Ok(match tag {
                COPY_IN => Self::CopyIn {
                    destination: path(reader)?,
                    name: path(reader)?,
                },
                ITEM => Self::Item(Item::read(reader)?),
                COPY_OUT => Self::CopyOut {
                    source: path(reader)?,
                },
                START => Self::Start(start(reader)?),
                SIGNAL => match reader.u8()? {
                    number @ 1..=64 => Self::Signal { number },
                    _ => return Err(reader.bad("signal number")),
                },
                _ => return Err(WireError::UnknownTag(tag)),
            })
        })
    }

    fn write(&self, out: &mut Vec<u8>) -> u8 {
        let bytes = |tag, out, fields: &[&[u8]]| {
            tagged(tag, out, |out| {
                fields.iter().for_each(|field| out.bytes(field))
            })
        };
        match self {
            Self::CopyIn { destination, name } => bytes(COPY_IN, out, &[destination, name]),
            Self::Item(item) => tagged(ITEM, out, |out| item.write(out)),
            Self::CopyOut { source } => bytes(COPY_OUT, out, &[source]),
            Self::Start(start) => tagged(START, out, |out: &mut Writer<'_>| {
                out.list(&start.argv);
                out.list(&start.env);
                out.bytes(start.cwd);
            }),
            Self::Signal { number } => tagged(SIGNAL, out, |out| out.u8(*number)),
        }
    }
}

fn start<'a>(reader: &mut Reader<'a>) -> Result<Start<'a>, WireError> {
    let start = Start {
        argv: reader.list()?,
        env: reader.list()?,
        cwd: path(reader)?,
    };
    if start.argv.first().is_none_or(|command| command.is_empty()) {
        return Err(reader.bad("command"));
    }
    if start
        .argv
        .iter()
        .chain(&start.env)
        .any(|string| string.contains(&0))
    {
        return Err(reader.bad("argument"));
    }
    Ok(start)
}

fn path<'a>(reader: &mut Reader<'a>) -> Result<&'a [u8], WireError> {
    let path = reader.bytes()?;
    if path.contains(&0) {
        return Err(reader.bad("path"));
    }
    Ok(path)
}
