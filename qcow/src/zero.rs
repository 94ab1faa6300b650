//! Zeroing and discarding: whole clusters by their entries, the rest by writing.

use std::ops::Range;

use crate::entry::{Mapping, ZERO};
use crate::error::Result;
use crate::image::Image;
use crate::layer::Layer;
use crate::qcow2::Qcow2;

/// Bytes of zeros that are written at a time where an entry cannot say "zero".
const CHUNK: u64 = 1 << 20;

/// What becomes of an entry: its new value, and the mapping whose references are gone.
type Change = (u64, Option<Mapping>);

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
        let Some(whole) = self.whole_clusters(qcow2, offset, len) else {
            return self.write_zeros(offset, len);
        };
        let cluster = qcow2.geometry.cluster();
        let (start, end) = (
            whole.start * cluster,
            (whole.end * cluster).min(offset + len),
        );
        self.write_zeros(offset, start - offset)?;
        self.write_zeros(end, offset + len - end)?;
        if qcow2.version < 3 {
            if unmap {
                self.discard(start, end - start)?;
            }
            return self.write_zeros(start, end - start);
        }
        self.change_all(qcow2, whole, &|mapping, below, may_drop| match mapping {
            Mapping::Unallocated => below.then_some((ZERO, None)),
            Mapping::Zero { host: None, .. } => None,
            Mapping::Zero { host: Some(_), .. } => {
                (unmap && may_drop).then_some((ZERO, Some(mapping)))
            }
            Mapping::Data { host, copied: true } if !(unmap && may_drop) => {
                Some((Mapping::data(host) | ZERO, None))
            }
            Mapping::Data { .. } | Mapping::Compressed(_) => Some((ZERO, Some(mapping))),
        })
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
        let Some(whole) = self.whole_clusters(qcow2, offset, len) else {
            return Ok(());
        };
        let can_zero = qcow2.version >= 3;
        self.change_all(qcow2, whole, &|mapping, below, may_drop| match mapping {
            Mapping::Unallocated | Mapping::Zero { host: None, .. } => None,
            _ if below && !can_zero || !may_drop => None,
            _ => Some((if below { ZERO } else { 0 }, Some(mapping))),
        })
    }

    /// The clusters that lie in a range whole; the last of the disk may be a partial one.
    fn whole_clusters(&self, qcow2: &Qcow2, offset: u64, len: u64) -> Option<Range<u64>> {
        let geometry = qcow2.geometry;
        let end = offset + len;
        let last = if end == self.size() {
            geometry.clusters(end)
        } else {
            geometry.index(end)
        };
        let whole = geometry.clusters(offset)..last;
        (!whole.is_empty()).then_some(whole)
    }

    /// Writes zeros where the range does not read as zeros already.
    fn write_zeros(&self, offset: u64, len: u64) -> Result<()> {
        let zeros = vec![0; len.min(CHUNK) as usize];
        let mut done = 0;
        while done < len {
            let part = (len - done).min(CHUNK);
            if !self.reads_as_zeros(offset + done, part)? {
                self.write(
                    offset + done,
                    zeros.get(..part as usize).unwrap_or_default(),
                )?;
            }
            done += part;
        }
        Ok(())
    }

    /// Changes the entries of whole clusters. `decide` gets what an entry says, whether a backing
    /// file would show through if it said nothing, and whether clusters may be given back, which
    /// memory bounds; `None` leaves it as it is.
    fn change_all(
        &self,
        qcow2: &Qcow2,
        clusters: Range<u64>,
        decide: &dyn Fn(Mapping, bool, bool) -> Option<Change>,
    ) -> Result<()> {
        let geometry = qcow2.geometry;
        let below_size = self.layers.get(1).map_or(0, |layer| layer.size());
        let below = |cluster: u64| cluster * geometry.cluster() < below_size;
        let per_slice = geometry.slice() / 8;
        let mut at = clusters.start;
        let mut thorough = false;
        while at < clusters.end {
            let part = at..((at / per_slice + 1) * per_slice).min(clusters.end);
            let mut state = qcow2.lock_to_change(&part)?;
            let (tables, writing) = qcow2.split(&mut state)?;
            let may_drop = writing.may_drop();
            let (index, _) = geometry.l1_index(at * geometry.cluster());
            // Ask first: no L2 table is made or copied for nothing.
            let mut cluster = at;
            let mut wanted = false;
            let start = at * geometry.cluster();
            let len = (part.end * geometry.cluster()).min(self.size()) - start;
            qcow2.mappings(tables, start, len, &mut |_, covered, mapping| {
                wanted |= decide(mapping, below(cluster), may_drop).is_some();
                cluster += geometry.clusters(covered);
                !wanted
            })?;
            if wanted {
                if let Err(blocked) = qcow2.own_l2_table(tables, writing, index, thorough)? {
                    drop(state);
                    qcow2.unblock(blocked, &mut thorough)?;
                    continue;
                }
                let mut cluster = at;
                qcow2.change(tables, writing, part.clone(), &mut |old, entry| {
                    let change = decide(old, below(cluster), may_drop);
                    cluster += 1;
                    let (new, gone) = change?;
                    *entry = new;
                    gone
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
