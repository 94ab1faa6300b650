//! The anti-forensic splitter of LUKS1: a key is spread over so many bytes that a disk is unlikely
//! to keep all of them once they were overwritten, and all of them are needed.

use std::io;

use crate::crypt::hash::Hash;
use crate::crypt::random;
use crate::crypt::secret::Secret;

/// Spreads a key over `stripes` times its length.
pub(super) fn split(hash: Hash, key: &[u8], stripes: usize) -> io::Result<Secret> {
    let mut material = Secret::zeros(key.len() * stripes);
    let (noise, last) = material.bytes_mut().split_at_mut(key.len() * (stripes - 1));
    random(noise)?;
    last.copy_from_slice(&diffused(hash, noise, key.len()));
    xor(last, key);
    Ok(material)
}

/// Undoes [`split`].
pub(super) fn merge(hash: Hash, material: &[u8], key_bytes: usize) -> Secret {
    let (noise, last) = material.split_at(material.len().saturating_sub(key_bytes));
    let mut key = diffused(hash, noise, key_bytes);
    xor(key.bytes_mut(), last);
    key
}

/// What all stripes but the last come to.
fn diffused(hash: Hash, noise: &[u8], key_bytes: usize) -> Secret {
    let mut sum = Secret::zeros(key_bytes);
    for stripe in noise.chunks_exact(key_bytes) {
        xor(sum.bytes_mut(), stripe);
        for (i, part) in (0_u32..).zip(sum.bytes_mut().chunks_mut(hash.len())) {
            let digest = hash.digest(&[&i.to_be_bytes(), part]);
            part.iter_mut()
                .zip(digest.iter())
                .for_each(|(byte, new)| *byte = *new);
        }
    }
    sum
}

fn xor(bytes: &mut [u8], with: &[u8]) {
    bytes
        .iter_mut()
        .zip(with)
        .for_each(|(byte, with)| *byte ^= with);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stripe_is_needed() {
        for hash in [Hash::Sha1, Hash::Sha256, Hash::Sha512] {
            let key: Vec<u8> = (0..48).collect();
            let mut material = split(hash, &key, 40).unwrap();
            assert_eq!(*merge(hash, &material, 48), key);
            for stripe in 0..40 {
                material.bytes_mut()[stripe * 48] ^= 1;
                assert_ne!(*merge(hash, &material, 48), key, "stripe {stripe}");
                material.bytes_mut()[stripe * 48] ^= 1;
            }
        }
    }
}
