//! Writing compressed clusters: they lie in the file byte after byte, and share host clusters.

use std::ops::Range;
use std::path::PathBuf;

use crate::alloc::Blocked;
use crate::compress::{CompressedCluster, Compressor};
use crate::entry::{Compressed, Mapping};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::qcow2::{Qcow2, Tables};
use crate::writing::Writing;

impl Image {
    /// What compresses clusters for this image, by the method that its header names. `level` goes
    /// from 1, fast, to 9 (zlib) or 22 (zstd), small; without it there is the method's default.
    pub fn compressor(&self, level: Option<u32>) -> Result<Compressor> {
        let qcow2 = self.packable()?;
        let cluster = qcow2.geometry.cluster() as usize;
        Ok(Compressor::new(qcow2.compression, cluster, level))
    }

    /// The top image, if it can have compressed clusters.
    fn packable(&self) -> Result<&Qcow2> {
        let qcow2 = self.writable_top()?.ok_or_else(|| Error::Unsupported {
            file: self
                .layers
                .first()
                .map_or_else(PathBuf::new, |raw| raw.host().path.clone()),
            feature: "the raw format, which has no compressed clusters".into(),
            advice: "convert it to qcow2",
        })?;
        let (feature, advice) = if qcow2.data.is_external() {
            let feature = "a data file, where no cluster is compressed";
            (feature, "write without compression")
        } else if !qcow2.data.is_plain() {
            let feature = "encryption, and compressed clusters are never encrypted";
            (feature, "write what is to be secret uncompressed")
        } else {
            return Ok(qcow2);
        };
        Err(Error::Unsupported {
            file: qcow2.host.path.clone(),
            feature: feature.into(),
            advice,
        })
    }

    /// Writes whole clusters compressed, or as they are where that saves nothing; the disk's last
    /// one may be a partial one. Each takes a new place, whatever was there before. Who has several
    /// threads gives them a [`compressor`](Self::compressor), and
    /// [places](Self::place_compressed) what they make.
    pub fn write_compressed(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let compressor = self.compressor(None)?;
        self.check_clusters(offset, buf.len() as u64)?;
        let mut at = offset;
        for content in buf.chunks(compressor.cluster) {
            match compressor.compress(content) {
                Some(cluster) => self.place_compressed(at, &cluster)?,
                None => self.write(at, content)?,
            }
            at += content.len() as u64;
        }
        Ok(())
    }

    /// Writes a cluster that this image's [`compressor`](Self::compressor) made, at a multiple of
    /// the cluster size.
    pub fn place_compressed(&self, offset: u64, cluster: &CompressedCluster) -> Result<()> {
        let qcow2 = self.packable()?;
        let (by, len) = (cluster.by, qcow2.geometry.cluster());
        if (by.compression, by.cluster as u64) != (qcow2.compression, len) {
            return Err(Error::Unsupported {
                file: qcow2.host.path.clone(),
                feature: "a cluster that another image's compressor made".into(),
                advice: "use the compressor of the image that is written",
            });
        }
        self.check_clusters(offset, len.min(self.size().saturating_sub(offset)))?;
        let claim = offset..offset + len;
        let place = qcow2.reserve(&claim, cluster.stream.len() as u64)?;
        self.decompressed.forget(place);
        let written = qcow2.host.write(place.offset, &cluster.stream);
        let new = Mapping::Compressed(place);
        let guest = qcow2.geometry.span(offset, 1);
        qcow2.end_claim(
            &claim,
            new.clusters(qcow2.geometry),
            written,
            |tables, writing| {
                qcow2.change(tables, writing, guest, &mut |old| Some((new, Some(old))))
            },
        )
    }

    /// Whether a range is inside the disk, and of whole clusters.
    fn check_clusters(&self, offset: u64, len: u64) -> Result<()> {
        self.check_range(offset, len)?;
        let cluster = u64::from(self.cluster_size());
        let whole = len.is_multiple_of(cluster) || offset + len == self.size();
        if whole && offset.is_multiple_of(cluster) {
            Ok(())
        } else {
            Err(Error::Unaligned {
                offset,
                len,
                cluster,
            })
        }
    }
}

impl Qcow2 {
    /// Finds a place for `len` bytes, less than a cluster, and claims a guest cluster for them.
    fn reserve(&self, claim: &Range<u64>, len: u64) -> Result<Compressed> {
        let index = self.geometry.l1_index(claim.start).0;
        let mut thorough = false;
        loop {
            let mut state = self.lock_to_change(claim)?;
            let (tables, writing) = self.split(&mut state)?;
            self.mark_dirty(tables, writing, claim.clone())?;
            let found = match self.own_l2_table(tables, writing, index, thorough)? {
                Ok(_) => self.pack(tables, writing, len, thorough)?,
                Err(blocked) => Err(blocked),
            };
            match found {
                Ok(offset) => {
                    writing.allocating.push(claim.clone());
                    return Ok(Compressed::new(offset, len));
                }
                Err(blocked) => {
                    drop(state);
                    self.unblock(blocked, &mut thorough)?;
                }
            }
        }
    }

    /// Where the next `len` bytes go: behind the last ones if their host cluster has room, or goes
    /// on in the one after it; else to the start of a new one. Each host cluster that they touch
    /// has one more reference.
    fn pack(
        &self,
        tables: &mut Tables,
        writing: &mut Writing,
        len: u64,
        thorough: bool,
    ) -> Result<Result<u64, Blocked>> {
        let geometry = self.geometry;
        let mut behind = None;
        if let Some(at) = writing.packing {
            let cluster = geometry.index(at);
            let count = writing.refcounts.get(&self.host, cluster)?;
            // A refcount that is full is a cluster that is full.
            if count < writing.refcounts.most() {
                behind = Some((at, cluster, count));
            }
        }
        let fits = behind.filter(|(at, ..)| geometry.within(*at) + len <= geometry.cluster());
        let at = match (fits, behind) {
            (Some((at, cluster, count)), _) => {
                writing.refcounts.set(&self.host, cluster, count + 1)?;
                at
            }
            (None, behind) => {
                let new = match self.allocate(tables, writing, 1, thorough)? {
                    Ok(allocation) => allocation,
                    Err(blocked) => return Ok(Err(blocked)),
                };
                let (first, start) = (new.clusters.start, new.clusters.start * geometry.cluster());
                // So that what is read up to a sector's end is there.
                if new.fresh
                    && let Err(error) = self.host.zero(start, geometry.cluster())
                {
                    writing.drop_clusters(new.clusters);
                    return Err(error);
                }
                match behind {
                    Some((at, cluster, count)) if cluster + 1 == first => {
                        writing.refcounts.set(&self.host, cluster, count + 1)?;
                        at
                    }
                    _ => start,
                }
            }
        };
        let limit = Compressed::limit(geometry);
        if at + len > limit {
            writing.packing = None;
            writing.drop_clusters(geometry.span(at, len));
            return Err(self.full(limit));
        }
        let end = at + len;
        writing.packing = (geometry.within(end) != 0).then_some(end);
        Ok(Ok(at))
    }
}
