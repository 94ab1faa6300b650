//! Writing: in place where the cluster is the image's own, else prepare, write data, commit.

use std::ops::Range;
use std::sync::MutexGuard;

use crate::addr::be64;
use crate::alloc::Blocked;
use crate::entry::Mapping;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::layer::{Layer, walk};
use crate::pin::Pin;
use crate::plan::{self, Extent, Plan};
use crate::qcow2::{Place, Qcow2, State, Tables};
use crate::refcount::SECTOR_ENTRIES;
use crate::writing::Writing;

/// Bytes that one allocation takes at most, so that few slices are touched at a time.
const MAX_RUN: u64 = 4 << 20;

/// What is to be done for the next part of a write.
enum Step {
    /// These bytes can be overwritten where they are.
    InPlace { host: u64, len: u64, _pin: Pin },
    /// Clusters that nothing names yet.
    Fill(Prepared),
}

/// A run of guest clusters with the host clusters that they are going to have.
struct Prepared {
    guest: Range<u64>,
    /// First byte of the host clusters.
    host: u64,
    /// The host clusters are zeros.
    fresh: bool,
    /// They were kept for these guest clusters, which read as zeros.
    reused: bool,
    /// Bytes of the write that fall into the run.
    len: u64,
}

/// How a guest cluster can be written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    InPlace(u64),
    Reuse(u64),
    Allocate,
}

fn way(mapping: Mapping) -> Way {
    match mapping {
        Mapping::Data { host, copied: true } => Way::InPlace(host),
        Mapping::Zero {
            host: Some(host),
            copied: true,
        } => Way::Reuse(host),
        _ => Way::Allocate,
    }
}

impl Image {
    /// Where `len` bytes at `offset` can be overwritten in place: all of them must lie in clusters
    /// of the top image that nothing else refers to.
    pub fn plan_write(&self, offset: u64, len: u64) -> Result<Plan> {
        self.check_range(offset, len)?;
        let Some(qcow2) = self.writable_top()? else {
            let extents = vec![Extent::File {
                file: 0,
                offset,
                len,
            }];
            let fast = self
                .layers
                .first()
                .is_some_and(|layer| layer.storage().file().is_some());
            return Ok(if fast {
                Plan::Fast {
                    extents,
                    pin: Pin::none(),
                }
            } else {
                Plan::Slow
            });
        };
        if qcow2.host.storage.file().is_none() {
            return Ok(Plan::Slow);
        }
        let mut state = qcow2.state();
        let (tables, writing) = qcow2.split(&mut state)?;
        let mut extents = Vec::new();
        let mut fast = true;
        let mut overlap = None;
        qcow2.mappings(tables, offset, len, &mut |within, len, mapping| {
            let Way::InPlace(host) = way(mapping) else {
                fast = false;
                return false;
            };
            if writing.metadata.contains(&qcow2.geometry.index(host)) {
                overlap = Some(host);
            }
            plan::push(
                &mut extents,
                Extent::File {
                    file: 0,
                    offset: host + within,
                    len,
                },
            );
            overlap.is_none()
        })?;
        if let Some(host) = overlap {
            return Err(qcow2.overlaps(tables, host));
        }
        let pin = qcow2.pins.pin();
        Ok(if fast {
            Plan::Fast { extents, pin }
        } else {
            Plan::Slow
        })
    }

