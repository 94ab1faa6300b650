//! Frames: a little-endian `u32` length of what follows it, a tag byte, a payload.

use alloc::vec::Vec;

use crate::MAX_FRAME;
use crate::wire::{Reader, WireError, Writer};

const LENGTH_FIELD: usize = 4;

/// A message of one direction: [`ToGuest`](crate::ToGuest) or [`FromGuest`](crate::FromGuest).
pub trait Message<'a>: Sized {
    /// Reads a message from the payload of a frame with this tag.
    ///
    /// # Errors
    /// When the tag is not of this direction or the payload is not what the tag says.
    fn parse(tag: u8, payload: &'a [u8]) -> Result<Self, WireError>;

    /// The tag of this message; its payload is appended to `out`.
    fn write(&self, out: &mut Vec<u8>) -> u8;

    /// Appends this message as a frame to `out`, which is left as it was on an error.
    ///
    /// # Errors
    /// [`WireError::TooLong`] when it has more than [`MAX_FRAME`] bytes.
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        let start = out.len();
        out.extend_from_slice(&[0; LENGTH_FIELD + 1]);
        let tag = self.write(out);
        let length = out.len() - start - LENGTH_FIELD;
        let Some(field) = u32::try_from(length).ok().filter(|_| length <= MAX_FRAME) else {
            out.truncate(start);
            return Err(WireError::TooLong(length));
        };
        if let Some(header) = out.get_mut(start..start + LENGTH_FIELD + 1) {
            let (count, kind) = header.split_at_mut(LENGTH_FIELD);
            count.copy_from_slice(&field.to_le_bytes());
            kind.fill(tag);
        }
        Ok(())
    }
}

/// Finds frames in a stream of bytes that arrives in pieces.
///
/// ```
/// use cowshed_guest_protocol::{Decoder, FromGuest, Message};
///
/// let mut bytes = Vec::new();
/// FromGuest::Hello { version: 1 }.encode(&mut bytes)?;
/// let mut decoder = Decoder::default();
/// decoder.feed(&bytes[..3]);
/// assert_eq!(decoder.next::<FromGuest>()?, None);
/// decoder.feed(&bytes[3..]);
/// assert_eq!(decoder.next()?, Some(FromGuest::Hello { version: 1 }));
/// # Ok::<(), cowshed_guest_protocol::WireError>(())
/// ```
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// How many bytes at the front belong to messages that were handed out.
    consumed: usize,
}

impl Decoder {
    /// Takes bytes that arrived. Call [`next`](Self::next) until it has no more before feeding
    /// again: then no more than a frame and one such piece is ever held.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.consumed);
        self.consumed = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next message, or `None` until more bytes are fed.
    ///
    /// # Errors
    /// When the bytes are no message. The stream is of no use afterwards.
    pub fn next<'a, M: Message<'a>>(&'a mut self) -> Result<Option<M>, WireError> {
        let pending = self.buffer.get(self.consumed..).unwrap_or_default();
        let Some((field, rest)) = pending.split_first_chunk::<LENGTH_FIELD>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_le_bytes(*field)).unwrap_or(usize::MAX);
        if length > MAX_FRAME {
            return Err(WireError::TooLong(length));
        }
        if length == 0 {
            return Err(WireError::Empty);
        }
        let Some((tag, payload)) = rest.get(..length).and_then(<[u8]>::split_first) else {
            return Ok(None);
        };
        self.consumed += LENGTH_FIELD + length;
        M::parse(*tag, payload).map(Some)
    }
}

/// Parses with `read` and insists that nothing is left over.
pub(crate) fn exactly<'a, T>(
    tag: u8,
    payload: &'a [u8],
    read: impl FnOnce(&mut Reader<'a>) -> Result<T, WireError>,
) -> Result<T, WireError> {
    let mut reader = Reader::new(tag, payload);
    let value = read(&mut reader)?;
    reader.end()?;
    Ok(value)
}

/// Writes with `write` and returns the tag.
pub(crate) fn tagged(tag: u8, out: &mut Vec<u8>, write: impl FnOnce(&mut Writer<'_>)) -> u8 {
    write(&mut Writer(out));
    tag
}
