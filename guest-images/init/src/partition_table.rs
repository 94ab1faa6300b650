//! What a disk's partition table calls its partitions. Which there are the kernel says: it has read
//! the table, and we look up the number of one at a time.

use alloc::format;
use alloc::string::String;

use crate::volume::{Names, ReadAt, bytes, uuid};

/// What ends the first sector of a disk with a table of either kind.
const BOOT_SIGNATURE: [u8; 2] = [0x55, 0xaa];
/// The type of the one MBR partition of a disk that has a GPT.
const PROTECTIVE: u8 = 0xee;
/// UEFI 2.10, section 5.3.2: the least that an entry takes.
const ENTRY_SIZE: u32 = 128;

/// Where a disk's table has the names.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum PartitionTable {
    /// A GUID partition table, whose `count` entries of `size` bytes begin at `offset`.
    Gpt { offset: u64, size: u32, count: u32 },
    /// A master boot record. Its partitions have no names of their own: their UUIDs are made of the
    /// disk's identifier and their numbers.
    Mbr { identifier: u32 },
}

impl PartitionTable {
    /// The table of the disk that `read` reads.
    pub(crate) fn of(read: ReadAt<'_>) -> Option<Self> {
        if bytes(read, 0x1fe)? != BOOT_SIGNATURE {
            return None;
        }
        let mut kinds = (0..4).map(|entry| bytes(read, 0x1be + 16 * entry + 4));
        if !kinds.any(|kind| kind == Some([PROTECTIVE])) {
            let identifier = u32::from_le_bytes(bytes(read, 0x1b8)?);
            return Some(Self::Mbr { identifier });
        }
        // It lies in the second sector, whose size nobody says.
        [512, 4096].into_iter().find_map(|sector| {
            if &bytes(read, sector)? != b"EFI PART" {
                return None;
            }
            let first = u64::from_le_bytes(bytes(read, sector + 72)?);
            let count = u32::from_le_bytes(bytes(read, sector + 80)?);
            let size = u32::from_le_bytes(bytes(read, sector + 84)?);
            let offset = first.checked_mul(sector)?;
            (size >= ENTRY_SIZE).then_some(Self::Gpt {
                offset,
                size,
                count,
            })
        })
    }

    /// The names of the partition `number`, which counts from 1.
    pub(crate) fn names(&self, read: ReadAt<'_>, number: u32) -> Option<Names> {
        match *self {
            Self::Mbr { identifier } => Some(Names {
                uuid: Some(format!("{identifier:08x}-{number:02x}")),
                label: None,
            }),
            Self::Gpt {
                offset,
                size,
                count,
            } => {
                let index = number.checked_sub(1).filter(|index| *index < count)?;
                let entry = offset.checked_add(u64::from(index) * u64::from(size))?;
                let name = entry.checked_add(56)?;
                Some(Names {
                    uuid: Some(uuid(written_order(bytes(read, entry + 16)?))),
                    label: utf16(bytes(read, name)?),
                })
            }
        }
    }
}

/// A GUID is stored with its first three fields in little endian (UEFI 2.10, appendix A).
fn written_order(mut guid: [u8; 16]) -> [u8; 16] {
    for field in [0..4, 4..6, 6..8] {
        guid.get_mut(field).unwrap_or_default().reverse();
    }
    guid
}

/// The text up to the first NUL, if there is any.
fn utf16(bytes: [u8; 72]) -> Option<String> {
    let units = bytes
        .as_chunks()
        .0
        .iter()
        .map(|unit| u16::from_le_bytes(*unit));
    let text: String = char::decode_utf16(units.take_while(|unit| *unit != 0))
        .map(|letter| letter.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect();
    (!text.is_empty()).then_some(text)
}
