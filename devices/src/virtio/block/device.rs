//! What a driver sees of a disk.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::disk::Disk;
use super::execute::Context;
use super::request::{MAX_RANGE_SECTORS, MAX_RANGES, SECTOR};
use super::ring::Blank;
use super::service::{self, Setup};
use super::stats::BlockStats;
use super::throttle::{Limits, Throttle};
use crate::threads::{Kind, Threads};
use crate::virtio::device::{Activation, VirtioDevice, feature};
use crate::virtio::link::DriverLink;
use crate::virtio::queue::VirtQueue;
use crate::virtio::worker::Worker;

/// Most queues that a disk can have.
pub const MAX_QUEUES: u16 = 16;

const QUEUE_SIZE: u16 = 256;
/// Rings a queue. Each serves until the device is reset: one is the driver's, one that of a kernel
/// which takes over from the first (kexec); the guest that goes on resetting is served by threads.
const RINGS: usize = 2;
/// A chain has a header and a status beside its data.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Mass storage, SCSI: what other hosts say of their virtio disks.
const CLASS: u32 = 0x01_00_00;
/// Bytes of the device configuration up to the write-zeroes fields.
const CONFIG_LEN: usize = 60;

/// Who moves a disk's bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// io_uring, or threads where the host refuses it.
    #[default]
    IoUring,
    /// Threads with blocking calls.
    Threads,
}

/// How a disk is offered.
#[derive(Clone, Debug)]
pub struct Options {
    /// The name of the disk's threads, such as `blk0`: at most 15 bytes of it are shown.
    pub name: String,
    /// Nobody needs the content after a crash: a flush does nothing, and writes of a driver that
    /// cannot flush are not made durable one by one.
    pub never_sync: bool,
    /// Queues, each with its own thread: 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Who moves the bytes.
    pub engine: Engine,
    /// How fast the disk may be.
    pub limits: Limits,
    /// The longest time that a queue's thread polls for the next request or completion before it
    /// sleeps. It polls when these come that soon only; zero: never.
    pub poll: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: String::new(),
            never_sync: false,
            queues: 1,
            engine: Engine::default(),
            limits: Limits::default(),
            poll: Duration::ZERO,
        }
    }
}

/// A disk on the guest's bus.
pub struct Block {
    disk: Arc<dyn Disk>,
    options: Options,
    stats: Arc<BlockStats>,
    throttle: Option<Arc<Mutex<Throttle>>>,
    rings: Vec<Blank>,
    workers: Vec<Worker>,
}

impl Block {
    /// Offers `disk`; `stats` counts what the guest moves. To be called before the process is
    /// confined: rings are made here and nowhere else.
    pub fn new(disk: Arc<dyn Disk>, options: Options, stats: Arc<BlockStats>) -> Self {
        let throttle = Throttle::new(options.limits, Instant::now());
        let wanted = match options.engine {
            Engine::IoUring => RINGS * usize::from(options.queues.clamp(1, MAX_QUEUES)),
            Engine::Threads => 0,
        };
        let rings: io::Result<_> = (0..wanted).map(|_| Blank::new()).collect();
        Self {
            rings: rings.inspect_err(service::refused).unwrap_or_default(),
            disk,
            options,
            stats,
            throttle: throttle.map(|throttle| Arc::new(Mutex::new(throttle))),
            workers: Vec::new(),
        }
    }

    fn queues(&self) -> u16 {
        self.options.queues.clamp(1, MAX_QUEUES)
    }

    /// Starts the thread of one queue.
    fn serve(
        &mut self,
        queue: VirtQueue,
        context: Context,
        threads: &Arc<dyn Threads>,
        link: Arc<DriverLink>,
    ) -> io::Result<Worker> {
        let name = self.options.name.clone();
        let setup = Setup {
            name: name.clone(),
            context,
            threads: Arc::clone(threads),
            stats: Arc::clone(&self.stats),
            throttle: self.throttle.clone(),
            poll: self.options.poll,
        };
        let ring = self.rings.pop();
        if ring.is_none() && self.options.engine == Engine::IoUring {
            tracing::debug!(name, "a disk's queue has no io_uring left");
        }
        Worker::spawn(&**threads, Kind::Disk, name, move |stop| {
            if let Err(error) = service::serve(&setup, ring, queue, &stop) {
                link.fail(&error);
            }
        })
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
        let queues = match self.queues() {
            1 => 0,
            _ => feature(VIRTIO_BLK_F_MQ),
        };
        always | access | queues
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queues().into()]
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
        put(34, &self.queues().to_le_bytes());
        if !geometry.read_only {
            put(36, &MAX_RANGE_SECTORS.to_le_bytes());
            put(40, &(MAX_RANGES as u32).to_le_bytes());
            put(
                44,
                &(geometry.discard_size / SECTOR as u32).max(1).to_le_bytes(),
            );
            put(48, &MAX_RANGE_SECTORS.to_le_bytes());
            put(52, &(MAX_RANGES as u32).to_le_bytes());
            put(56, &[1]);
        }
        config
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        let flushes = activation.has(VIRTIO_BLK_F_FLUSH);
        for index in 0..self.queues().into() {
            let Some(queue) = activation.take_queue(index) else {
                continue;
            };
            let context = Context {
                disk: Arc::clone(&self.disk),
                memory: activation.memory.clone(),
                never_sync: self.options.never_sync,
                write_through: !flushes && !self.options.never_sync,
            };
            let link = Arc::clone(&activation.link);
            let worker = self.serve(queue, context, &activation.threads, link)?;
            self.workers.push(worker);
        }
        Ok(())
    }

    fn stop(&mut self) {
        self.workers.clear();
    }
}
