//! What the tables of one file say of a range of the disk.

use crate::cache::Cache;
use crate::entry::{self, Content, Entry, Mapping};
use crate::error::{Result, Violation};
use crate::holes::Data;
use crate::host::Host;
use crate::qcow2::{Load, Place, Qcow2, Run, State, Tables};
use crate::snapshot::tree::Tree;
use crate::sync::MutexGuard;

/// L2 slices that are loaded for a request without the lock: as many as one of common length has.
const LOADED_AHEAD: usize = 8;

impl Qcow2 {
    /// Appends where the file has a range of the disk; neighbours are merged. Whether the tables
    /// for it were in memory, if they are not to be loaded.
    pub(crate) fn resolve(
        &self,
        offset: u64,
        len: u64,
        load: Load,
        runs: &mut Vec<Run>,
    ) -> Result<bool> {
        let Some(mut state) = self.state_with(offset, len, load)? else {
            return Ok(false);
        };
        self.mappings(
            &mut state.tables,
            offset,
            len,
            &mut |within, len, mapping| {
                let standard = match mapping {
                    Mapping::Compressed(compressed) => {
                        let place = Place::Compressed(compressed, within);
                        merge(runs, Run { len, place });
                        return true;
                    }
                    Mapping::NONE => {
                        let place = Place::Below;
                        merge(runs, Run { len, place });
                        return true;
                    }
                    Mapping::Standard(standard) => standard,
                };
                let (mut at, end) = (within, within + len);
                while at < end {
                    let (content, rest) = standard.content(at, self.geometry);
                    let place = match (content, standard.host) {
                        (Content::Data, Some(host)) => Place::Data(host + at),
                        (Content::Zero, _) => Place::Zero,
                        _ => Place::Below,
                    };
                    let len = rest.min(end - at);
                    merge(runs, Run { len, place });
                    at += len;
                }
                true
            },
        )?;
        Ok(true)
    }

