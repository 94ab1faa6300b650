//! The LUKS1 header: from its bytes to numbers that were all checked, and back.

use crate::addr::be32;
use crate::crypt::hash::Hash;
use crate::crypt::sectors::{Iv, Mode, SECTOR};
use crate::error::Violation;
use crate::extension::text;
use crate::header::Refusal;

/// Bytes of the header.
pub(crate) const HEADER_BYTES: usize = SLOTS_AT + SLOTS * SLOT_BYTES;
/// Key slots that a header has.
pub(crate) const SLOTS: usize = 8;
/// Bytes of a slot in the header.
pub(super) const SLOT_BYTES: usize = 48;
/// Bytes of the master key's digest.
pub(super) const DIGEST_BYTES: usize = 20;
/// Bytes of each salt.
pub(super) const SALT_BYTES: usize = 32;
/// How many times a key's length its material has: always this many.
pub(super) const STRIPES: usize = 4000;

const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
const SLOTS_AT: usize = 208;
const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;
/// Where the first slot's material goes in a new header; the others' are aligned likewise.
const MATERIAL_ALIGN: usize = 4096;

/// Byte offsets of the fields.
pub(super) mod field {
    pub(in crate::crypt::luks) const VERSION: usize = 6;
    pub(in crate::crypt::luks) const CIPHER_NAME: usize = 8;
    pub(in crate::crypt::luks) const CIPHER_MODE: usize = 40;
    pub(in crate::crypt::luks) const HASH_SPEC: usize = 72;
    pub(in crate::crypt::luks) const PAYLOAD_OFFSET: usize = 104;
    pub(in crate::crypt::luks) const KEY_BYTES: usize = 108;
    pub(in crate::crypt::luks) const DIGEST: usize = 112;
    pub(in crate::crypt::luks) const DIGEST_SALT: usize = 132;
    pub(in crate::crypt::luks) const DIGEST_ITERATIONS: usize = 164;
    pub(in crate::crypt::luks) const UUID: usize = 168;
}

/// A LUKS1 header whose every number was checked.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub(super) mode: Mode,
    pub(super) iv: Iv,
    pub(super) hash: Hash,
    pub(super) key_bytes: usize,
    pub(super) digest: [u8; DIGEST_BYTES],
    pub(super) digest_salt: [u8; SALT_BYTES],
    pub(super) digest_iterations: u32,
    pub(super) slots: [Slot; SLOTS],
}

/// A key slot: the master key, locked with one password.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Slot {
    pub(super) active: bool,
    pub(super) iterations: u32,
    pub(super) salt: [u8; SALT_BYTES],
    /// Where its key material is, in sectors from the header's start.
    pub(super) material: u32,
}

impl Slot {
    /// Bytes from the header's start.
    pub(super) fn material_at(&self) -> u64 {
        u64::from(self.material) * SECTOR as u64
    }

    /// As it is in the header.
    pub(super) fn encode(&self) -> [u8; SLOT_BYTES] {
        let mut bytes = [0; SLOT_BYTES];
        let state = if self.active { ACTIVE } else { INACTIVE };
        put(&mut bytes, 0, &state.to_be_bytes());
        put(&mut bytes, 4, &self.iterations.to_be_bytes());
        put(&mut bytes, 8, &self.salt);
        put(&mut bytes, 40, &self.material.to_be_bytes());
        put(&mut bytes, 44, &(STRIPES as u32).to_be_bytes());
        bytes
    }
}

impl Header {
    /// A new header with the algorithms that QEMU chooses, without a key: AES-256 in XTS mode,
    /// sectors numbered with 64 bits, SHA-256.
    pub(super) fn new() -> Self {
        let mut header = Header {
            mode: Mode::Xts,
            iv: Iv::Plain64,
            hash: Hash::Sha256,
            key_bytes: 64,
            digest: [0; DIGEST_BYTES],
            digest_salt: [0; SALT_BYTES],
            digest_iterations: 0,
            slots: [Slot::default(); SLOTS],
        };
        let mut at = MATERIAL_ALIGN;
        for slot in &mut header.slots {
            slot.material = (at / SECTOR) as u32;
            at += (header.key_bytes * STRIPES).next_multiple_of(MATERIAL_ALIGN);
        }
        header
    }

    /// Bytes of the header and all key material.
    pub(super) fn area_bytes(&self) -> u64 {
        let ends = |slot: &Slot| slot.material_at() + self.material_bytes() as u64;
        let end = self.slots.iter().map(ends).max().unwrap_or(0);
        end.next_multiple_of(MATERIAL_ALIGN as u64)
    }

    /// Bytes of a slot's key material.
    pub(super) fn material_bytes(&self) -> usize {
        self.key_bytes * STRIPES
    }

    /// Where a slot is in the header.
    pub(super) fn slot_at(index: usize) -> u64 {
        (SLOTS_AT + index * SLOT_BYTES) as u64
    }

