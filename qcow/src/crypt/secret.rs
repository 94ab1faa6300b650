//! Passwords and keys: wiped when dropped, never printed.

use std::fmt;
use std::ops::Deref;

use zeroize::Zeroizing;

/// A password or a key. It is wiped from memory when it is dropped, and never printed.
///
/// The bytes are taken as they are: a line's end in a file of a password is a part of it.
#[derive(Clone)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// Takes the bytes over. Copies that the caller made are the caller's to wipe.
    pub fn new(bytes: Vec<u8>) -> Self {
        Secret(Zeroizing::new(bytes))
    }

    /// As many zeros, to be filled: a key is never moved to where it would not be wiped.
    pub(crate) fn zeros(len: usize) -> Self {
        Secret::new(vec![0; len])
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Deref for Secret {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}