    /// The lock, with the L2 slices of a range in memory; `None` if they are not and must not be
    /// loaded. They are read while others have the lock; but of a long range, which no guest asks
    /// for, only the first few are.
    pub(crate) fn state_with(
        &self,
        offset: u64,
        len: u64,
        load: Load,
    ) -> Result<Option<MutexGuard<'_, State>>> {
        let (mut at, end) = (offset, offset + len);
        let mut state = self.state();
        for _ in 0..LOADED_AHEAD {
            let Some(slice) = self.next_missing(&state.tables, &mut at, end)? else {
                break;
            };
            if load == Load::Never {
                return Ok(None);
            }
            let number = state.tables.l2.begin_load(slice);
            drop(state);
            let mut bytes = vec![0; self.geometry.slice() as usize];
            let read = self.host.read(slice, &mut bytes);
            state = self.state();
            let bytes = read.is_ok().then_some(bytes);
            state.tables.l2.end_load(number, bytes);
            read?;
        }
        Ok(Some(state))
    }

    /// The next L2 slice of a range that is not in memory; the range goes on after it then.
    fn next_missing(&self, tables: &Tables, at: &mut u64, end: u64) -> Result<Option<u64>> {
        let mut data = None;
        loop {
            *at = self.next_entries(tables, &mut data, *at, end)?;
            if *at >= end {
                return Ok(None);
            }
            let (index, entry_at) = self.geometry.l1_index(*at);
            let Some((table, _)) = self.l2_table(tables, index)? else {
                continue;
            };
            *at = next(*at, self.by_slice());
            let slice = table + entry_at - entry_at % self.geometry.slice();
            if !tables.l2.contains(slice) {
                return Ok(Some(slice));
            }
        }
    }

    /// Bytes of the disk that an L2 slice maps.
    fn by_slice(&self) -> u64 {
        self.geometry.slice() / self.geometry.l2_entry() * self.geometry.cluster()
    }

    /// Where in a range there are L2 entries next; its end, if there are none. Tables that are
    /// absent have none, and, for a range that takes whole slices, those in holes of the file: a
    /// file may name more tables than it has bytes. `data` is for who asks again with the same lock.
    fn next_entries<'a>(
        &'a self,
        tables: &Tables,
        data: &mut Option<Data<'a>>,
        mut at: u64,
        end: u64,
    ) -> Result<u64> {
        let geometry = self.geometry;
        let (by_slice, by_table) = (self.by_slice(), geometry.l2_entries() * geometry.cluster());
        while at < end {
            let (index, entry_at) = geometry.l1_index(at);
            let table = match self.l2_table(tables, index) {
                Ok(Some((table, _))) => table,
                Ok(None) => {
                    at = next(at, by_table);
                    continue;
                }
                // Who needs what it names finds that it is wrong; what comes before it is not.
                Err(_) => break,
            };
            let slice = table + entry_at - entry_at % geometry.slice();
            if end - at < by_slice || tables.l2.contains(slice) {
                break;
            }
            let data = match data {
                Some(data) => data,
                None => {
                    let named = tables.l1.len() as u64 * geometry.cluster();
                    data.insert(Data::new(&self.host, named)?)
                }
            };
            let found = data.next(slice)?;
            if found < slice + geometry.slice() {
                break;
            }
            // What is clean in memory is as it is in the file.
            let empty = if tables.l2.is_clean() {
                found.min(table + geometry.cluster()) - slice
            } else {
                geometry.slice()
            };
            at = next(at, by_slice).saturating_add((empty / geometry.slice() - 1) * by_slice);
        }
        Ok(at.min(end))
    }

    /// How far the file says nothing of the disk from `at` on, which lies in it.
    pub(crate) fn nothing_until(&self, at: u64) -> Result<u64> {
        self.next_entries(&self.state().tables, &mut None, at, self.size())
    }

    /// Refuses an L1 table in which two entries for a range name the same L2 table. Without such,
    /// what there is of the range is bounded by the bytes of the file.
    pub(crate) fn check_l1(&self, offset: u64, len: u64) -> Result<()> {
        let state = self.state();
        let tables = &state.tables;
        let (first, _) = self.geometry.l1_index(offset);
        let (last, _) = self.geometry.l1_index(offset + len.saturating_sub(1));
        let part = tables.l1.get(first..tables.l1.len().min(last + 1));
        let at = tables.header.l1_offset + first as u64 * 8;
        Tree::new(self, at, part.unwrap_or_default(), tables.file_len).map(drop)
    }

    /// Visits the clusters of a range in order, each with the part of it that the range covers:
    /// where it begins in the cluster, and its length; all at once for which there are no entries.
    /// Stops when `visit` says so.
    pub(crate) fn mappings(
        &self,
        tables: &mut Tables,
        offset: u64,
        len: u64,
        visit: &mut dyn FnMut(u64, u64, Mapping) -> bool,
    ) -> Result<()> {
        let geometry = self.geometry;
        let end = offset + len;
        let mut at = offset;
        let mut data = None;
        while at < end {
            let next = self.next_entries(tables, &mut data, at, end)?;
            if next > at {
                if !visit(geometry.within(at), next - at, Mapping::NONE) {
                    return Ok(());
                }
                at = next;
                continue;
            }
            let (l1_index, entry_at) = geometry.l1_index(at);
            let Some((table, _)) = self.l2_table(tables, l1_index)? else {
                continue;
            };
            let slice_at = entry_at - entry_at % geometry.slice();
            let file_len = tables.file_len;
            let slice = self.slice(tables, table + slice_at)?;
            let width = geometry.l2_entry() as usize;
            let first = (entry_at - slice_at) as usize / width;
            for (i, entry) in slice.chunks_exact(width).enumerate().skip(first) {
                if at >= end {
                    break;
                }
                let where_it_is = table + slice_at + (i * width) as u64;
                let entry = Entry::read(entry);
                let mapping = self.mapping(entry, where_it_is, geometry.floor(at), file_len)?;
                let within = geometry.within(at);
                let part = (geometry.cluster() - within).min(end - at);
                if !visit(within, part, mapping) {
                    return Ok(());
                }
                at += part;
            }
        }
        Ok(())
    }

    /// The L2 table that an L1 entry names, and whether it may be written in place.
    pub(crate) fn l2_table(&self, tables: &Tables, index: usize) -> Result<Option<(u64, bool)>> {
        let entry = tables.l1.get(index).copied().unwrap_or(0);
        let wrong = |expected: String| {
            let at = tables.header.l1_offset + index as u64 * 8;
            self.host.invalid(Violation::new(
                "L1 entry",
                at,
                format!("{entry:#018x}"),
                expected,
            ))
        };
        let table = entry::l1(entry, self.geometry).map_err(wrong)?;
        match table {
            Some((offset, _)) if offset >= tables.file_len => Err(wrong(format!(
                "an L2 table before the file's end at {:#x}",
                tables.file_len
            ))),
            table => Ok(table),
        }
    }

    /// Decodes the L2 entry of the guest cluster at `guest` that was found at `at` of the file.
    pub(crate) fn mapping(
        &self,
        entry: Entry,
        at: u64,
        guest: u64,
        file_len: u64,
    ) -> Result<Mapping> {
        if !self.data.is_external() {
            return self.decode(entry, at, file_len);
        }
        Mapping::decode_external(entry, guest, self.geometry).map_err(|expected| {
            self.host
                .invalid(Violation::new("L2 entry", at, entry, expected))
        })
    }

    /// Decodes an L2 entry that was found at `at` of the file, which has its cluster too.
    pub(crate) fn decode(&self, entry: Entry, at: u64, file_len: u64) -> Result<Mapping> {
        let wrong = |expected| {
            self.host
                .invalid(Violation::new("L2 entry", at, entry, expected))
        };
        let mapping = Mapping::decode(entry, self.version, self.geometry).map_err(wrong)?;
        let host = match mapping {
            Mapping::Compressed(compressed) => Some(compressed.offset),
            Mapping::Standard(standard) => standard.host,
        };
        match host {
            Some(host) if host >= file_len => Err(wrong(format!(
                "a cluster before the file's end at {file_len:#x}"
            ))),
            _ => Ok(mapping),
        }
    }

    /// A slice of an L2 table, loaded if need be.
    pub(crate) fn slice<'a>(&self, tables: &'a mut Tables, offset: u64) -> Result<&'a [u8]> {
        load(&self.host, &mut tables.l2, offset)?;
        Ok(tables.l2.get(offset).unwrap_or_default())
    }
}

/// Makes sure that a slice is in its cache.
pub(crate) fn load(host: &Host, cache: &mut Cache, offset: u64) -> Result<()> {
    if cache.get(offset).is_none() {
        let mut bytes = vec![0; cache.slice_bytes()];
        host.read(offset, &mut bytes)?;
        cache.insert(offset, bytes);
    }
    Ok(())
}

/// The first multiple of `unit` after `at`.
fn next(at: u64, unit: u64) -> u64 {
    (at / unit + 1).saturating_mul(unit)
}

fn merge(runs: &mut Vec<Run>, next: Run) {
    if let Some(last) = runs.last_mut() {
        let adjacent = match (last.place, next.place) {
            (Place::Below, Place::Below) | (Place::Zero, Place::Zero) => true,
            (Place::Data(a), Place::Data(b)) => a.checked_add(last.len) == Some(b),
            _ => false,
        };
        if adjacent {
            last.len += next.len;
            return;
        }
    }
    runs.push(next);
}
