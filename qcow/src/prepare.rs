//! Prepare: which clusters a write gets. The tables name them when it is written (`commit`).

use std::ops::Range;

use crate::addr::Geometry;
use crate::alloc::{Allocation, Blocked};
use crate::entry;
use crate::error::{Error, Result};
use crate::pin::Pin;
use crate::plan::{self, Extent, Fill};
use crate::qcow2::{Qcow2, State, Tables};
use crate::refcount::SECTOR_ENTRIES;
use crate::sync::MutexGuard;
use crate::way::{Ends, Way};
use crate::writing::Writing;

/// Bytes that one allocation takes at most, so that few slices are touched at a time.
const MAX_RUN: u64 = 4 << 20;

/// What is to be done for the next part of a write.
pub(crate) enum Step {
    /// These bytes can be overwritten where they are.
    InPlace { host: u64, len: u64, _pin: Pin },
    /// Clusters that nothing names yet.
    Fill(Prepared),
}

/// A run of guest clusters with the host clusters that they are going to have.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) guest: Range<u64>,
    /// First byte of the host clusters.
    pub(crate) host: u64,
    /// The host clusters are zeros.
    pub(crate) fresh: bool,
    /// The guest clusters have them already, or have always a right to them, as in a data file:
    /// they only get more subclusters.
    pub(crate) own: bool,
    /// Bytes of the disk that are to be in the host clusters: those that are written, and those
    /// that must come along.
    pub(crate) touch: Range<u64>,
    /// Bytes of the disk whose other changes wait for this one.
    pub(crate) claim: Range<u64>,
    /// Bytes of the write that fall into the run.
    pub(crate) len: u64,
}

impl Prepared {
    /// Where the file has the bytes of the write at `at` of the disk, which is in the first cluster.
    fn place(&self, at: u64, geometry: Geometry) -> u64 {
        self.host + geometry.within(at)
    }

