//! The snapshot table: its entries, checked as they are read, and written as they were.

use std::ops::Range;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Selector, Snapshot};
use crate::addr::{Geometry, be32, be64};
use crate::error::{Error, Result, Violation};
use crate::header::{Header, MAX_L1_BYTES, MAX_SNAPSHOTS};
use crate::host::Host;

/// Largest table in bytes, and largest extra data of an entry: QEMU's limits.
const MAX_BYTES: u64 = 64 << 20;
const MAX_EXTRA: u64 = 1024;
/// Bytes of an entry before its extra data, ID and name.
const FIXED: u64 = 40;
/// Bytes that are read at a time.
const CHUNK: u64 = 64 << 10;
/// Bytes of extra data that have the sizes of VM state and disk: version 3 demands them.
pub(crate) const SIZES: usize = 16;
/// What the extra data has for a guest whose instructions are not counted.
const NO_ICOUNT: u64 = u64::MAX;

/// An entry of the snapshot table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) l1_offset: u64,
    pub(crate) l1_entries: usize,
    pub(crate) id: Vec<u8>,
    pub(crate) name: Vec<u8>,
    pub(crate) date: (u32, u32),
    pub(crate) vm_clock: u64,
    /// The field of 32 bits, which the extra data takes the place of.
    pub(crate) vm_state_size: u32,
    /// VM state size, disk size and icount, 8 bytes each, as far as they are there; then what this
    /// crate does not know.
    pub(crate) extra: Vec<u8>,
}

/// The snapshot table, as it is in the file.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub(crate) entries: Vec<Entry>,
    pub(crate) offset: u64,
    /// Its length in bytes.
    pub(crate) len: u64,
}

impl Entry {
    /// The extra data that this crate and QEMU write.
    pub(crate) fn extra(vm_state_size: u64, disk_size: u64, icount: Option<u64>) -> Vec<u8> {
        [vm_state_size, disk_size, icount.unwrap_or(NO_ICOUNT)]
            .iter()
            .flat_map(|number| number.to_be_bytes())
            .collect()
    }

    /// A number of the extra data, if that is long enough to have it.
    fn number(&self, index: usize) -> Option<u64> {
        let has = self.extra.len() >= (index + 1) * 8;
        has.then(|| be64(&self.extra, index * 8))
    }

    /// Size of its disk, rounded as the header's is; `now` is the disk's size today, which version
    /// 2 relied on.
    pub(crate) fn disk_size(&self, now: u64) -> u64 {
        let size = self.number(1).unwrap_or(now);
        size - size % 512
    }

    pub(crate) fn describe(&self, disk_size_now: u64) -> Snapshot {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (seconds, nanoseconds) = self.date;
        let date: SystemTime = UNIX_EPOCH + Duration::new(seconds.into(), nanoseconds);
        Snapshot {
            id: text(&self.id),
            name: text(&self.name),
            disk_size: self.disk_size(disk_size_now),
            vm_state_size: self.number(0).unwrap_or(self.vm_state_size.into()),
            date,
            vm_clock: Duration::from_nanos(self.vm_clock),
            icount: self.number(2).filter(|&icount| icount != NO_ICOUNT),
        }
    }

    /// Whether the extra data has what version 3 demands.
    pub(crate) fn has_sizes(&self) -> bool {
        self.extra.len() >= SIZES
    }

    /// Adds to the extra data what version 3 demands; `now` is the disk's size today.
    pub(crate) fn add_sizes(&mut self, now: u64) {
        if !self.has_sizes() {
            let described = self.describe(now);
            self.extra = Entry::extra(described.vm_state_size, described.disk_size, None);
            self.extra.truncate(SIZES);
        }
    }

    /// The clusters of its L1 table.
    pub(crate) fn l1_clusters(&self, geometry: Geometry) -> Range<u64> {
        geometry.span(self.l1_offset, self.l1_entries as u64 * 8)
    }

    fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.l1_offset.to_be_bytes());
        bytes.extend((self.l1_entries as u32).to_be_bytes());
        bytes.extend((self.id.len() as u16).to_be_bytes());
        bytes.extend((self.name.len() as u16).to_be_bytes());
        bytes.extend(self.date.0.to_be_bytes());
        bytes.extend(self.date.1.to_be_bytes());
        bytes.extend(self.vm_clock.to_be_bytes());
        bytes.extend(self.vm_state_size.to_be_bytes());
        bytes.extend((self.extra.len() as u32).to_be_bytes());
        bytes.extend(&self.extra);
        bytes.extend(&self.id);
        bytes.extend(&self.name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }

    /// Parses the entry at `at` of the file, `rest` beginning with it, and says how long it is
    /// without its padding. `None` if there is more of it.
    fn parse(rest: &[u8]) -> Option<(Self, u64)> {
        let (id, name) = (be32(rest, 12) >> 16, be32(rest, 12) & 0xffff);
        let extra_end = FIXED as usize + be32(rest, 36) as usize;
        let id_end = extra_end + id as usize;
        let name_end = id_end + name as usize;
        let entry = Entry {
            l1_offset: be64(rest, 0),
            l1_entries: be32(rest, 8) as usize,
            date: (be32(rest, 16), be32(rest, 20)),
            vm_clock: be64(rest, 24),
            vm_state_size: be32(rest, 32),
            extra: rest.get(FIXED as usize..extra_end)?.to_vec(),
            id: rest.get(extra_end..id_end)?.to_vec(),
            name: rest.get(id_end..name_end)?.to_vec(),
        };
        Some((entry, name_end as u64))
    }

    /// Bytes that it takes, without its padding.
    fn len(&self) -> u64 {
        FIXED + (self.extra.len() + self.id.len() + self.name.len()) as u64
    }

    /// Whether the entry at `at` of the file says nothing that the format, or the file's length,
    /// does not allow.
    pub(crate) fn check(
        &self,
        at: u64,
        geometry: Geometry,
        file_len: u64,
    ) -> Result<(), Violation> {
        let l1_bytes = self.l1_entries as u64 * 8;
        if l1_bytes > MAX_L1_BYTES {
            let expected = format!("at most {}", MAX_L1_BYTES / 8);
            let field = "l1_size of a snapshot";
            return Err(Violation::new(field, at + 8, self.l1_entries, expected));
        }
        let end = file_len
            .checked_next_multiple_of(geometry.cluster())
            .unwrap_or(u64::MAX);
        let fits = self
            .l1_offset
            .checked_add(l1_bytes)
            .is_some_and(|l1_end| l1_end <= end);
        let placed = self.l1_offset != 0 && geometry.within(self.l1_offset) == 0 && fits;
        if l1_bytes > 0 && !placed {
            let cluster = geometry.cluster();
            let expected = format!(
                "a multiple of {cluster} past the header with {l1_bytes} bytes before the file's end at {file_len:#x}"
            );
            let (field, value) = ("l1_table_offset of a snapshot", self.l1_offset);
            return Err(Violation::new(field, at, format!("{value:#x}"), expected));
        }
        let size = self.number(1).unwrap_or(0);
        if size > i64::MAX as u64 || geometry.l1_entries(size) * 8 > MAX_L1_BYTES {
            let most = (MAX_L1_BYTES / 8)
                .saturating_mul(geometry.l2_entries() * geometry.cluster())
                .min(i64::MAX as u64);
            let (field, at) = ("disk size of a snapshot", at + FIXED + 8);
            return Err(Violation::new(field, at, size, format!("at most {most}")));
        }
        Ok(())
    }
}

impl Table {
    /// Reads the table that a header names.
    pub(crate) fn read(host: &Host, header: &Header, file_len: u64) -> Result<Self> {
        let table = Table::read_unchecked(host, header, file_len)?;
        for (at, entry) in table.placed() {
            entry
                .check(at, header.geometry, file_len)
                .map_err(|violation| host.invalid(violation))?;
        }
        Ok(table)
    }

    /// The same, but for what the entries say.
    pub(crate) fn read_unchecked(host: &Host, header: &Header, file_len: u64) -> Result<Self> {
        let offset = header.snapshots_offset;
        let room = file_len.saturating_sub(offset).min(MAX_BYTES);
        let mut entries = Vec::new();
        let mut bytes = Vec::new();
        let (mut at, mut end) = (0_u64, 0);
        for _ in 0..header.snapshots {
            let (entry, len) = loop {
                let rest = bytes.get(at as usize..).unwrap_or_default();
                if rest.len() as u64 >= FIXED {
                    let extra = be32(rest, 36);
                    if u64::from(extra) > MAX_EXTRA {
                        let expected = format!("at most {MAX_EXTRA}");
                        let field = "extra_data_size of a snapshot";
                        return Err(host.invalid(Violation::new(
                            field,
                            offset + at + 36,
                            extra,
                            expected,
                        )));
                    }
                    if let Some(found) = Entry::parse(rest) {
                        break found;
                    }
                }
                let have = bytes.len() as u64;
                let more = CHUNK.min(room.saturating_sub(have));
                if more == 0 {
                    let expected = format!("entries that end within {room} bytes");
                    let count = header.snapshots;
                    return Err(host.invalid(Violation::new("nb_snapshots", 60, count, expected)));
                }
                let mut chunk = vec![0; more as usize];
                host.read(offset + have, &mut chunk)?;
                bytes.extend(chunk);
            };
            entries.push(entry);
            end = at + len;
            at = end.next_multiple_of(8);
        }
        Ok(Table {
            entries,
            offset,
            len: end,
        })
    }

