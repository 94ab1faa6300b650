//! What a driver sees of a disk.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::disk::Disk;
use super::request::{MAX_RANGE_SECTORS, MAX_RANGES, SECTOR};
use super::worker::Service;
use crate::threads::Kind;
use crate::virtio::device::{Activation, VirtioDevice, feature};
use crate::virtio::worker::Worker;

const QUEUE_SIZE: u16 = 256;
/// A chain has a header and a status beside its data.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Mass storage, SCSI: what other hosts say of their virtio disks.
const CLASS: u32 = 0x01_00_00;
/// Bytes of the device configuration up to the write-zeroes fields.
const CONFIG_LEN: usize = 60;

/// What has gone through a disk, for reports.
#[derive(Debug, Default)]
pub struct BlockStats {
    read: AtomicU64,
    written: AtomicU64,
    failures: AtomicU64,
}

impl BlockStats {
    /// Bytes that the guest has read.
    pub fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Bytes that the guest has written, zeroes by command not counted.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Requests that failed on the host.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Returns how many that makes.
    pub(super) fn add_failure(&self) -> u64 {
        self.failures
            .fetch_add(1, Ordering::Relaxed)
            .saturating_add(1)
    }

    pub(super) fn add_read(&self, bytes: u64) {
        self.read.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn add_written(&self, bytes: u64) {
        self.written.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// How a disk is offered.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The name of the disk's thread, such as `blk0`: at most 15 bytes of it are shown.
    pub name: String,
    /// Nobody needs the content after a crash, so writes of a driver that cannot flush are not
    /// made durable one by one.
    pub never_sync: bool,
}

/// A disk on the guest's bus.
pub struct Block {
    disk: Arc<dyn Disk>,
    options: Options,
    stats: Arc<BlockStats>,
    worker: Option<Worker>,
}

impl Block {
    /// Offers `disk`; `stats` counts what the guest moves.
    pub fn new(disk: Arc<dyn Disk>, options: Options, stats: Arc<BlockStats>) -> Self {
        Self {
            disk,
            options,
            stats,
            worker: None,
        }
    }
}

impl VirtioDevice for Block {
    fn id(&self) -> u16 {
        VIRTIO_ID_BLOCK as u16
    }

    fn class(&self) -> u32 {
        CLASS
    }

    fn features(&self) -> u64 {
        let always = feature(VIRTIO_BLK_F_FLUSH)
            | feature(VIRTIO_BLK_F_SEG_MAX)
            | feature(VIRTIO_BLK_F_BLK_SIZE)
            | feature(VIRTIO_BLK_F_TOPOLOGY);
        let access = match self.disk.geometry().read_only {
            true => feature(VIRTIO_BLK_F_RO),
            false => feature(VIRTIO_BLK_F_DISCARD) | feature(VIRTIO_BLK_F_WRITE_ZEROES),
        };
        always | access
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    /// `struct virtio_blk_config` (section 5.2.4).
    fn config(&self) -> Vec<u8> {
        let geometry = self.disk.geometry();
        let preferred = (u64::from(geometry.block_size) / SECTOR).max(1);
        let mut config = vec![0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(geometry.size / SECTOR).to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        // Logical blocks are sectors, whatever the image: a file system made elsewhere must
        // mount. What the image prefers is in the topology: its physical block (as a power of
        // two of sectors, at most the 4 KiB of a page) and its best unit of I/O.
        put(20, &(SECTOR as u32).to_le_bytes());
        put(24, &[preferred.ilog2().min(3) as u8]);
        put(26, &1_u16.to_le_bytes());
        put(28, &(preferred as u32).to_le_bytes());
        if !geometry.read_only {
            put(36, &MAX_RANGE_SECTORS.to_le_bytes());
            put(40, &(MAX_RANGES as u32).to_le_bytes());
            put(44, &(preferred as u32).to_le_bytes());
            put(48, &MAX_RANGE_SECTORS.to_le_bytes());
            put(52, &(MAX_RANGES as u32).to_le_bytes());
            put(56, &[1]);
        }
        config
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        let Some(mut queue) = activation.take_queue(0) else {
            return Ok(());
        };
        let flushes = activation.has(VIRTIO_BLK_F_FLUSH);
        let service = Service {
            disk: Arc::clone(&self.disk),
            memory: activation.memory,
            stats: Arc::clone(&self.stats),
            write_through: !flushes && !self.options.never_sync,
        };
        let link = activation.link;
        let work = move |stop| {
            if let Err(error) = service.run(&mut queue, &stop) {
                link.fail(&error);
            }
        };
        let name = self.options.name.clone();
        self.worker = Some(Worker::spawn(&*activation.threads, Kind::Disk, name, work)?);
        Ok(())
    }

    fn stop(&mut self) {
        self.worker = None;
    }
}
