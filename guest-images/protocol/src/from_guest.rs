//! What PID 1 says.

use alloc::vec::Vec;

use crate::frame::{Message, exactly, tagged};
use crate::item::{Item, text};
use crate::wire::{Reader, WireError};

/// A message from PID 1 to the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromGuest<'a> {
    /// PID 1 is up and has found its ports. Said once, first.
    Hello {
        /// The protocol it speaks, [`VERSION`](crate::VERSION).
        version: u32,
    },
    /// The root is mounted, the trees are copied in, and the command runs.
    Started,
    /// A part of a tree that is being copied out.
    Item(Item<'a>),
    /// The command ended with this status. Said once, last.
    Exited {
        /// Its exit status.
        code: u8,
    },
    /// The command was ended by a signal. Said once, last.
    Signaled {
        /// The signal's number, 1 to 64.
        number: u8,
    },
    /// The command did not run. Said once, last.
    Error {
        /// What failed.
        failure: Failure,
        /// Why, for a person to read.
        message: &'a str,
    },
}

/// What PID 1 failed to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// There is no such command; a shell's status for it is 127.
    NotFound = 1,
    /// The command is there but cannot be run; a shell's status for it is 126.
    NotExecutable = 2,
    /// The root file system could not be mounted or another step of the boot failed.
    Boot = 3,
    /// A tree could not be copied in.
    CopyIn = 4,
    /// The VMM said something that PID 1 does not understand.
    Protocol = 5,
}

impl Failure {
    const ALL: [Self; 5] = [
        Self::NotFound,
        Self::NotExecutable,
        Self::Boot,
        Self::CopyIn,
        Self::Protocol,
    ];

    /// The status that a shell would give a command that failed so, where it has one.
    pub fn shell_status(self) -> Option<u8> {
        match self {
            Self::NotFound => Some(127),
            Self::NotExecutable => Some(126),
            Self::Boot | Self::CopyIn | Self::Protocol => None,
        }
    }
}

const HELLO: u8 = 1;
const STARTED: u8 = 2;
const ITEM: u8 = 3;
const EXITED: u8 = 4;
const SIGNALED: u8 = 5;
const ERROR: u8 = 6;

impl<'a> Message<'a> for FromGuest<'a> {
    fn parse(tag: u8, payload: &'a [u8]) -> Result<Self, WireError> {
        exactly(tag, payload, |reader| {
            Ok(match tag {
                HELLO => Self::Hello {
                    version: reader.u32()?,
                },
                STARTED => Self::Started,
                ITEM => Self::Item(Item::read(reader)?),
                EXITED => Self::Exited { code: reader.u8()? },
                SIGNALED => match reader.u8()? {
                    number @ 1..=64 => Self::Signaled { number },
                    _ => return Err(reader.bad("signal number")),
                },
                ERROR => Self::Error {
                    failure: failure(reader)?,
                    message: text(reader)?,
                },
                _ => return Err(WireError::UnknownTag(tag)),
            })
        })
    }

    fn write(&self, out: &mut Vec<u8>) -> u8 {
        match self {
            Self::Hello { version } => tagged(HELLO, out, |out| out.u32(*version)),
            Self::Started => STARTED,
            Self::Item(item) => tagged(ITEM, out, |out| item.write(out)),
            Self::Exited { code } => tagged(EXITED, out, |out| out.u8(*code)),
            Self::Signaled { number } => tagged(SIGNALED, out, |out| out.u8(*number)),
            Self::Error { failure, message } => tagged(ERROR, out, |out| {
                out.u8(*failure as u8);
                out.bytes(message.as_bytes());
            }),
        }
    }
}

fn failure(reader: &mut Reader<'_>) -> Result<Failure, WireError> {
    let number = reader.u8()?;
    let known = Failure::ALL
        .into_iter()
        .find(|failure| *failure as u8 == number);
    known.ok_or_else(|| reader.bad("failure"))
}