    /// The entries, and where in the file they are.
    pub(crate) fn placed(&self) -> impl Iterator<Item = (u64, &Entry)> {
        let mut next = self.offset;
        self.entries.iter().map(move |entry| {
            let at = next;
            next += entry.len().next_multiple_of(8);
            (at, entry)
        })
    }

    /// The clusters of the table.
    pub(crate) fn clusters(&self, geometry: Geometry) -> Range<u64> {
        geometry.span(self.offset, self.len)
    }

    /// The bytes of a table with these entries, or why they are too many.
    pub(crate) fn encode(entries: &[Entry]) -> Result<Vec<u8>, String> {
        if entries.len() > MAX_SNAPSHOTS as usize {
            return Err(format!("an image has at most {MAX_SNAPSHOTS} snapshots"));
        }
        let mut bytes = Vec::new();
        entries.iter().for_each(|entry| entry.encode(&mut bytes));
        if bytes.len() as u64 > MAX_BYTES {
            return Err(format!("the snapshot table has at most {MAX_BYTES} bytes"));
        }
        Ok(bytes)
    }

    /// The index of the entry that a person means: the first of several, as with QEMU.
    pub(crate) fn find(&self, host: &Host, selector: &Selector) -> Result<usize> {
        let with = |field: fn(&Entry) -> &[u8], wanted: &str| {
            let mut all = self.entries.iter();
            all.position(|entry| String::from_utf8_lossy(field(entry)) == wanted)
        };
        let with_id = |wanted: &str| with(|entry| &entry.id, wanted);
        let with_name = |wanted: &str| with(|entry| &entry.name, wanted);
        let found = match selector {
            Selector::Id(id) => with_id(id),
            Selector::Name(name) => with_name(name),
            Selector::IdOrName(either) => with_id(either).or_else(|| with_name(either)),
        };
        found.ok_or_else(|| Error::NoSnapshot {
            file: host.path.clone(),
            wanted: selector.to_string(),
        })
    }

    /// The smallest decimal number above all IDs that are one, or why there is none.
    pub(crate) fn next_id(&self) -> Result<String, String> {
        let numbers = self.entries.iter().filter_map(|entry| {
            let text = std::str::from_utf8(&entry.id).ok()?;
            text.parse::<u64>().ok()
        });
        let next = numbers.max().unwrap_or(0).checked_add(1);
        let next =
            next.ok_or_else(|| format!("a snapshot has the ID {}, the largest", u64::MAX))?;
        Ok(next.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_written_as_it_was_read() {
        for extra in [0, 8, 16, 24, 37, 1024] {
            let entry = Entry {
                l1_offset: 0x30000,
                l1_entries: 7,
                id: b"12".to_vec(),
                name: b"\xff\0 odd".to_vec(),
                date: (1, 2),
                vm_clock: 3,
                vm_state_size: 4,
                extra: (0..extra).map(|i| i as u8).collect(),
            };
            let bytes = Table::encode(std::slice::from_ref(&entry)).unwrap();
            assert!(bytes.len().is_multiple_of(8));
            let (parsed, len) = Entry::parse(&bytes).unwrap();
            assert_eq!(parsed, entry);
            assert!(Entry::parse(&bytes[..len as usize - 1]).is_none());
        }
    }

    #[test]
    fn ids_count_up_from_the_largest() {
        let table = |ids: &[&str]| Table {
            entries: ids
                .iter()
                .map(|id| Entry {
                    l1_offset: 0,
                    l1_entries: 0,
                    id: id.as_bytes().to_vec(),
                    name: Vec::new(),
                    date: (0, 0),
                    vm_clock: 0,
                    vm_state_size: 0,
                    extra: Vec::new(),
                })
                .collect(),
            ..Table::default()
        };
        assert_eq!(table(&[]).next_id().unwrap(), "1");
        assert_eq!(table(&["1", "7", "x9", "3"]).next_id().unwrap(), "8");
        assert!(table(&["18446744073709551615"]).next_id().is_err());
    }
}
