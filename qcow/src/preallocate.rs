//! Allocating before anything is written: with the host's space reserved, or without.

use std::ops::Range;

use crate::alloc::Allocation;
use crate::alone::Alone;
use crate::create::Preallocation;
use crate::entry::{Mapping, Standard};
use crate::error::Result;
use crate::host::Host;

impl Preallocation {
    /// Reserves a place of a file that reads as zeros, and goes on doing so.
    pub(crate) fn reserve(self, host: &Host, place: Range<u64>) -> Result<()> {
        let len = place.end.saturating_sub(place.start);
        match self {
            Preallocation::Off | Preallocation::Metadata => Ok(()),
            Preallocation::Falloc if host.allocate(place.start, len)? => Ok(()),
            // Zeros are written, so that the host has bytes there and no holes.
            Preallocation::Falloc | Preallocation::Full => {
                let zeros = vec![0; len.min(1 << 20) as usize];
                for at in place.clone().step_by(1 << 20) {
                    let part = (place.end - at).min(1 << 20) as usize;
                    host.write(at, zeros.get(..part).unwrap_or_default())?;
                }
                Ok(())
            }
        }
    }
}

impl Alone<'_> {
    /// Gives clusters new places, in which they read as zeros; what they had is given back. Over
    /// those before `zeroed` a backing file has bytes, which is to be said where it matters.
    pub(crate) fn preallocate(
        &self,
        clusters: Range<u64>,
        zeroed: u64,
        preallocation: Preallocation,
    ) -> Result<()> {
        let qcow2 = self.qcow2;
        let cluster = qcow2.geometry.cluster();
        let external = qcow2.data.is_external();
        let per_slice = qcow2.geometry.slice() / qcow2.geometry.l2_entry();
        let mut at = clusters.start;
        while at < clusters.end {
            self.keep_within_bounds()?;
            let most = ((at / per_slice + 1) * per_slice).min(clusters.end) - at;
            let index = qcow2.geometry.l1_index(at * cluster).0;
            let mut state = qcow2.state();
            let (tables, writing) = qcow2.split(&mut state)?;
            self.own_table(tables, writing, index)?;
            let allocation = if external {
                // A data file was made longer already.
                let clusters = at..at + most;
                Allocation {
                    clusters,
                    fresh: true,
                }
            } else {
                self.allocate(tables, writing, most)?
            };
            drop(state);

            let made = self.fill(at, &allocation, preallocation);
            let mut state = qcow2.state();
            let (tables, writing) = qcow2.split(&mut state)?;
            let part = at..at + (allocation.clusters.end - allocation.clusters.start);
            let mut host = allocation.clusters.start * cluster;
            let (mut guest, extended) = (at, qcow2.geometry.is_extended());
            // As in a new image, subclusters have no content yet, and encrypted clusters are zeros
            // because their entries say so: zeros of the file would be decrypted to noise.
            let blank = extended && !qcow2.data.is_raw() || !qcow2.data.is_plain();
            at = part.end;
            let done = made.and_then(|()| {
                qcow2.change(tables, writing, part, &mut |old| {
                    let all_if = |condition| if condition { u32::MAX } else { 0 };
                    let new = Standard {
                        host: Some(host),
                        copied: true,
                        alloc: all_if(!blank),
                        zero: all_if(blank && (!extended || guest < zeroed)),
                    };
                    (host, guest) = (host + cluster, guest + 1);
                    Some((Mapping::Standard(new), Some(old)))
                })
            });
            if done.is_err() {
                if !external {
                    writing.drop_clusters(allocation.clusters);
                }
                return done;
            }
        }
        Ok(())
    }

    /// Makes new clusters zeros; encrypted ones stay as they are.
    pub(crate) fn fill(
        &self,
        guest: u64,
        new: &Allocation,
        preallocation: Preallocation,
    ) -> Result<()> {
        let (data, cluster) = (&self.qcow2.data, self.qcow2.geometry.cluster());
        let place = new.clusters.start * cluster..new.clusters.end * cluster;
        if data.is_external() {
            // It ends with the disk, perhaps in the middle of a cluster.
            let place = place.start..place.end.min(data.host.len()?);
            return preallocation.reserve(&data.host, place);
        }
        // No table names what lies past the file's end.
        if data.host.len()? < place.end {
            data.host.set_len(place.end)?;
        }
        if !new.fresh && data.is_plain() {
            data.zero(guest * cluster, place.start, place.end - place.start)?;
        }
        preallocation.reserve(&data.host, place)
    }
}
