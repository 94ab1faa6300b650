//! Encryption: what turns a cluster's bytes into what the file has, and back.
//!
//! Only guest data is encrypted. Tables are not, and neither are compressed clusters.

pub(crate) mod encrypted;
mod hash;
pub(crate) mod keys;
mod legacy_aes;
pub(crate) mod luks;
pub(crate) mod secret;
mod sectors;

pub(crate) use encrypted::Encrypted;
pub(crate) use keys::Keys;

/// Fills `bytes` with the system's randomness.
pub(crate) fn random(bytes: &mut [u8]) -> std::io::Result<()> {
    getrandom::fill(bytes).map_err(std::io::Error::other)
}
