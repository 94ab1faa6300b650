//! Header extensions: what lies between the header and the backing file's name.

use crate::addr::be32;
use crate::error::Violation;

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;

/// Bytes in an entry of the feature name table: type, bit, name.
const FEATURE_ENTRY: usize = 48;
const BITMAPS_LEN: usize = 24;

/// What the extensions say that this crate reads. The others stay in the file as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extensions {
    pub(crate) backing_format: Option<String>,
    /// Type (0 incompatible, 1 compatible, 2 autoclear), bit, name.
    features: Vec<(u8, u8, String)>,
}

impl Extensions {
    /// Parses an area that begins at `offset` of the file and ends where `area` does.
    pub(crate) fn parse(area: &[u8], offset: u64) -> Result<Self, Violation> {
        let mut found = Extensions::default();
        let mut at = 0;
        while area.len().saturating_sub(at) >= 8 {
            let (kind, len) = (be32(area, at), be32(area, at + 4) as usize);
            if kind == END {
                break;
            }
            let rest = area.get(at + 8..).unwrap_or_default();
            let place = offset + at as u64;
            let Some(data) = rest.get(..len) else {
                return Err(Violation::new(
                    format!("header extension {kind:#010x}'s length"),
                    place + 4,
                    len,
                    format!("at most {}, where the extensions end", rest.len()),
                ));
            };
            match kind {
                BACKING_FORMAT => found.backing_format = Some(text(data)),
                FEATURE_NAMES => found.features.extend(data.chunks_exact(FEATURE_ENTRY).map(
                    |entry| match entry {
                        [kind, bit, name @ ..] => (*kind, *bit, text(name)),
                        _ => (0, 0, String::new()),
                    },
                )),
                BITMAPS if len != BITMAPS_LEN => {
                    return Err(Violation::new(
                        "bitmaps extension's length",
                        place + 4,
                        len,
                        BITMAPS_LEN.to_string(),
                    ));
                }
                _ => {}
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(found)
    }

    /// The image's own name of an incompatible feature bit.
    pub(crate) fn incompatible_name(&self, bit: u32) -> Option<&str> {
        let is_it = |kind: u8, of: u8| kind == 0 && u32::from(of) == bit;
        self.features
            .iter()
            .find(|(kind, of, _)| is_it(*kind, *of))
            .map(|(.., name)| &**name)
    }
}

/// Text up to the first zero byte; what is no UTF-8 or no printable character is replaced.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default())
        .chars()
        .map(|c| {
            if c.is_control() {
                char::REPLACEMENT_CHARACTER
            } else {
                c
            }
        })
        .collect()
}

/// One extension as it is written to a file, padded to 8 bytes.
fn encode(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = kind.to_be_bytes().to_vec();
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// The extensions of a new image, with their end marker.
pub(crate) fn for_new_image(backing_format: Option<&str>) -> Vec<u8> {
    let mut bytes = backing_format.map_or(Vec::new(), |f| encode(BACKING_FORMAT, f.as_bytes()));
    bytes.extend(encode(END, &[]));
    bytes
}