    /// As it is in the file. The payload, which no LUKS header in an image has, would follow the
    /// key material.
    pub(super) fn encode(&self, uuid: &str) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mode = match self.mode {
            Mode::Ecb => "ecb",
            Mode::Cbc => "cbc",
            Mode::Xts => "xts",
        };
        let iv = match self.iv {
            Iv::Plain => "plain",
            Iv::Plain64 => "plain64",
            Iv::EssivSha256 => "essiv:sha256",
        };
        let payload = (self.area_bytes() / SECTOR as u64) as u32;
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, field::VERSION, &1_u16.to_be_bytes());
        put(&mut bytes, field::CIPHER_NAME, b"aes");
        put(
            &mut bytes,
            field::CIPHER_MODE,
            format!("{mode}-{iv}").as_bytes(),
        );
        put(&mut bytes, field::HASH_SPEC, self.hash.name().as_bytes());
        put(&mut bytes, field::PAYLOAD_OFFSET, &payload.to_be_bytes());
        put(
            &mut bytes,
            field::KEY_BYTES,
            &(self.key_bytes as u32).to_be_bytes(),
        );
        put(&mut bytes, field::DIGEST, &self.digest);
        put(&mut bytes, field::DIGEST_SALT, &self.digest_salt);
        put(
            &mut bytes,
            field::DIGEST_ITERATIONS,
            &self.digest_iterations.to_be_bytes(),
        );
        put(&mut bytes, field::UUID, uuid.as_bytes());
        for (index, slot) in self.slots.iter().enumerate() {
            put(&mut bytes, Self::slot_at(index) as usize, &slot.encode());
        }
        bytes
    }

    pub(super) fn set_slot(&mut self, index: usize, slot: Slot) {
        if let Some(place) = self.slots.get_mut(index) {
            *place = slot;
        }
    }

    /// Parses a header that is at `offset` of the file, at the start of an area of `area` bytes.
    pub(super) fn parse(bytes: &[u8], offset: u64, area: u64) -> Result<Self, Refusal> {
        let at = |field: usize| offset + field as u64;
        let name = |field: usize| text(bytes.get(field..field + 32).unwrap_or_default());
        if !bytes.starts_with(MAGIC) {
            let found = format!("{:02x?}", bytes.get(..6).unwrap_or_default());
            return Err(
                Violation::new("LUKS magic", offset, found, format!("{MAGIC:02x?}")).into(),
            );
        }
        let version = be32(bytes, field::VERSION) >> 16;
        if version != 1 {
            return Err(Violation::new("LUKS version", at(field::VERSION), version, "1").into());
        }
        let cipher = name(field::CIPHER_NAME);
        let cipher_mode = name(field::CIPHER_MODE);
        let (mode, iv) = match mode(&cipher_mode) {
            Some(known) if cipher == "aes" => known,
            _ => return unsupported("cipher", format!("{cipher}-{cipher_mode}")),
        };
        let hash = name(field::HASH_SPEC);
        let Some(hash) = Hash::from_name(&hash) else {
            return unsupported("hash", hash);
        };
        let key_bytes = be32(bytes, field::KEY_BYTES);
        let lengths = if mode == Mode::Xts {
            [32, 48, 64]
        } else {
            [16, 24, 32]
        };
        if !lengths.contains(&key_bytes) {
            let expected = lengths.map(|len| len.to_string()).join(" or ");
            let field = at(field::KEY_BYTES);
            return Err(Violation::new("LUKS key bytes", field, key_bytes, expected).into());
        }
        let digest_iterations = be32(bytes, field::DIGEST_ITERATIONS);
        if digest_iterations == 0 {
            let field = at(field::DIGEST_ITERATIONS);
            return Err(Violation::new("LUKS digest iterations", field, 0, "at least 1").into());
        }
        let mut header = Header {
            mode,
            iv,
            hash,
            key_bytes: key_bytes as usize,
            digest: array(bytes, field::DIGEST),
            digest_salt: array(bytes, field::DIGEST_SALT),
            digest_iterations,
            slots: [Slot::default(); SLOTS],
        };
        let payload = u64::from(be32(bytes, field::PAYLOAD_OFFSET)) * SECTOR as u64;
        for index in 0..SLOTS {
            let slot = header.slot(bytes, index, offset, area.min(payload))?;
            header.set_slot(index, slot);
        }
        Ok(header)
    }

    /// Parses a slot, given those before it. `end` is where key material must end.
    fn slot(&self, bytes: &[u8], index: usize, offset: u64, end: u64) -> Result<Slot, Violation> {
        let start = Self::slot_at(index) as usize;
        let wrong = |what: &str, field: usize, value: &dyn ToString, expected: String| {
            let name = format!("LUKS key slot {index}'s {what}");
            let at = offset + (start + field) as u64;
            Err(Violation::new(name, at, value.to_string(), expected))
        };
        let state = be32(bytes, start);
        if ![ACTIVE, INACTIVE].contains(&state) {
            let expected = format!("{ACTIVE:#010x} or {INACTIVE:#010x}");
            return wrong("state", 0, &format!("{state:#010x}"), expected);
        }
        let slot = Slot {
            active: state == ACTIVE,
            iterations: be32(bytes, start + 4),
            salt: array(bytes, start + 8),
            material: be32(bytes, start + 40),
        };
        if slot.active && slot.iterations == 0 {
            return wrong("iterations", 4, &0, "at least 1".into());
        }
        let stripes = be32(bytes, start + 44);
        if stripes as usize != STRIPES {
            return wrong("stripes", 44, &stripes, STRIPES.to_string());
        }
        let len = self.material_bytes() as u64;
        let at = slot.material_at();
        if at < HEADER_BYTES as u64 || at + len > end {
            let expected = format!("a sector past the header with {len} bytes before {end}");
            return wrong("key material offset", 40, &slot.material, expected);
        }
        for (other, before) in self.slots.iter().take(index).enumerate() {
            if before.material_at() < at + len && at < before.material_at() + len {
                let expected = format!("{len} bytes apart from slot {other}'s");
                return wrong("key material offset", 40, &slot.material, expected);
            }
        }
        Ok(slot)
    }
}