    /// Writes `buf` at `offset` of the disk.
    pub fn write(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        let Some(qcow2) = self.writable_top()? else {
            return self
                .layers
                .first()
                .map_or(Ok(()), |raw| raw.host().write(offset, buf));
        };
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let step = qcow2.prepare(at, rest.len() as u64)?;
            let len = match &step {
                Step::InPlace { len, .. } => *len,
                Step::Fill(prepared) => prepared.len,
            };
            let (part, after) = rest.split_at(len as usize);
            match step {
                Step::InPlace { host, .. } => qcow2.host.write(host, part)?,
                Step::Fill(prepared) => {
                    let filled = self.fill(qcow2, &prepared, at, part);
                    qcow2.finish(&prepared, filled)?;
                }
            }
            (at, rest) = (at + len, after);
        }
        Ok(())
    }

    /// The top image if it is qcow2, or `None` if it is a raw file; an error if it is read-only.
    pub(crate) fn writable_top(&self) -> Result<Option<&Qcow2>> {
        match self.layers.first() {
            Some(layer) if !layer.writable() => Err(Error::ReadOnly {
                file: layer.host().path.clone(),
            }),
            Some(Layer::Qcow2(qcow2)) => Ok(Some(qcow2)),
            _ => Ok(None),
        }
    }

    /// Writes a run of new clusters: `data` at `at`, and before and after it, up to the clusters'
    /// ends, what was read there.
    fn fill(&self, qcow2: &Qcow2, prepared: &Prepared, at: u64, data: &[u8]) -> Result<()> {
        let cluster = qcow2.geometry.cluster();
        let start = prepared.guest.start * cluster;
        let end = prepared.guest.end * cluster;
        let data_end = at + data.len() as u64;
        let host = |guest: u64| prepared.host + (guest - start);
        let head = self.beside(qcow2, prepared, start..at, host(start))?;
        let tail = self.beside(qcow2, prepared, data_end..end, host(data_end))?;
        if head.is_empty() && tail.is_empty() {
            return qcow2.host.write(host(at), data);
        }
        // One write for a small run, so that a cluster lands at once.
        if end - start <= cluster {
            let from = at - head.len() as u64;
            return qcow2.host.write(host(from), &[&head, data, &tail].concat());
        }
        if !head.is_empty() {
            qcow2.host.write(host(start), &head)?;
        }
        qcow2.host.write(host(at), data)?;
        if tail.is_empty() {
            Ok(())
        } else {
            qcow2.host.write(host(data_end), &tail)
        }
    }

    /// The old content of a range beside the data, to be copied; empty if there is nothing to
    /// copy, because the range is zeros and its new place is so too.
    fn beside(
        &self,
        qcow2: &Qcow2,
        prepared: &Prepared,
        guest: Range<u64>,
        host: u64,
    ) -> Result<Vec<u8>> {
        if guest.is_empty() {
            return Ok(Vec::new());
        }
        let on_disk = guest.end.min(self.size()).saturating_sub(guest.start);
        if prepared.reused || self.reads_as_zeros(guest.start, on_disk)? {
            if !prepared.fresh {
                qcow2.host.zero(host, guest.end - guest.start)?;
            }
            return Ok(Vec::new());
        }
        let mut old = vec![0; (guest.end - guest.start) as usize];
        let on_disk = old.get_mut(..on_disk as usize).unwrap_or_default();
        self.read(guest.start, on_disk)?;
        Ok(old)
    }

    /// Whether the tables alone say that a range is zeros.
    pub(crate) fn reads_as_zeros(&self, offset: u64, len: u64) -> Result<bool> {
        let mut zeros = true;
        walk(&self.layers, offset, len, &mut |_, run| {
            zeros &= matches!(run.place, Place::Zero | Place::Below);
            Ok(())
        })?;
        Ok(zeros)
    }
}

