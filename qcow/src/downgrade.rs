//! From version 3 to version 2: what that does not have must not be there, or is made otherwise.

use std::ops::Range;

use crate::alone::Alone;
use crate::compress::Compression;
use crate::create::Preallocation;
use crate::entry::{Mapping, Standard};
use crate::error::Result;
use crate::extension::BITMAPS;
use crate::header::DATA_FILE;
use crate::image::Image;
use crate::layer::Layer;
use crate::qcow2::Qcow2;
use crate::snapshot::table::Table;
use crate::snapshot::tree::Tree;

impl Image {
    /// Whether the image uses nothing that version 2 cannot say.
    pub(crate) fn check_downgrade(&self, qcow2: &Qcow2) -> Result<()> {
        self.check_range(0, 0)?;
        let (header, file_len) = {
            let tables = &qcow2.state().tables;
            (tables.header.clone(), tables.file_len)
        };
        let refuse = |what: &str, advice: &str| {
            Err(qcow2.cannot_change(format!("version 2 has no {what}: {advice}")))
        };
        if header.geometry.is_extended() {
            return refuse("extended L2 entries", "convert the image");
        }
        if header.compression != Compression::Zlib {
            return refuse("compression but zlib", "convert the image");
        }
        if header.incompatible & DATA_FILE != 0 {
            return refuse("data file", "convert the image");
        }
        if header.extensions.get(BITMAPS).is_some() {
            return refuse("bitmaps", "remove them first");
        }
        for entry in Table::read(&qcow2.host, &header, file_len)?.entries {
            let described = entry.describe(header.size);
            let (name, size) = (&described.name, described.disk_size);
            if size != header.size || described.vm_state_size > u32::MAX.into() {
                let what = format!("snapshot like {name:?}, of another size");
                return refuse(&what, "delete it first");
            }
            let l1 = qcow2.host.read_l1(entry.l1_offset, entry.l1_entries)?;
            let mut zeros = false;
            Tree::new(qcow2, entry.l1_offset, &l1, file_len)?.rewrite(
                qcow2,
                &mut |at, entry| {
                    zeros |= is_zero(qcow2.decode(entry, at, file_len)?);
                    Ok(entry.descriptor)
                },
            )?;
            // They could be made otherwise, as the disk's are. QEMU 7.2 tries, and zeroes clusters
            // that the snapshot shares with the disk.
            if zeros {
                let what = format!("zero clusters, which the snapshot {name:?} has");
                return refuse(&what, "delete it first");
            }
        }
        Ok(())
    }

    pub(crate) fn downgrade(&self, qcow2: &Qcow2) -> Result<()> {
        let below = self.layers.get(1).map_or(0, Layer::size);
        let alone = qcow2.alone()?;
        alone.expand_zeros(qcow2.geometry.clusters(below))?;
        drop(alone);
        qcow2.close()?;
        qcow2.rewrite_header(|header| {
            header.version = 2;
            (header.incompatible, header.compatible, header.autoclear) = (0, 0, 0);
            header.tail.clear();
        })
    }
}

impl Alone<'_> {
    /// Replaces zero clusters: by zeros before the cluster `below`, where a backing file has bytes.
    fn expand_zeros(&self, below: u64) -> Result<()> {
        let qcow2 = self.qcow2;
        let geometry = qcow2.geometry;
        let tables = qcow2.state().tables.l1.len() as u64;
        for index in 0..tables {
            let first = index * geometry.l2_entries();
            let covers = geometry.l2_entries() * geometry.cluster();
            let mut zeros: Vec<Range<u64>> = Vec::new();
            let mut cluster = first;
            let mut state = qcow2.state();
            qcow2.mappings(
                &mut state.tables,
                first * geometry.cluster(),
                covers,
                &mut |_, len, mapping| {
                    let next = cluster + geometry.clusters(len);
                    if is_zero(mapping) {
                        match zeros.last_mut().filter(|run| run.end == cluster) {
                            Some(run) => run.end = next,
                            None => zeros.push(cluster..next),
                        }
                    }
                    cluster = next;
                    true
                },
            )?;
            drop(state);
            for run in zeros {
                let border = below.clamp(run.start, run.end);
                if border > run.start && !qcow2.data.is_plain() {
                    let reason = "version 2 has no zero clusters, and encrypted ones hide a \
                                  backing file here: convert the image";
                    return Err(qcow2.cannot_change(reason.into()));
                }
                self.preallocate(run.start..border, border, Preallocation::Metadata)?;
                self.clear(border..run.end, 0)?;
            }
        }
        Ok(())
    }
}

fn is_zero(mapping: Mapping) -> bool {
    matches!(mapping, Mapping::Standard(Standard { zero, .. }) if zero != 0)
}
