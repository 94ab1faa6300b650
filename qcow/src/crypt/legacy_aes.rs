//! Encryption method 1, of old images: AES-128 in CBC mode with the password itself as the key.

use zeroize::Zeroizing;

use super::sectors::Sectors;

/// The password is cut, or filled with zeros, to 16 bytes. Nothing in the image can tell whether
/// it is the right one.
pub(super) fn sectors(password: &[u8]) -> Sectors {
    let mut key = Zeroizing::new([0; 16]);
    key.iter_mut()
        .zip(password)
        .for_each(|(byte, of_password)| *byte = *of_password);
    Sectors::aes_128_cbc(&key)
}
