//! Header extensions: what lies between the header and the backing file's name.

use crate::addr::be32;
use crate::error::Violation;

const END: u32 = 0;
pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
pub(crate) const DATA_FILE_NAME: u32 = 0x4441_5441;
/// Where LUKS has its header: the "full disk encryption header pointer".
pub(crate) const LUKS_HEADER: u32 = 0x0537_be77;
pub(crate) const BITMAPS: u32 = 0x2385_2875;
/// Of no meaning: others skip it, as they do with all that they do not know. It spans a place that
/// was in use when the header was last rewritten, and only a crash leaves it.
pub(crate) const FILLER: u32 = u32::from_be_bytes(*b"cows");

/// Bytes in an entry of the feature name table: type, bit, name.
const FEATURE_ENTRY: usize = 48;
const BITMAPS_LEN: usize = 24;

/// The extensions in the order of the file, those that this crate does not know among them: they
/// stay through every rewrite of the header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extensions {
    list: Vec<(u32, Vec<u8>)>,
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
            let place = offset + at as u64 + 4;
            let Some(data) = rest.get(..len) else {
                return Err(Violation::new(
                    format!("header extension {kind:#010x}'s length"),
                    place,
                    len,
                    format!("at most {}, where the extensions end", rest.len()),
                ));
            };
            if kind == BITMAPS && len != BITMAPS_LEN {
                let expected = BITMAPS_LEN.to_string();
                return Err(Violation::new(
                    "bitmaps extension's length",
                    place,
                    len,
                    expected,
                ));
            }
            found.list.push((kind, data.to_vec()));
            at += 8 + len.next_multiple_of(8);
        }
        Ok(found)
    }

    /// Whether the end marker is in this much of the area.
    pub(crate) fn end_within(area: &[u8]) -> bool {
        let mut at = 0_usize;
        while area.len().saturating_sub(at) >= 8 {
            if be32(area, at) == END {
                return true;
            }
            let len = be32(area, at + 4) as usize;
            at = at.saturating_add(8 + len.next_multiple_of(8));
        }
        false
    }

    /// The data of the first extension of a kind.
    pub(crate) fn get(&self, kind: u32) -> Option<&[u8]> {
        let mut of_kind = self.list.iter().filter(|(of, _)| *of == kind);
        of_kind.next().map(|(_, data)| &**data)
    }

    /// How far into the area the first extension of a kind begins, or the end if there is none.
    pub(crate) fn place(&self, kind: u32) -> u64 {
        let before = self.list.iter().take_while(|(of, _)| *of != kind);
        before
            .map(|(_, data)| 8 + data.len().next_multiple_of(8) as u64)
            .sum()
    }

    /// Replaces, adds or removes the extension of a kind. It comes first: a header's first sector is
    /// written at once, so that what changes is best there.
    pub(crate) fn set(&mut self, kind: u32, data: Option<Vec<u8>>) {
        if let Some(old) = self.list.iter().position(|(of, _)| *of == kind) {
            self.list.remove(old);
        }
        if let Some(data) = data {
            self.list.insert(0, (kind, data));
        }
    }

    /// The same extensions, for an area that begins at `start`, with nothing between `near` and
    /// `far` but filling; `None` if that has no place before `near`.
    pub(crate) fn detour(&self, start: usize, near: usize, far: usize) -> Option<Self> {
        let mut detour = self.clone();
        let (mut at, mut before) = (start, 0);
        for (_, data) in &self.list {
            let next = at + 8 + data.len().next_multiple_of(8);
            if next + 8 > near {
                break;
            }
            (at, before) = (next, before + 1);
        }
        let filling = far.checked_sub(at + 8).filter(|_| at + 8 <= near)?;
        detour.list.insert(before, (FILLER, vec![0; filling]));
        Some(detour)
    }

    /// The recorded name of the backing file's format.
    pub(crate) fn backing_format(&self) -> Option<String> {
        self.get(BACKING_FORMAT).map(text)
    }

    /// The image's own name of an incompatible feature bit.
    pub(crate) fn incompatible_name(&self, bit: u32) -> Option<String> {
        let table = self.get(FEATURE_NAMES)?;
        table
            .chunks_exact(FEATURE_ENTRY)
            .find_map(|entry| match entry {
                [0, of, name @ ..] if u32::from(*of) == bit => Some(text(name)),
                _ => None,
            })
    }

    /// The bytes of the area, end marker included.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (kind, data) in &self.list {
            bytes.extend(kind.to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.extend([0; 8]);
        bytes
    }
}

/// Text up to the first zero byte; what is no UTF-8 or no printable character is replaced.
pub(crate) fn text(bytes: &[u8]) -> String {
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
