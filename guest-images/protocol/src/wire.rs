//! Integers and byte strings, to and from the payload of a frame.

use alloc::vec::Vec;

/// Why bytes are not a message, or a message cannot become bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A frame is longer than [`MAX_FRAME`](crate::MAX_FRAME).
    #[error("a message of {0} bytes is longer than the {max} that are allowed", max = crate::MAX_FRAME)]
    TooLong(usize),
    /// A frame has no tag.
    #[error("an empty message")]
    Empty,
    /// A tag that this version does not have, or that the other end must not send.
    #[error("a message of unknown kind {0}")]
    UnknownTag(u8),
    /// A payload ends before its last field.
    #[error("a message of kind {0} is cut short")]
    Truncated(u8),
    /// A payload goes on after its last field.
    #[error("a message of kind {0} has {1} bytes too many")]
    TrailingBytes(u8, usize),
    /// A field has a value out of its range.
    #[error("a message of kind {0} has an impossible {1}")]
    BadValue(u8, &'static str),
}

/// Reads the fields of a payload in order.
pub(crate) struct Reader<'a> {
    tag: u8,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(tag: u8, payload: &'a [u8]) -> Self {
        Self { tag, rest: payload }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let (head, rest) = self
            .rest
            .split_at_checked(count)
            .ok_or(WireError::Truncated(self.tag))?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let bytes = self.take(N)?;
        bytes.try_into().map_err(|_| WireError::Truncated(self.tag))
    }

    pub(crate) fn u8(&mut self) -> Result<u8, WireError> {
        self.array().map(|[byte]| byte)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn i64(&mut self) -> Result<i64, WireError> {
        self.array().map(i64::from_le_bytes)
    }

    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], WireError> {
        let count = self.u32()?;
        self.take(usize::try_from(count).map_err(|_| WireError::Truncated(self.tag))?)
    }

    /// A list of byte strings. Nothing is allocated beyond what the payload's own length pays for:
    /// an element takes at least the four bytes of its length.
    pub(crate) fn list(&mut self) -> Result<Vec<&'a [u8]>, WireError> {
        let count = usize::try_from(self.u32()?).unwrap_or(usize::MAX);
        if count > self.rest.len() / 4 {
            return Err(WireError::Truncated(self.tag));
        }
        (0..count).map(|_| self.bytes()).collect()
    }

    /// All that is left.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        core::mem::take(&mut self.rest)
    }

    pub(crate) fn bad(&self, what: &'static str) -> WireError {
        WireError::BadValue(self.tag, what)
    }

    pub(crate) fn end(self) -> Result<(), WireError> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(WireError::TrailingBytes(self.tag, extra)),
        }
    }
}

/// Writes the fields of a payload in order. A string longer than `u32` can say is longer than a
/// frame, which [`Message::encode`](crate::Message::encode) refuses in the end.
pub(crate) struct Writer<'a>(pub(crate) &'a mut Vec<u8>);

impl Writer<'_> {
    pub(crate) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn i64(&mut self, value: i64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn raw(&mut self, value: &[u8]) {
        self.0.extend_from_slice(value);
    }

    pub(crate) fn bytes(&mut self, value: &[u8]) {
        self.u32(u32::try_from(value.len()).unwrap_or(u32::MAX));
        self.raw(value);
    }

    pub(crate) fn list(&mut self, values: &[&[u8]]) {
        self.u32(u32::try_from(values.len()).unwrap_or(u32::MAX));
        for value in values {
            self.bytes(value);
        }
    }
}