/// The mode of operation and what numbers sectors, as the cipher's mode is spelled.
fn mode(name: &str) -> Option<(Mode, Iv)> {
    let (mode, iv) = name.split_once('-').unwrap_or((name, ""));
    let mode = match mode {
        "ecb" => Mode::Ecb,
        "cbc" => Mode::Cbc,
        "xts" => Mode::Xts,
        _ => return None,
    };
    let iv = match iv {
        "plain" => Iv::Plain,
        "plain64" => Iv::Plain64,
        // The hash is the key of an AES, so that no other hash of ours would do.
        "essiv:sha256" => Iv::EssivSha256,
        "" if mode == Mode::Ecb => Iv::Plain,
        _ => return None,
    };
    Some((mode, iv))
}

fn unsupported<T>(what: &str, name: String) -> Result<T, Refusal> {
    Err(Refusal::Unsupported {
        feature: format!("the LUKS {what} {name:?}"),
        advice: "convert the image with `qemu-img convert`",
    })
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(field) = bytes.get_mut(at..at + value.len()) {
        field.copy_from_slice(value);
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.copied().unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &[u8]) -> Result<Header, Refusal> {
        Header::parse(bytes, 0x10000, Header::new().area_bytes())
    }

    fn new() -> [u8; HEADER_BYTES] {
        let mut header = Header::new();
        header.digest_iterations = 1;
        header.encode("")
    }

    #[test]
    fn a_header_survives_its_bytes() {
        let header = parse(&new()).unwrap();
        assert_eq!(header.encode(""), new());
        assert_eq!(header.area_bytes(), 2_068_480);
        assert_eq!(header.slots[1].material_at(), 262_144);
    }

    #[test]
    fn fields_out_of_range_are_named() {
        let slot = |index, field| Header::slot_at(index) as usize + field;
        let cases: &[(usize, &[u8], &str)] = &[
            (0, b"SKUL", "magic"),
            (field::VERSION, &[0, 2], "version"),
            (field::KEY_BYTES, &[0, 0, 0, 16], "key bytes"),
            (field::KEY_BYTES, &[0xff; 4], "key bytes"),
            (
                field::PAYLOAD_OFFSET,
                &[0; 4],
                "slot 0's key material offset",
            ),
            (field::DIGEST_ITERATIONS, &[0; 4], "digest iterations"),
            (slot(2, 0), &[0; 4], "slot 2's state"),
            (slot(3, 0), &ACTIVE.to_be_bytes(), "slot 3's iterations"),
            (slot(4, 40), &[0; 4], "slot 4's key material offset"),
            (slot(5, 40), &[0xff; 4], "slot 5's key material offset"),
            (slot(6, 40), &[0, 0, 0, 9], "apart from slot 0's"),
            (slot(7, 44), &[0xff; 4], "slot 7's stripes"),
        ];
        for (at, value, expected) in cases {
            let mut bytes = new();
            put(&mut bytes, *at, value);
            let Err(Refusal::Invalid(violation)) = parse(&bytes) else {
                panic!("{expected}: not refused");
            };
            assert!(violation.to_string().contains(expected), "{violation}");
        }
    }

    #[test]
    fn algorithms_that_are_not_there_are_named() {
        for (at, value) in [
            (field::CIPHER_NAME, "twofish"),
            (field::CIPHER_MODE, "ctr-plain64"),
            (field::CIPHER_MODE, "cbc-essiv:sha1"),
            (field::CIPHER_MODE, "xts"),
            (field::HASH_SPEC, "ripemd160"),
        ] {
            let mut bytes = new();
            bytes[at..at + 32].fill(0);
            put(&mut bytes, at, value.as_bytes());
            let Err(Refusal::Unsupported { feature, .. }) = parse(&bytes) else {
                panic!("{value}: not refused");
            };
            assert!(feature.contains(value), "{feature}");
        }
    }
}
