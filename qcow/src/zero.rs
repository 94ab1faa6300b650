//! Zeroing and discarding: whole clusters by their entries, the rest by writing.

use crate::entry::{Mapping, Standard};
use crate::error::Result;
use crate::image::Image;
use crate::layer::{Layer, walk};
use crate::pin::Pin;
use crate::qcow2::{Place, Qcow2};

/// Bytes of zeros that are written at a time where an entry cannot say "zero".
const CHUNK: u64 = 1 << 20;

/// What is to become of some subclusters of a guest cluster.
struct Change {
    /// The subclusters, a bit each.
    touched: u32,
    /// A backing file would show through if the entry said nothing.
    below: bool,
    /// Clusters may be given back: memory bounds how many wait for that.
    may_drop: bool,
}

/// What an entry is to say, and the mapping whose references are gone.
type Changed = (Standard, Option<Mapping>);

impl Image {
    /// Makes a range read as zeros. With `unmap` its clusters are given back where whole;
    /// without, those that are allocated stay so.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.check_range(offset, len)?;
        let Some(qcow2) = self.writable_top()? else {
            let Some(raw) = self.layers.first().map(Layer::host) else {
                return Ok(());
            };
            let punched = unmap && raw.punch(offset, len)?;
            return if punched {
                Ok(())
            } else {
                raw.zero(offset, len)
            };
        };
        let punched = unmap && qcow2.punch_data(offset, len)?;
        if qcow2.data.is_raw() {
            return if punched {
                Ok(())
            } else {
                let _pin = qcow2.enter_data(offset, len)?;
                qcow2.data.zero(offset, offset, len)
            };
        }
        if qcow2.version >= 3 {
            let below = self.layers.get(1).map_or(0, Layer::size);
            self.change_all(qcow2, offset, len, below, &|old, change| {
                zeroed(old, change, unmap)
            })?;
        } else if unmap {
            self.discard(offset, len)?;
        }
        // What no entry can say.
        self.write_zeros(offset, len)
    }

    /// The range's content is of no use any more: whole clusters are given back. They read as
    /// zeros, or as before where nothing was allocated or the format cannot say "zero" (version 2
    /// over a backing file).
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.check_range(offset, len)?;
        let Some(qcow2) = self.writable_top()? else {
            let Some(raw) = self.layers.first().map(Layer::host) else {
                return Ok(());
            };
            return raw.punch(offset, len).map(drop);
        };
        qcow2.punch_data(offset, len)?;
        if qcow2.data.is_raw() {
            return Ok(());
        }
        let can_zero = qcow2.version >= 3;
        let below = self.layers.get(1).map_or(0, Layer::size);
        self.change_all(qcow2, offset, len, below, &|old, change| {
            discarded(old, change, can_zero)
        })
    }

    /// Writes zeros where the tables do not say zeros already.
    fn write_zeros(&self, offset: u64, len: u64) -> Result<()> {
        let (mut at, mut other) = (offset, Vec::new());
        walk(&self.layers, offset, len, &mut |_, run| {
            if !matches!(run.place, Place::Zero | Place::Below) {
                other.push(at..at + run.len);
            }
            at += run.len;
            Ok(())
        })?;
        let zeros = vec![0; len.min(CHUNK) as usize];
        for range in other {
            for at in range.clone().step_by(CHUNK as usize) {
                let part = (range.end - at).min(CHUNK) as usize;
                self.write(at, zeros.get(..part).unwrap_or_default())?;
            }
        }
        Ok(())
    }

    /// Makes a range zeros whatever comes to lie beneath the image. It begins and ends where
    /// subclusters do, or the disk.
    pub(crate) fn write_zeroes_over_all(&self, offset: u64, len: u64) -> Result<()> {
        match self.writable_top()? {
            Some(qcow2) if qcow2.version >= 3 && !qcow2.data.is_raw() => {
                self.change_all(qcow2, offset, len, u64::MAX, &|old, change| {
                    zeroed(old, change, true)
                })?;
                self.write_zeros(offset, len)
            }
            _ => {
                let zeros = vec![0; len.min(CHUNK) as usize];
                for at in (offset..offset + len).step_by(CHUNK as usize) {
                    let part = (offset + len - at).min(CHUNK) as usize;
                    self.write(at, zeros.get(..part).unwrap_or_default())?;
                }
                Ok(())
            }
        }
    }

    /// Changes the entries of the subclusters that lie in a range whole; the last of the disk may
    /// be a partial one. Beneath the image are `below_size` bytes. Where `decide` returns `None` an entry stays as it is.
    fn change_all(
        &self,
        qcow2: &Qcow2,
        offset: u64,
        len: u64,
        below_size: u64,
        decide: &dyn Fn(Mapping, &Change) -> Option<Changed>,
    ) -> Result<()> {
        let (geometry, cluster) = (qcow2.geometry, qcow2.geometry.cluster());
        let end = offset + len;
        let range = offset.next_multiple_of(geometry.subcluster())..if end == self.size() {
            end.next_multiple_of(cluster)
        } else {
            end - end % geometry.subcluster()
        };
        let per_slice = geometry.slice() / geometry.l2_entry();
        let clusters = geometry.index(range.start)..geometry.clusters(range.end);
        let mut at = clusters.start;
        let mut thorough = false;
        while range.start < range.end && at < clusters.end {
            let part = at..((at / per_slice + 1) * per_slice).min(clusters.end);
            // Whole clusters may go, so that nobody may be filling any part of them.
            let mut state = qcow2.lock_to_change(&(part.start * cluster..part.end * cluster))?;
            let (tables, writing) = qcow2.split(&mut state)?;
            let may_drop = writing.may_drop();
            let change = |of: u64| Change {
                touched: geometry.touched(&range, of),
                below: of * cluster < below_size,
                may_drop,
            };
            let (index, _) = geometry.l1_index(at * cluster);
            // Ask first: no L2 table is made or copied for nothing.
            let mut of = at;
            let mut wanted = false;
            let start = at * cluster;
            let len = (part.end * cluster).min(self.size()) - start;
            qcow2.mappings(tables, start, len, &mut |_, covered, mapping| {
                wanted |= decide(mapping, &change(of)).is_some();
                of += geometry.clusters(covered);
                !wanted
            })?;
            if wanted {
                let changed = start.max(range.start)..(start + len).min(range.end);
                qcow2.mark_dirty(tables, writing, changed)?;
                if let Err(blocked) = qcow2.own_l2_table(tables, writing, index, thorough)? {
                    drop(state);
                    qcow2.unblock(blocked, &mut thorough)?;
                    continue;
                }
                let mut of = at;
                qcow2.change(tables, writing, part.clone(), &mut |old| {
                    of += 1;
                    let (new, gone) = decide(old, &change(of - 1))?;
                    Some((Mapping::Standard(new), gone))
                })?;
            }
            at = part.end;
            if !wanted && qcow2.l2_table(tables, index)?.is_none() {
                let next_table = (index as u64 + 1) * geometry.l2_entries();
                at = next_table.min(clusters.end);
            }
        }
        Ok(())
    }
}

