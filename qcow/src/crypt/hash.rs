//! The hashes that LUKS uses, and PBKDF2 (RFC 8018) with them.

use sha1::Sha1;
use sha2::{Digest, Sha256, Sha512};

use super::secret::Secret;

/// A hash that a LUKS header may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hash {
    Sha1,
    Sha256,
    Sha512,
}

impl Hash {
    /// The hash of that name, as headers have it.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        [Hash::Sha1, Hash::Sha256, Hash::Sha512]
            .into_iter()
            .find(|hash| hash.name() == name)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Hash::Sha1 => "sha1",
            Hash::Sha256 => "sha256",
            Hash::Sha512 => "sha512",
        }
    }

    /// Bytes in a digest.
    pub(crate) fn len(self) -> usize {
        match self {
            Hash::Sha1 => 20,
            Hash::Sha256 => 32,
            Hash::Sha512 => 64,
        }
    }

    /// The digest of some pieces, one after the other.
    pub(crate) fn digest(self, pieces: &[&[u8]]) -> Secret {
        match self {
            Hash::Sha1 => digest::<Sha1>(pieces),
            Hash::Sha256 => digest::<Sha256>(pieces),
            Hash::Sha512 => digest::<Sha512>(pieces),
        }
    }

    /// Fills `key` by PBKDF2.
    pub(crate) fn derive(self, password: &[u8], salt: &[u8], iterations: u32, key: &mut [u8]) {
        match self {
            Hash::Sha1 => pbkdf2::pbkdf2_hmac::<Sha1>(password, salt, iterations, key),
            Hash::Sha256 => pbkdf2::pbkdf2_hmac::<Sha256>(password, salt, iterations, key),
            Hash::Sha512 => pbkdf2::pbkdf2_hmac::<Sha512>(password, salt, iterations, key),
        }
    }
}

fn digest<D: Digest>(pieces: &[&[u8]]) -> Secret {
    let mut hasher = D::new();
    pieces.iter().for_each(|piece| hasher.update(piece));
    Secret::new(hasher.finalize().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 6070, and the same input with the other hashes.
    #[test]
    fn pbkdf2_as_others_have_it() {
        let key = |hash: Hash| {
            let mut key = [0; 20];
            hash.derive(b"password", b"salt", 4096, &mut key);
            key.map(|byte| format!("{byte:02x}")).concat()
        };
        assert_eq!(key(Hash::Sha1), "4b007901b765489abead49d926f721d065a429c1");
        assert_eq!(
            key(Hash::Sha256),
            "c5e478d59288c841aa530db6845c4c8d962893a0"
        );
        assert_eq!(
            key(Hash::Sha512),
            "d197b1b33db0143e018b12f3d1d1479e6cdebdcc"
        );
    }
}
