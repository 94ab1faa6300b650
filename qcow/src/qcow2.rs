//! One qcow2 file: its tables, and what they say of a guest offset.

use std::path::Path;
use std::sync::{Arc, PoisonError};

use crate::addr::Geometry;
use crate::cache::Cache;
use crate::chain::Budget;
use crate::check;
use crate::compress::Compression;
use crate::crypt::keys::locked;
use crate::data::{Data, Form, Home};
use crate::entry::{self, Compressed, Content, Entry, Mapping};
use crate::error::{Error, Result, Violation};
use crate::header::{self, CORRUPT, DIRTY, Header};
use crate::host::Host;
use crate::pin::Pins;
use crate::reference::Link;
use crate::snapshot::Selector;
use crate::storage::Storage;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard, Signal};
use crate::writing::Writing;

/// L2 slices that are loaded for a request without the lock: as many as one of common length has.
const LOADED_AHEAD: usize = 8;

/// One open qcow2 file.
pub(crate) struct Qcow2 {
    pub(crate) host: Host,
    pub(crate) data: Data,
    pub(crate) version: u32,
    pub(crate) geometry: Geometry,
    pub(crate) compression: Compression,
    /// Size of the disk in bytes; changed under the lock only.
    size: AtomicU64,
    pub(crate) writable: bool,
    /// The file may not grow past this many bytes.
    pub(crate) max_file_size: Option<u64>,
    pub(crate) refcount_cache_bytes: usize,
    /// Data is read and written without this lock.
    state: Mutex<State>,
    /// Signalled when an allocation or a flush ends.
    changed: Signal,
    /// Held while a key slot changes, which may take seconds.
    pub(crate) key_slots: Mutex<()>,
    pub(crate) pins: Arc<Pins>,
}

/// What the lock guards.
pub(crate) struct State {
    pub(crate) tables: Tables,
    /// What a writer needs; made when the first write comes.
    pub(crate) writing: Option<Box<Writing>>,
}

/// The tables, as they will be in the file once everything is flushed.
pub(crate) struct Tables {
    /// As it is in the file.
    pub(crate) header: Header,
    pub(crate) l1: Vec<u64>,
    pub(crate) l2: Cache,
    /// Where the file ends: no table and no cluster begins past it.
    pub(crate) file_len: u64,
    /// Why nothing is written any more.
    pub(crate) stopped: Option<String>,
}

/// What becomes of tables that are not in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    Now,
    Never,
}

/// A run of guest bytes and where one file has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) len: u64,
    pub(crate) place: Place,
}

/// Where a run's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the backing file, if there is one.
    Below,
    /// Nowhere: they are zeros.
    Zero,
    /// At this offset of the file.
    Data(u64),
    /// In a compressed cluster, from this byte of its content on.
    Compressed(Compressed, u64),
}

