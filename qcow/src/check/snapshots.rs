//! The snapshot table, as far as a check needs it.

use crate::addr::{be32, be64};
use crate::error::{Result, Violation};

use super::Subject;

/// Bytes of an entry before its extra data.
const FIXED: u64 = 40;
/// Most extra data, which is QEMU's limit.
const MAX_EXTRA: u64 = 1024;
/// The least extra data of version 3: sizes of the VM state and of the disk, 64 bits each.
pub(super) const EXTRA_OF_V3: u64 = 16;
/// The table is read in pieces of this many bytes, each more than an entry can have.
const PIECE: usize = 256 << 10;

/// An entry of the table.
pub(super) struct Snapshot {
    /// Where it is in the file.
    pub(super) at: u64,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u64,
    /// Bytes of extra data.
    pub(super) extra: u64,
}

/// The table.
pub(super) struct Snapshots {
    pub(super) list: Vec<Snapshot>,
    /// Its length in bytes.
    pub(super) len: u64,
}

/// Reads the table; an error if it cannot be followed to its end, because what the snapshots
/// behind that have in use is not known then.
pub(super) fn read(subject: &Subject<'_>) -> Result<Snapshots> {
    let (header, start) = (subject.header, subject.header.snapshots_offset);
    let mut list = Vec::new();
    let (mut piece, mut piece_at) = (Vec::new(), start);
    let mut at = start;
    for _ in 0..header.snapshots {
        let mut entry = piece.get((at - piece_at) as usize..).unwrap_or_default();
        if entry.len() < PIECE / 2 {
            piece.resize(PIECE, 0);
            subject.host.read(at, &mut piece)?;
            piece_at = at;
            entry = &piece;
        }
        let extra = u64::from(be32(entry, 36));
        if extra > MAX_EXTRA {
            let expected = format!("at most {MAX_EXTRA}");
            let violation =
                Violation::new("extra_data_size of a snapshot", at + 36, extra, expected);
            return Err(subject.host.invalid(violation));
        }
        let (id, name) = (be32(entry, 12) >> 16, be32(entry, 12) & 0xffff);
        let len = FIXED + extra + u64::from(id) + u64::from(name);
        if !subject.has(at, len) {
            let violation = Violation::new(
                "snapshot table entry",
                at,
                format!("{len} bytes"),
                subject.inside(),
            );
            return Err(subject.host.invalid(violation));
        }
        list.push(Snapshot {
            at,
            l1_offset: be64(entry, 0),
            l1_entries: be32(entry, 8).into(),
            extra,
        });
        at += len.next_multiple_of(8);
    }
    Ok(Snapshots {
        list,
        len: at - start,
    })
}
