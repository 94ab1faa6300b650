//! Locking the master key with a password, and unlocking it.

use std::io;

use super::afsplit;
use super::header::{DIGEST_BYTES, Header, SALT_BYTES, STRIPES, Slot};
use crate::crypt::random;
use crate::crypt::secret::Secret;
use crate::crypt::sectors::Sectors;

impl Header {
    /// What encrypts with a key: the master key for data, a password's for key material.
    pub(super) fn sectors(&self, key: &[u8]) -> Option<Sectors> {
        Sectors::new(self.mode, self.iv, key)
    }

    /// What tells the master key from any other.
    pub(super) fn digest_of(&self, master: &[u8]) -> [u8; DIGEST_BYTES] {
        let mut digest = [0; DIGEST_BYTES];
        let iterations = self.digest_iterations;
        self.hash
            .derive(master, &self.digest_salt, iterations, &mut digest);
        digest
    }

    /// The master key, if the password is this slot's.
    pub(super) fn unlock(
        &self,
        slot: &Slot,
        mut material: Secret,
        password: &[u8],
    ) -> Option<Secret> {
        self.cipher_of(slot, password)?
            .decrypt(0, material.bytes_mut());
        let master = afsplit::merge(self.hash, &material, self.key_bytes);
        (self.digest_of(&master) == self.digest).then_some(master)
    }

    /// An active slot for a password in the place of `slot`, and its key material.
    pub(super) fn lock(
        &self,
        slot: &Slot,
        master: &[u8],
        password: &[u8],
        iterations: u32,
    ) -> io::Result<(Slot, Secret)> {
        let mut salt = [0; SALT_BYTES];
        random(&mut salt)?;
        let slot = Slot {
            active: true,
            iterations,
            salt,
            ..*slot
        };
        let cipher = self
            .cipher_of(&slot, password)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let mut material = afsplit::split(self.hash, master, STRIPES)?;
        cipher.encrypt(0, material.bytes_mut());
        Ok((slot, material))
    }

    fn cipher_of(&self, slot: &Slot, password: &[u8]) -> Option<Sectors> {
        let mut key = Secret::zeros(self.key_bytes);
        self.hash
            .derive(password, &slot.salt, slot.iterations, key.bytes_mut());
        self.sectors(&key)
    }
}