impl Qcow2 {
    /// Reads the header and the L1 table, those of a snapshot if one is given.
    pub(crate) fn open(
        path: &Path,
        storage: Arc<dyn Storage>,
        writable: bool,
        max_file_size: Option<u64>,
        snapshot: Option<&Selector>,
        budget: &mut Budget,
    ) -> Result<Self> {
        let host = Host {
            path: path.to_owned(),
            storage,
        };
        let mut header = header::read(&host)?;
        if writable && header.incompatible & CORRUPT != 0 {
            let reason = "its header says so".into();
            return Err(Error::Corrupt {
                file: path.to_owned(),
                reason,
            });
        }
        if writable && header.incompatible & DIRTY != 0 {
            header = check::rebuild_dirty(&host, header)?;
        }
        let file_len = host.len()?;
        if let Some(snapshot) = snapshot {
            header = header.at_snapshot(&host, file_len, snapshot)?;
        }
        let l1_bytes = header.l1_entries as u64 * 8;
        let cache_bytes = budget.next_cache();
        budget.l1 = budget
            .l1
            .checked_sub(l1_bytes)
            .ok_or_else(|| Error::Unsupported {
                file: path.to_owned(),
                feature: format!(
                    "a chain with more than {} bytes of L1 tables",
                    Budget::L1_BYTES
                ),
                advice: "join some of its images with `cowshed img rebase` or `cowshed img convert`",
            })?;
        let l1 = host.read_l1(header.l1_offset, header.l1_entries)?;
        let (version, geometry, compression) =
            (header.version, header.geometry, header.compression);
        let size = AtomicU64::new(header.size);
        let tables = Tables {
            header,
            l1,
            l2: Cache::new(geometry.slice(), cache_bytes - cache_bytes / 4),
            file_len,
            stopped: None,
        };
        let form = budget.keys.unlock(&host, tables.header.encryption)?;
        if writable && matches!(form, Form::Locked) {
            return Err(locked(&host));
        }
        let home = match tables.header.data_file() {
            None => Home::Image,
            Some(name) => Home::Missing(name.to_owned()),
        };
        let data = Data {
            host: host.clone(),
            home,
            form,
        };
        Ok(Qcow2 {
            host,
            data,
            version,
            geometry,
            compression,
            size,
            writable,
            max_file_size,
            refcount_cache_bytes: cache_bytes / 4,
            state: Mutex::new(State {
                tables,
                writing: None,
            }),
            changed: Signal::default(),
            key_slots: Mutex::default(),
            pins: Arc::default(),
        })
    }

    /// Takes the data file that the header names.
    pub(crate) fn attach_data(&mut self, data: Host, link: &Link) -> Result<()> {
        let (len, size) = (data.len()?, self.size());
        if len < size {
            return Err(link.refuse(&format!(
                "it has {len} bytes and the disk {size}: it was cut, or is another file"
            )));
        }
        let raw = self.state().tables.header.has_raw_data();
        self.data.host = data;
        self.data.home = Home::File { raw };
        Ok(())
    }

    /// Size of the disk in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Changes the header, in the file first. After a failure it may be either there, so that
    /// nothing more is written.
    pub(crate) fn change_header(
        &self,
        tables: &mut Tables,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let mut next = tables.header.clone();
        change(&mut next);
        if let Err(error) = tables.header.replace(&mut next, &self.host) {
            tables.stopped = Some(format!("its header could not be written: {error}"));
            return Err(error);
        }
        self.size.store(next.size, Ordering::Release);
        tables.header = next;
        Ok(())
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for an allocation or a flush to end.
    pub(crate) fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state)
    }

    /// Wakes those who [`wait`](Self::wait).
    pub(crate) fn notify(&self) {
        self.changed.notify_all();
    }

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
        let geometry = self.geometry;
        let mapped = |entries: u64| entries * geometry.cluster();
        let (by_slice, by_table) = (
            mapped(geometry.slice() / geometry.l2_entry()),
            mapped(geometry.l2_entries()),
        );
        while *at < end {
            let (index, within) = geometry.l1_index(*at);
            let Some((table, _)) = self.l2_table(tables, index)? else {
                *at = (*at / by_table + 1).saturating_mul(by_table);
                continue;
            };
            *at = (*at / by_slice + 1).saturating_mul(by_slice);
            let slice = table + within - within % geometry.slice();
            if !tables.l2.contains(slice) {
                return Ok(Some(slice));
            }
        }
        Ok(None)
    }

    /// Visits the clusters of a range in order, each with the part of it that the range covers:
    /// where it begins in the cluster, and its length; where a whole L2 table is absent, all that
    /// it would map at once. Stops when `visit` says so.
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
        while at < end {
            let (l1_index, entry_at) = geometry.l1_index(at);
            let Some((table, _)) = self.l2_table(tables, l1_index)? else {
                // The whole L2 table is absent: one visit a cluster would say nothing more.
                let covered = geometry.l2_entries() * geometry.cluster();
                let next = (at / covered + 1).saturating_mul(covered).min(end);
                if !visit(geometry.within(at), next - at, Mapping::NONE) {
                    return Ok(());
                }
                at = next;
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
