//! The VM state: guest offsets behind the disk, from the first L1 entry on that the disk does not
//! need.

use std::ops::Range;

use crate::content::Content;
use crate::error::{Error, Result};
use crate::header::MAX_L1_BYTES;
use crate::image::Image;
use crate::layer::Layer;
use crate::qcow2::{Load, Place, Qcow2};

impl Image {
    /// Writes `buf` at `offset` of the VM state, for the next
    /// [`create_snapshot`](Self::create_snapshot) to take. One caller at a time, and none that
    /// resizes the disk meanwhile.
    ///
    /// ```
    /// # use std::{path::Path, sync::Arc};
    /// # use cowshed_qcow::*;
    /// # fn main() -> Result<()> {
    /// # let file = Arc::new(MemoryStorage::default());
    /// # create(Path::new("disk"), file.clone(), &CreateOptions::new(1 << 20))?;
    /// # let name = Path::new("disk");
    /// let disk = Image::open_over(name, file.clone(), &OpenOptions::new(Format::Qcow2), None)?;
    /// disk.write_vm_state(0, b"registers")?;
    /// let vm_state_size = 9;
    /// disk.create_snapshot(&NewSnapshot { vm_state_size, ..NewSnapshot::new("running") })?;
    ///
    /// let snapshot = Some(Selector::Name("running".into()));
    /// let options = OpenOptions { read_only: true, snapshot, ..OpenOptions::new(Format::Qcow2) };
    /// let then = Image::open_over(name, file, &options, None)?;
    /// let mut state = [0; 9];
    /// then.read_vm_state(0, &mut state)?;
    /// assert_eq!(&state, b"registers");
    /// # Ok(())
    /// # }
    /// ```
    pub fn write_vm_state(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let qcow2 = self.with_snapshots()?;
        let place = qcow2.vm_state(offset, buf.len() as u64)?;
        let geometry = qcow2.geometry;
        let entries = geometry.l1_entries(place.end);
        if entries > qcow2.state().tables.l1.len() as u64 {
            // Half as many again, because each time the table moves.
            let per_cluster = geometry.cluster() / 8;
            let roomy = (entries + entries / 2).next_multiple_of(per_cluster);
            qcow2.alone()?.grow_l1(roomy.min(MAX_L1_BYTES / 8))?;
        }
        let cluster = geometry.cluster() as usize;
        let (mut at, mut rest) = (place.start, buf);
        while !rest.is_empty() {
            let within = geometry.within(at) as usize;
            let whole = rest.len() - rest.len() % cluster;
            let len = if within == 0 && whole > 0 {
                whole
            } else {
                rest.len().min(cluster - within)
            };
            let (part, after) = rest.split_at(len);
            if len == whole {
                self.write_through(at, Content::Bytes(part))?;
            } else {
                // Beside a part of a cluster only the disk's old bytes would be kept.
                let mut around = vec![0; cluster];
                let start = geometry.floor(at);
                self.read_behind(qcow2, start, &mut around)?;
                if let Some(place) = around.get_mut(within..within + len) {
                    place.copy_from_slice(part);
                }
                self.write_through(start, Content::Bytes(&around))?;
            }
            (at, rest) = (at + len as u64, after);
        }
        Ok(())
    }

    /// Fills `buf` from `offset` of the VM state: that of the snapshot that was opened or applied,
    /// or what was written since. Where nothing was written it is zeros.
    pub fn read_vm_state(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        match self.layers.first() {
            Some(Layer::Qcow2(qcow2)) => {
                let place = qcow2.vm_state(offset, buf.len() as u64)?;
                let _pin = self.pin();
                self.read_behind(qcow2, place.start, buf)
            }
            _ => self.with_snapshots().map(drop),
        }
    }

    /// Reads what the top image has at a guest offset, behind the disk.
    fn read_behind(&self, qcow2: &Qcow2, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut runs = Vec::new();
        qcow2.resolve(offset, buf.len() as u64, Load::Now, &mut runs)?;
        let (mut at, mut rest) = (offset, buf);
        for run in runs {
            let (part, after) = rest.split_at_mut(run.len as usize);
            match run.place {
                Place::Data(host) => qcow2.data.read(at, host, part)?,
                Place::Compressed(place, within) => {
                    self.decompressed.read(0, qcow2, place, within, part)?;
                }
                Place::Zero | Place::Below => part.fill(0),
            }
            (at, rest) = (at + run.len, after);
        }
        Ok(())
    }
}

impl Qcow2 {
    /// The guest offsets of a range of the VM state, if an L1 table reaches them.
    fn vm_state(&self, offset: u64, len: u64) -> Result<Range<u64>> {
        let covers = self.geometry.l2_entries() * self.geometry.cluster();
        let start = self.geometry.l1_entries(self.size()) * covers;
        let size = (MAX_L1_BYTES / 8 * covers).saturating_sub(start);
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(start + offset..start + end),
            _ => Err(Error::OutOfRange { offset, len, size }),
        }
    }
}