impl Qcow2 {
    /// The tables and what a writer needs, made at the first write.
    pub(crate) fn split<'a>(
        &self,
        state: &'a mut State,
    ) -> Result<(&'a mut Tables, &'a mut Writing)> {
        let State { tables, writing } = state;
        if let Some(reason) = &tables.stopped {
            return Err(Error::Corrupt {
                file: self.host.path.clone(),
                reason: reason.clone(),
            });
        }
        match writing {
            Some(writing) => Ok((tables, writing)),
            None => {
                let started = self.start_writing(tables)?;
                Ok((tables, writing.insert(Box::new(started))))
            }
        }
    }

    /// The lock, when nothing asks for a flush first and nobody allocates in a guest range.
    pub(crate) fn lock_to_change(&self, guest: &Range<u64>) -> Result<MutexGuard<'_, State>> {
        let mut state = self.state();
        loop {
            let (tables, writing) = self.split(&mut state)?;
            if tables.l2.is_strained() || writing.is_strained() {
                drop(state);
                self.flush()?;
                state = self.state();
            } else if writing.is_allocating(guest) {
                state = self.wait(state);
            } else {
                return Ok(state);
            }
        }
    }

    /// Decides what to do for the first part of a write, and allocates for it.
    fn prepare(&self, at: u64, len: u64) -> Result<Step> {
        let geometry = self.geometry;
        let mut thorough = false;
        loop {
            // No more than one L2 table, and of that no more than a few slices.
            let l2_covers = geometry.l2_entries() * geometry.cluster();
            let first = geometry.floor(at);
            let limit = (first + MAX_RUN.max(geometry.cluster()))
                .min((at / l2_covers + 1).saturating_mul(l2_covers));
            let len = len.min(limit - at);
            let guest = geometry.span(at, len);
            let mut state = self.lock_to_change(&guest)?;
            let (tables, writing) = self.split(&mut state)?;
            let (way, len) = self.first_run(tables, at, len)?;
            let guest = geometry.span(at, len);
            if let Way::InPlace(host) | Way::Reuse(host) = way {
                let clusters = geometry.span(host, geometry.within(at) + len);
                if let Some(hit) = clusters.clone().find(|c| writing.metadata.contains(c)) {
                    return Err(self.overlaps(tables, hit * geometry.cluster()));
                }
            }
            let prepared = match way {
                Way::InPlace(host) => {
                    let host = host + geometry.within(at);
                    return Ok(Step::InPlace {
                        host,
                        len,
                        _pin: self.pins.pin(),
                    });
                }
                Way::Reuse(host) => Ok(Prepared {
                    guest,
                    host,
                    fresh: false,
                    reused: true,
                    len,
                }),
                Way::Allocate => self.prepare_new(tables, writing, at, guest, len, thorough)?,
            };
            match prepared {
                Ok(prepared) => {
                    writing.allocating.push(prepared.guest.clone());
                    return Ok(Step::Fill(prepared));
                }
                Err(blocked) => {
                    drop(state);
                    self.unblock(blocked, &mut thorough)?;
                }
            }
        }
    }

    /// Makes room for an allocation that was blocked, or fails.
    pub(crate) fn unblock(&self, blocked: Blocked, thorough: &mut bool) -> Result<()> {
        match blocked {
            Blocked::TableFull => self.grow_refcount_table(),
            Blocked::FileFull if *thorough => Err(self.full(self.file_limit())),
            Blocked::FileFull => {
                *thorough = true;
                self.flush()
            }
        }
    }

    /// How the first cluster can be written, and for how many bytes that holds: host clusters
    /// that are used as they are must follow each other.
    fn first_run(&self, tables: &mut Tables, at: u64, len: u64) -> Result<(Way, u64)> {
        let mut first: Option<Way> = None;
        let mut covered = 0;
        let from = self.geometry.floor(at);
        self.mappings(tables, at, len, &mut |_, part, mapping| {
            let distance = self.geometry.floor(at + covered) - from;
            let expected = match first {
                Some(Way::InPlace(host)) => Some(Way::InPlace(host + distance)),
                Some(Way::Reuse(host)) => Some(Way::Reuse(host + distance)),
                other => other,
            };
            let found = way(mapping);
            if expected.is_some_and(|expected| expected != found) {
                return false;
            }
            first.get_or_insert(found);
            covered += part;
            true
        })?;
        Ok((first.unwrap_or(Way::Allocate), covered))
    }

    fn prepare_new(
        &self,
        tables: &mut Tables,
        writing: &mut Writing,
        at: u64,
        guest: Range<u64>,
        len: u64,
        thorough: bool,
    ) -> Result<Result<Prepared, Blocked>> {
        let index = self.geometry.l1_index(at).0;
        if let Err(blocked) = self.own_l2_table(tables, writing, index, thorough)? {
            return Ok(Err(blocked));
        }
        let most = guest.end - guest.start;
        Ok(self
            .allocate(tables, writing, most, thorough)?
            .map(|allocation| {
                let got = allocation.clusters.end - allocation.clusters.start;
                let guest = guest.start..guest.start + got;
                let len = len.min(guest.end * self.geometry.cluster() - at);
                let host = allocation.clusters.start * self.geometry.cluster();
                Prepared {
                    guest,
                    host,
                    fresh: allocation.fresh,
                    reused: false,
                    len,
                }
            }))
    }

    /// The L2 table of an L1 entry, made or copied if it is not there or not the image's own. Its
    /// bytes are in the file before the L1 entry is, because the next flush syncs in between.
    pub(crate) fn own_l2_table(
        &self,
        tables: &mut Tables,
        writing: &mut Writing,
        index: usize,
        thorough: bool,
    ) -> Result<Result<u64, Blocked>> {
        let old = match self.l2_table(tables, index)? {
            Some((table, true)) => return Ok(Ok(table)),
            old => old.map(|(table, _)| table),
        };
        let allocation = match self.allocate(tables, writing, 1, thorough)? {
            Ok(allocation) => allocation,
            Err(blocked) => return Ok(Err(blocked)),
        };
        let cluster = self.geometry.cluster();
        let table = allocation.clusters.start * cluster;
        let made = match old {
            None => self.host.zero(table, cluster),
            Some(old) => {
                let mut bytes = vec![0; cluster as usize];
                self.host
                    .read(old, &mut bytes)
                    .and_then(|()| self.host.write(table, &bytes))
            }
        };
        if let Err(error) = made {
            writing.drop_clusters(allocation.clusters);
            return Err(error);
        }
        tables.l2.forget(table, cluster);
        writing.metadata.insert(allocation.clusters.start);
        if let Some(old) = old {
            writing.metadata.remove(&self.geometry.index(old));
            writing.drop_clusters(self.geometry.span(old, 1));
        }
        self.set_l1(tables, writing, index, Mapping::data(table));
        Ok(Ok(table))
    }

    /// Commits clusters whose data is written, or gives them back if that failed.
    fn finish(&self, prepared: &Prepared, filled: Result<()>) -> Result<()> {
        let mut state = self.state();
        let State {
            tables,
            writing: Some(writing),
        } = &mut *state
        else {
            return filled;
        };
        let cluster = self.geometry.cluster();
        let done = filled.and_then(|()| {
            let mut host = prepared.host;
            self.change(
                tables,
                writing,
                prepared.guest.clone(),
                &mut |old, entry| {
                    *entry = Mapping::data(host);
                    host += cluster;
                    // What was kept for the cluster goes on being its own.
                    if prepared.reused { None } else { Some(old) }
                },
            )
        });
        if done.is_err() && !prepared.reused {
            let clusters = prepared.guest.end - prepared.guest.start;
            writing.drop_clusters(self.geometry.span(prepared.host, clusters * cluster));
        }
        writing.allocating.retain(|range| *range != prepared.guest);
        drop(state);
        self.notify();
        done
    }

    /// Changes the L2 entries of a range within one L2 table and a few slices. `decide` gets what
    /// an entry says and its value to change, and returns the mapping whose references are gone.
    /// It gets all of them, or none if there is an error.
    pub(crate) fn change(
        &self,
        tables: &mut Tables,
        writing: &mut Writing,
        guest: Range<u64>,
        decide: &mut dyn FnMut(Mapping, &mut u64) -> Option<Mapping>,
    ) -> Result<()> {
        let mut places = Vec::new();
        for cluster in guest {
            let (index, at) = self.geometry.l1_index(cluster * self.geometry.cluster());
            let Some((table, _)) = self.l2_table(tables, index)? else {
                continue;
            };
            let within = (at % self.geometry.slice()) as usize;
            let slice = table + at - within as u64;
            let entry = be64(self.slice(tables, slice)?, within);
            let old = self.decode(entry, slice + within as u64, tables.file_len)?;
            // Dirty from here on, so that it stays until it is changed below.
            tables.l2.get_mut(slice);
            places.push((slice, within, entry, old));
        }
        for (slice, within, mut entry, old) in places {
            let gone = decide(old, &mut entry);
            let bytes = tables.l2.get_mut(slice).unwrap_or_default();
            if let Some(bytes) = bytes.get_mut(within..within + 8) {
                bytes.copy_from_slice(&entry.to_be_bytes());
            }
            if let Some(gone) = gone {
                writing.drop_mapping(gone, self);
            }
        }
        Ok(())
    }

    /// Sets an L1 entry; its sector is dirty now.
    fn set_l1(&self, tables: &mut Tables, writing: &mut Writing, index: usize, entry: u64) {
        if let Some(slot) = tables.l1.get_mut(index) {
            *slot = entry;
            writing.l1_dirty.insert(index as u64 / SECTOR_ENTRIES);
        }
    }

    /// Guest data would land on metadata: the image is corrupt.
    fn overlaps(&self, tables: &mut Tables, host: u64) -> Error {
        self.mark_corrupt(
            tables,
            format!("an L2 entry leads to metadata at {host:#x}"),
        )
    }
}