    /// The host clusters that were allocated for it.
    pub(crate) fn taken(&self, geometry: Geometry) -> Range<u64> {
        let clusters = self.guest.end - self.guest.start;
        match self.own {
            true => 0..0,
            false => geometry.span(self.host, clusters * geometry.cluster()),
        }
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
            } else if writing.alone || writing.is_allocating(guest) {
                state = self.wait(state);
            } else {
                return Ok(state);
            }
        }
    }

    /// Decides what to do for the first part of a write, and allocates for it.
    pub(crate) fn prepare(&self, at: u64, len: u64) -> Result<Step> {
        let len = self.within_one_table(at, len);
        let mut thorough = false;
        loop {
            let mut state = self.lock_to_change(&self.geometry.subclusters(at..at + len))?;
            let (tables, writing) = self.split(&mut state)?;
            match self.step(tables, writing, at, len, thorough)? {
                Ok(step) => return Ok(step),
                Err(blocked) => {
                    drop(state);
                    self.unblock(blocked, &mut thorough)?;
                }
            }
        }
    }

    /// How much of a write is prepared at a time: no more than one L2 table maps, and no more than
    /// a few slices of that do.
    fn within_one_table(&self, at: u64, len: u64) -> u64 {
        let geometry = self.geometry;
        let l2_covers = geometry.l2_entries() * geometry.cluster();
        let limit = (geometry.floor(at) + MAX_RUN.max(geometry.cluster()))
            .min((at / l2_covers + 1).saturating_mul(l2_covers));
        len.min(limit - at)
    }

    /// One attempt at [`prepare`](Self::prepare), where nobody else is at these bytes.
    fn step(
        &self,
        tables: &mut Tables,
        writing: &mut Writing,
        at: u64,
        len: u64,
        thorough: bool,
    ) -> Result<Result<Step, Blocked>> {
        let geometry = self.geometry;
        let (way, len, ends) = self.first_run(tables, at, len)?;
        let guest = geometry.span(at, len);
        if let Way::InPlace(host) | Way::Own(host) = way {
            let clusters = geometry.span(host, geometry.within(at) + len);
            if let Some(hit) = self.find_table(writing, clusters) {
                return Err(self.overlaps(tables, hit));
            }
        }
        self.mark_dirty(tables, writing, at..at + len)?;
        let prepared = match way {
            Way::InPlace(host) => {
                let host = host + geometry.within(at);
                return Ok(Ok(Step::InPlace {
                    host,
                    len,
                    _pin: self.pins.pin(),
                }));
            }
            Way::Own(host) => Ok(Prepared {
                guest,
                host,
                fresh: false,
                own: true,
                touch: self.touch(at..at + len, &ends),
                claim: geometry.subclusters(at..at + len),
                len,
            }),
            Way::Allocate => self.prepare_new(tables, writing, at..at + len, &ends, thorough)?,
        };
        Ok(prepared.map(|prepared| {
            writing.allocating.push(prepared.claim.clone());
            Step::Fill(prepared)
        }))
    }

    /// Prepares all of a write whose bytes can go to their places as they are; `None` if something
    /// has to be done first.
    pub(crate) fn plan_fill(
        &self,
        tables: &mut Tables,
        writing: &mut Writing,
        bytes: Range<u64>,
    ) -> Result<Option<(Vec<Extent>, Fill)>> {
        let mut extents = Vec::new();
        let mut fill = Fill {
            parts: Vec::new(),
            _pin: self.pins.pin(),
        };
        let mut at = bytes.start;
        while at < bytes.end {
            let len = self.within_one_table(at, bytes.end - at);
            let (offset, len) = match self.step(tables, writing, at, len, false) {
                Ok(Ok(Step::InPlace { host, len, .. })) => (host, len),
                Ok(Ok(Step::Fill(prepared))) => {
                    let place = (prepared.place(at, self.geometry), prepared.len);
                    fill.parts.push(prepared);
                    place
                }
                stopped => {
                    fill.parts
                        .iter()
                        .for_each(|part| self.let_go(writing, part));
                    return stopped.map(|_| None);
                }
            };
            let file = 0;
            plan::push(&mut extents, Extent::File { file, offset, len });
            at += len;
        }
        Ok(Some((extents, fill)))
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

    fn prepare_new(
        &self,
        tables: &mut Tables,
        writing: &mut Writing,
        bytes: Range<u64>,
        ends: &Ends,
        thorough: bool,
    ) -> Result<Result<Prepared, Blocked>> {
        let (geometry, cluster) = (self.geometry, self.geometry.cluster());
        let index = geometry.l1_index(bytes.start).0;
        if let Err(blocked) = self.own_l2_table(tables, writing, index, thorough)? {
            return Ok(Err(blocked));
        }
        let guest = geometry.span(bytes.start, bytes.end - bytes.start);
        let most = guest.end - guest.start;
        let external = self.data.is_external();
        let allocation = if external {
            // What was there before, if anything, is no part of the disk.
            Ok(Allocation {
                clusters: guest.clone(),
                fresh: false,
            })
        } else {
            self.allocate(tables, writing, most, thorough)?
        };
        let allocation = match allocation {
            Ok(allocation) => allocation,
            Err(blocked) => return Ok(Err(blocked)),
        };
        let got = allocation.clusters.end - allocation.clusters.start;
        let guest = guest.start..guest.start + got;
        let bytes = bytes.start..bytes.end.min(guest.end * cluster);
        Ok(Ok(Prepared {
            host: allocation.clusters.start * cluster,
            fresh: allocation.fresh,
            own: external,
            len: bytes.end - bytes.start,
            touch: self.touch(bytes, ends),
            claim: guest.start * cluster..guest.end * cluster,
            guest,
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
        writing.metadata.insert([allocation.clusters.start]);
        if let Some(old) = old {
            writing.drop_table(self.geometry.span(old, 1));
        }
        self.set_l1(tables, writing, index, entry::own_table(table));
        Ok(Ok(table))
    }

    /// Sets an L1 entry; its sector is dirty now.
    pub(crate) fn set_l1(
        &self,
        tables: &mut Tables,
        writing: &mut Writing,
        index: usize,
        entry: u64,
    ) {
        if let Some(slot) = tables.l1.get_mut(index) {
            *slot = entry;
            writing.l1_dirty.insert(index as u64 / SECTOR_ENTRIES);
        }
    }

    /// Where data would land on metadata, if it is written to these clusters.
    pub(crate) fn find_table(&self, writing: &Writing, mut clusters: Range<u64>) -> Option<u64> {
        if self.data.is_external() {
            return None;
        }
        let hit = clusters.find(|&cluster| writing.metadata.contains(cluster));
        hit.map(|cluster| cluster * self.geometry.cluster())
    }

    /// Guest data would land on metadata: the image is corrupt.
    pub(crate) fn overlaps(&self, tables: &mut Tables, host: u64) -> Error {
        self.mark_corrupt(
            tables,
            format!("an L2 entry leads to metadata at {host:#x}"),
        )
    }
}
