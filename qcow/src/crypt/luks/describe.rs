//! What a LUKS header tells everyone.

use super::header::{Header, STRIPES, field};
use super::{HEADER_BYTES, Luks};
use crate::addr::be32;
use crate::crypt::sectors::{Mode, SECTOR};
use crate::error::Result;
use crate::extension::text;
use crate::host::Host;

/// What the header of a LUKS image tells everyone, in the words of LUKS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LuksInfo {
    /// The cipher: `aes`.
    pub cipher: String,
    /// Bits of its key: 128, 192 or 256.
    pub key_bits: u32,
    /// Mode of operation, and after a hyphen what numbers sectors, such as `xts-plain64`.
    pub cipher_mode: String,
    /// Hash of the key derivation, such as `sha256`.
    pub hash: String,
    /// The header's own identity, as text.
    pub uuid: String,
    /// Iterations of PBKDF2 that the master key's digest takes.
    pub digest_iterations: u32,
    /// Where data would follow the header, in bytes from its start.
    pub payload_offset: u64,
    /// The key slots, eight of them.
    pub slots: Vec<KeySlot>,
}

/// A slot for a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeySlot {
    /// Iterations of PBKDF2; `None` if the slot is free.
    pub iterations: Option<u32>,
    /// Where its key material is, in bytes from the header's start.
    pub offset: u64,
    /// How many times the key's length the material has.
    pub stripes: u32,
}

impl Luks {
    /// Reads the header of an area of the file, `len` bytes at `offset`.
    pub(crate) fn describe(host: &Host, offset: u64, len: u64) -> Result<LuksInfo> {
        let mut bytes = [0; HEADER_BYTES];
        host.read(offset, &mut bytes)?;
        let header = Header::parse(&bytes, offset, len).map_err(|refusal| host.refuse(refusal))?;
        let name = |at: usize, len: usize| text(bytes.get(at..at + len).unwrap_or_default());
        let keys = if header.mode == Mode::Xts { 2 } else { 1 };
        let slots = header.slots.iter().map(|slot| KeySlot {
            iterations: slot.active.then_some(slot.iterations),
            offset: slot.material_at(),
            stripes: STRIPES as u32,
        });
        Ok(LuksInfo {
            cipher: name(field::CIPHER_NAME, 32),
            key_bits: header.key_bytes as u32 * 8 / keys,
            cipher_mode: name(field::CIPHER_MODE, 32),
            hash: name(field::HASH_SPEC, 32),
            uuid: name(field::UUID, 40),
            digest_iterations: header.digest_iterations,
            payload_offset: u64::from(be32(&bytes, field::PAYLOAD_OFFSET)) * SECTOR as u64,
            slots: slots.collect(),
        })
    }
}
