//! Commit: the tables name what was prepared, once its bytes are there.

use std::ops::Range;

use crate::entry::{Entry, Mapping, Standard};
use crate::error::Result;
use crate::image::Image;
use crate::plan::Fill;
use crate::prepare::Prepared;
use crate::qcow2::{Qcow2, State, Tables};
use crate::writing::Writing;

impl Image {
    /// Lets the tables name what was written by a [plan](crate::Plan::Fill), or gives its place back if
    /// that failed. In either case nobody else waits for it any more.
    ///
    /// # Errors
    /// The tables cannot be changed: the bytes are lost. If `written` is false there is none.
    pub fn commit(&self, fill: Fill, written: bool) -> Result<()> {
        let Some(qcow2) = self.writable_top()? else {
            return Ok(());
        };
        let mut result = Ok(());
        for part in &fill.parts {
            result = result.and(qcow2.finish(part, written));
        }
        drop(fill);
        result
    }
}

impl Qcow2 {
    /// Commits clusters whose data is written, or gives them back if it is not.
    pub(crate) fn finish(&self, prepared: &Prepared, written: bool) -> Result<()> {
        if written {
            let taken = prepared.taken(self.geometry);
            return self.end_claim(&prepared.claim, taken, Ok(()), |tables, writing| {
                self.name(tables, writing, prepared)
            });
        }
        if let Some(writing) = &mut self.state().writing {
            self.let_go(writing, prepared);
        }
        self.notify();
        Ok(())
    }

    /// Lets the tables name what is written.
    fn name(&self, tables: &mut Tables, writing: &mut Writing, prepared: &Prepared) -> Result<()> {
        let cluster = self.geometry.cluster();
        let (mut guest, mut host) = (prepared.guest.start, prepared.host);
        self.change(tables, writing, prepared.guest.clone(), &mut |old| {
            let bits = self.geometry.touched(&prepared.touch, guest);
            let (alloc, zero) = match old {
                Mapping::Standard(old) if prepared.own => (old.alloc | bits, old.zero & !bits),
                Mapping::Standard(old) => (bits, old.zero & !bits),
                Mapping::Compressed(_) => (bits, 0),
            };
            let new = Standard {
                host: Some(host),
                copied: true,
                alloc,
                zero,
            };
            guest += 1;
            host += cluster;
            let new = Mapping::Standard(new);
            Some((new, if prepared.own { None } else { Some(old) }))
        })
    }

    /// Gives back what was prepared and is not going to be named.
    pub(crate) fn let_go(&self, writing: &mut Writing, prepared: &Prepared) {
        writing.drop_clusters(prepared.taken(self.geometry));
        writing.end_claim(&prepared.claim);
    }

    /// Lets go of a claim: commits, or gives back the host clusters that were `taken` if that or
    /// what came before it failed.
    pub(crate) fn end_claim(
        &self,
        claim: &Range<u64>,
        taken: Range<u64>,
        filled: Result<()>,
        commit: impl FnOnce(&mut Tables, &mut Writing) -> Result<()>,
    ) -> Result<()> {
        let mut state = self.state();
        let State {
            tables,
            writing: Some(writing),
        } = &mut *state
        else {
            return filled;
        };
        let done = filled.and_then(|()| commit(tables, writing));
        if done.is_err() {
            writing.drop_clusters(taken);
        }
        writing.end_claim(claim);
        drop(state);
        self.notify();
        done
    }

    /// Changes the L2 entries of a range within one L2 table and a few slices. `decide` gets what
    /// an entry says, and returns what it is to say, if that is something else, and the mapping
    /// whose references are gone. It gets all of them, or none if there is an error.
    pub(crate) fn change(
        &self,
        tables: &mut Tables,
        writing: &mut Writing,
        guest: Range<u64>,
        decide: &mut dyn FnMut(Mapping) -> Option<(Mapping, Option<Mapping>)>,
    ) -> Result<()> {
        let width = self.geometry.l2_entry() as usize;
        let mut places = Vec::new();
        for cluster in guest {
            let (index, at) = self.geometry.l1_index(cluster * self.geometry.cluster());
            let Some((table, _)) = self.l2_table(tables, index)? else {
                continue;
            };
            let within = (at % self.geometry.slice()) as usize;
            let slice = table + at - within as u64;
            let bytes = self.slice(tables, slice)?.get(within..within + width);
            let entry = Entry::read(bytes.unwrap_or_default());
            let guest = cluster * self.geometry.cluster();
            let old = self.mapping(entry, slice + within as u64, guest, tables.file_len)?;
            // Dirty from here on, so that it stays until it is changed below.
            tables.l2.get_mut(slice);
            places.push((slice, within, old));
        }
        for (slice, within, old) in places {
            let Some((new, gone)) = decide(old) else {
                continue;
            };
            let bytes = tables.l2.get_mut(slice).unwrap_or_default();
            if let Some(bytes) = bytes.get_mut(within..within + width) {
                new.encode(self.geometry).write(bytes);
            }
            if let Some(gone) = gone {
                writing.drop_mapping(gone, self);
            }
        }
        Ok(())
    }
}
