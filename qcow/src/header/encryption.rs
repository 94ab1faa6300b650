//! Which encryption a header names, and where it says that LUKS has its own header.

use super::Refusal;
use super::parse::placed;
use crate::addr::{Geometry, be64};
use crate::crypt::luks::HEADER_BYTES;
use crate::error::Violation;
use crate::extension::{Extensions, LUKS_HEADER};

/// Bytes of a LUKS header with its keys, at most: eight times what they take with the longest key.
const MAX_LUKS_BYTES: u64 = 16 << 20;

/// How the guest's data is encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Encryption {
    #[default]
    None,
    /// Method 1: AES-128 with the password as the key.
    LegacyAes,
    /// Method 2: LUKS1, whose header and keys are `len` bytes at `offset` of the file.
    Luks { offset: u64, len: u64 },
}

impl Encryption {
    /// Reads the field `crypt_method` and the extension that LUKS has. `area` is where the
    /// extensions begin.
    pub(super) fn parse(
        method: u32,
        extensions: &Extensions,
        area: u64,
        geometry: Geometry,
        file_len: u64,
    ) -> Result<Self, Refusal> {
        let pointer = extensions.get(LUKS_HEADER);
        let at = area + extensions.place(LUKS_HEADER);
        match (method, pointer) {
            (0, None) => Ok(Encryption::None),
            (1, None) => Ok(Encryption::LegacyAes),
            (2, Some(pointer)) => {
                let (offset, len) = (be64(pointer, 0), be64(pointer, 8));
                if pointer.len() != 16 {
                    let (field, len) = ("LUKS header pointer's length", pointer.len());
                    return Err(Violation::new(field, at + 4, len, "16").into());
                }
                if !(HEADER_BYTES as u64..=MAX_LUKS_BYTES).contains(&len) {
                    let expected = format!("{HEADER_BYTES} to {MAX_LUKS_BYTES}");
                    return Err(
                        Violation::new("LUKS header's length", at + 16, len, expected).into(),
                    );
                }
                placed(
                    "LUKS header's offset",
                    at + 8,
                    offset,
                    len,
                    geometry,
                    file_len,
                )?;
                Ok(Encryption::Luks { offset, len })
            }
            (0..=2, _) => {
                let expected = "2 with, and 0 or 1 without a LUKS header pointer";
                Err(Violation::new("crypt_method", 32, method, expected).into())
            }
            _ => Err(Violation::new("crypt_method", 32, method, "0, 1 or 2").into()),
        }
    }

    /// The field's value.
    pub(super) fn method(self) -> u32 {
        match self {
            Encryption::None => 0,
            Encryption::LegacyAes => 1,
            Encryption::Luks { .. } => 2,
        }
    }
}
