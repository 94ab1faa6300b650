//! A machine without processors: memory, a PCI function, and what the device needs of its host.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread::JoinHandle;

use cowshed_devices::pci::PciFunction;
use cowshed_devices::pci::msix::{MsiMessage, MsiRouter};
use cowshed_devices::threads::{Kind, Threads};
use cowshed_devices::virtio::Memory;
use cowshed_devices::virtio::block::disk::{Disk, Extent, Geometry, Plan};
use cowshed_devices::virtio::block::{Block, BlockStats, Options};
use cowshed_devices::virtio::device::VirtioDevice;
use cowshed_devices::virtio::pci::VirtioPci;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

/// Each of the two regions of memory, which follow each other in the guest only.
const REGION: u64 = 64 << 10;
/// Bytes of memory.
pub(crate) const MEMORY: u64 = 2 * REGION;
/// Bytes of the disk.
pub(crate) const DISK: u64 = 64 << 10;
/// Every second cluster of the disk is read and written by way of a buffer.
const CLUSTER: u64 = 4 << 10;

/// Fields of the common configuration (virtio 1.2, section 4.1.4.3): offset and size in bytes.
pub(crate) const COMMON: [(u64, usize); 17] = [
    (0, 4),
    (4, 4),
    (8, 4),
    (12, 4),
    (16, 2),
    (18, 2),
    (20, 1),
    (21, 1),
    (22, 2),
    (24, 2),
    (26, 2),
    (28, 2),
    (30, 2),
    (32, 8),
    (40, 8),
    (48, 8),
    (56, 2),
];
/// The feature bit that modern drivers agree on.
const VERSION_1: u64 = 1 << 32;

/// Interrupts go nowhere.
struct Nowhere;

impl MsiRouter for Nowhere {
    fn attach(&self, _: u16, _: &EventFd, _: MsiMessage) -> io::Result<()> {
        Ok(())
    }

    fn detach(&self, _: u16, _: &EventFd) -> io::Result<()> {
        Ok(())
    }
}

/// Threads that may do anything.
struct Unconfined;

impl Threads for Unconfined {
    fn spawn(
        &self,
        _: Kind,
        name: String,
        work: Box<dyn FnOnce() + Send>,
    ) -> io::Result<JoinHandle<()>> {
        std::thread::Builder::new().name(name).spawn(work)
    }
}

/// A disk in memory, half of whose clusters are fast.
struct MemoryDisk {
    geometry: Geometry,
    file: File,
}

impl MemoryDisk {
    fn plan(offset: u64, len: u64) -> Plan {
        let clusters = offset / CLUSTER..(offset + len).div_ceil(CLUSTER);
        if clusters.clone().any(|cluster| cluster % 2 == 1) {
            return Plan::Slow;
        }
        let extent = Extent::File {
            file: 0,
            offset,
            len,
        };
        Plan::Fast(vec![extent], Box::new(()))
    }
}

impl Disk for MemoryDisk {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn files(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.file.as_fd()]
    }

    fn plan_read(&self, offset: u64, len: u64, _: bool) -> io::Result<Plan> {
        Ok(Self::plan(offset, len))
    }

    fn plan_write(&self, offset: u64, len: u64, _: bool) -> io::Result<Plan> {
        Ok(Self::plan(offset, len))
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        assert!(offset + len <= DISK, "{len} bytes at {offset}");
        self.write(offset, &vec![0; len as usize])
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A block device with a disk of [`DISK`] bytes.
pub(crate) fn block(read_only: bool) -> Box<dyn VirtioDevice> {
    let file =
        File::from(rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(DISK).unwrap();
    let disk = MemoryDisk {
        geometry: Geometry {
            size: DISK,
            read_only,
            block_size: CLUSTER as u32,
            discard_size: CLUSTER as u32,
            serial: "fuzz".into(),
        },
        file,
    };
    Box::new(Block::new(
        Arc::new(disk),
        Options::default(),
        Arc::<BlockStats>::default(),
    ))
}

/// The machine.
pub(crate) struct Guest {
    pub(crate) memory: Memory,
    pub(crate) function: Arc<VirtioPci>,
}

impl Guest {
    pub(crate) fn new(device: Box<dyn VirtioDevice>) -> Self {
        let regions = [0, REGION].map(|base| (GuestAddress(base), REGION as usize));
        let memory = Memory::from_ranges(&regions).unwrap();
        let function = VirtioPci::new(
            device,
            memory.clone(),
            Arc::new(Nowhere),
            Arc::new(Unconfined),
        )
        .unwrap();
        Guest { memory, function }
    }

    pub(crate) fn read(&self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.function.bar_read(0, offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    pub(crate) fn write(&self, offset: u64, len: usize, value: u64) {
        self.function
            .bar_write(0, offset, &value.to_le_bytes()[..len]);
    }

    /// Writes to memory, as far as there is some.
    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        let _ = self.memory.write(bytes, GuestAddress(address));
    }

    /// What a driver does first: all features of which `refused` has no bit, every queue, of at
    /// most `size`, with its three rings a quarter of `each` bytes apart from `rings` on.
    pub(crate) fn start(&self, refused: u64, size: u16, rings: u64, each: u64) {
        self.write(20, 1, 0);
        self.write(20, 1, 3);
        for half in 0..2 {
            self.write(0, 4, half);
            self.write(8, 4, half);
            let wanted = (!refused | VERSION_1) >> (32 * half);
            let offered = self.read(4, 4);
            self.write(12, 4, offered & wanted);
        }
        self.write(20, 1, 0xb);
        for queue in 0..self.read(18, 2) {
            self.write(22, 2, queue);
            let most = self.read(24, 2);
            self.write(24, 2, most.min(u64::from(size)));
            for part in 0..3 {
                self.write(32 + part * 8, 8, rings + queue * each + part * (each / 4));
            }
            self.write(26, 2, queue + 1);
            self.write(28, 2, 1);
        }
        self.write(20, 1, 0xf);
    }

    /// Whether the device waits for a reset.
    pub(crate) fn needs_reset(&self) -> bool {
        self.read(20, 1) & 0x40 != 0
    }

    /// Ends what the device still does.
    pub(crate) fn stop(&self) {
        self.function.stop();
    }

    /// Rings a queue's doorbell.
    pub(crate) fn kick(&self, queue: u64) {
        self.write(0x400 + queue * 4, 2, queue);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop();
    }
}