impl Qcow2 {
    /// Gives back what a data file has of a range that is to read as zeros, or is of no use any
    /// more; says whether it did, so that zeros are there. What its entries say follows.
    fn punch_data(&self, offset: u64, len: u64) -> Result<bool> {
        if !self.data.is_external() {
            return Ok(false);
        }
        let _pin = self.enter_data(offset, len)?;
        self.data.punch(offset, len)
    }

    /// Waits until a range of a data file may be changed, whatever its entries say. Who writes
    /// there meanwhile may be before or after.
    fn enter_data(&self, offset: u64, len: u64) -> Result<Pin> {
        let range = offset..offset + len;
        let mut state = self.lock_to_change(&range)?;
        let (tables, writing) = self.split(&mut state)?;
        self.mark_dirty(tables, writing, range)?;
        Ok(self.pins.pin())
    }
}

/// The entry of a cluster whose touched subclusters read as zeros; `None` if it stays, because it
/// says so already, or cannot. With `unmap` the host cluster goes when nothing is left in it.
fn zeroed(old: Mapping, change: &Change, unmap: bool) -> Option<Changed> {
    let Mapping::Standard(standard) = old else {
        return (change.touched == u32::MAX).then_some((Standard::ZERO, Some(old)));
    };
    let nonzero = if change.below {
        !standard.zero
    } else {
        standard.alloc
    };
    let pending = nonzero & change.touched;
    let new = Standard {
        alloc: standard.alloc & !pending,
        zero: standard.zero | pending,
        ..standard
    };
    let shared = !standard.copied && pending != 0;
    let leave = unmap && change.may_drop || shared;
    finish(old, standard, new, leave)
}

/// The entry of a cluster whose touched subclusters are of no use any more; `None` if it stays.
fn discarded(old: Mapping, change: &Change, can_zero: bool) -> Option<Changed> {
    if change.below && !can_zero || !change.may_drop {
        return None;
    }
    let Mapping::Standard(standard) = old else {
        let zero = if change.below { u32::MAX } else { 0 };
        let new = Standard {
            zero,
            ..Standard::default()
        };
        return (change.touched == u32::MAX).then_some((new, Some(old)));
    };
    standard.host?;
    let gone = standard.alloc & change.touched;
    let zero = if change.below {
        standard.zero | gone
    } else {
        standard.zero & !change.touched
    };
    let new = Standard {
        alloc: standard.alloc & !gone,
        zero,
        ..standard
    };
    finish(old, standard, new, true)
}

/// Lets the host cluster go if it may and nothing is left in it; `None` if nothing changes.
fn finish(old: Mapping, standard: Standard, new: Standard, leave: bool) -> Option<Changed> {
    if leave && new.alloc == 0 && new.host.is_some() {
        let nowhere = Standard {
            host: None,
            copied: false,
            ..new
        };
        return Some((nowhere, Some(old)));
    }
    (new != standard).then_some((new, None))
}
