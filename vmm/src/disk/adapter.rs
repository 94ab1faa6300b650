//! `cowshed-qcow`'s image as the disk of `cowshed-devices`.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use cowshed_devices::virtio::block::disk::{Disk, Extent, Geometry, Plan};
use cowshed_qcow::{Fill, Image};

use super::files::ALIGNMENT;
use crate::config::{self, Cache};
use crate::report::chain;

/// Largest block size that a guest is told: that of QEMU's default clusters. Guests take it as
/// the best unit of I/O, which bigger clusters are not.
const MAX_BLOCK_SIZE: u32 = 64 << 10;

/// An image on the guest's bus.
#[derive(Debug)]
pub(super) struct ImageDisk {
    image: Arc<Image>,
    geometry: Geometry,
    /// By file.
    alignment: Vec<u64>,
}

impl ImageDisk {
    /// `disk` is what was said of it beside the image.
    pub(super) fn new(image: Image, disk: &config::Disk) -> Self {
        let geometry = Geometry {
            size: image.size(),
            read_only: image.read_only(),
            block_size: image.cluster_size().clamp(512, MAX_BLOCK_SIZE),
            // A host gives back no less than a page.
            discard_size: image.subcluster_size().max(ALIGNMENT as u32),
            serial: disk.serial.clone().unwrap_or_default(),
        };
        let alignment = (0..image.depth()).map(|file| match disk.cache {
            Cache::None if file > 0 || !disk.has_throwaway() => ALIGNMENT,
            _ => 1,
        });
        let alignment = alignment.collect();
        Self {
            image: Arc::new(image),
            geometry,
            alignment,
        }
    }

    pub(super) fn image(&self) -> &Image {
        &self.image
    }

    fn plan(&self, plan: cowshed_qcow::Plan) -> Plan {
        match plan {
            cowshed_qcow::Plan::Slow => Plan::Slow,
            cowshed_qcow::Plan::Fast { extents: at, pin } => Plan::Fast(extents(at), Box::new(pin)),
            cowshed_qcow::Plan::Fill { extents: at, fill } => {
                let mut filling = Filling {
                    image: Arc::clone(&self.image),
                    fill: Some(fill),
                };
                Plan::Fill(extents(at), Box::new(move || filling.end(true)))
            }
        }
    }
}

impl Disk for ImageDisk {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn files(&self) -> Vec<BorrowedFd<'_>> {
        self.image.files()
    }

    fn alignment(&self, file: usize) -> u64 {
        self.alignment.get(file).copied().unwrap_or(ALIGNMENT)
    }

    fn plan_read(&self, offset: u64, len: u64, can_wait: bool) -> io::Result<Plan> {
        let plan = match can_wait {
            true => self.image.plan_read(offset, len),
            false => self.image.plan_read_at_once(offset, len),
        };
        Ok(self.plan(plan.map_err(whole)?))
    }

    fn plan_write(&self, offset: u64, len: u64, can_wait: bool) -> io::Result<Plan> {
        let plan = match can_wait {
            true => self.image.plan_write(offset, len),
            false => self.image.plan_write_at_once(offset, len),
        };
        Ok(self.plan(plan.map_err(whole)?))
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.image.read(offset, buf).map_err(whole)
    }

    fn write(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.image.write(offset, buf).map_err(whole)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.image.write_zeroes(offset, len, unmap).map_err(whole)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.image.discard(offset, len).map_err(whole)
    }

    fn flush(&self) -> io::Result<()> {
        self.image.flush().map_err(whole)
    }

    fn needs_sync_only(&self) -> bool {
        self.image.needs_sync_only()
    }

    fn synced(&self, result: io::Result<()>) -> io::Result<()> {
        self.image.synced(result).map_err(whole)
    }
}

/// The device logs an error in one line: its causes must be in it.
fn whole(error: cowshed_qcow::Error) -> io::Error {
    io::Error::new(error.kind(), chain(&error))
}

/// A write to clusters that nothing names yet. Dropped, it gives them back.
struct Filling {
    image: Arc<Image>,
    fill: Option<Fill>,
}

impl Filling {
    fn end(&mut self, written: bool) -> io::Result<()> {
        match self.fill.take() {
            Some(fill) => self.image.commit(fill, written).map_err(whole),
            None => Ok(()),
        }
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        // To give back changes nothing in the file.
        let _ = self.end(false);
    }
}

fn extents(extents: Vec<cowshed_qcow::Extent>) -> Vec<Extent> {
    let extent = |extent| match extent {
        cowshed_qcow::Extent::File { file, offset, len } => Extent::File { file, offset, len },
        cowshed_qcow::Extent::Zero { len } => Extent::Zero { len },
    };
    extents.into_iter().map(extent).collect()
}
