//! A driver for tests: it drives a device through its PCI function's registers, with rings in
//! real guest memory, and obeys the notification rules, so that a lost wakeup hangs a test.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::Memory;
use super::device::{VirtioDevice, feature};
use super::pci::VirtioPci;
use crate::pci::PciFunction;
use crate::pci::msix::{MsiMessage, MsiRouter};
use crate::poll;
use crate::threads::{Kind, Threads};

/// Each of the two regions of guest memory: they follow each other in the guest only.
const REGION: u64 = 8 << 20;
/// The first address that is no memory.
pub(crate) const END: u64 = 2 * REGION;
/// Where the regions meet.
pub(crate) const SEAM: u64 = REGION;
const RINGS: u64 = 0x1_0000;
const HEAP: u64 = 0x40_0000;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;
pub(crate) const VERSION_1: u64 = feature(VIRTIO_F_VERSION_1);
pub(crate) const EVENT_IDX: u64 = feature(VIRTIO_RING_F_EVENT_IDX);

/// Keeps the events of attached vectors, as a hypervisor does.
#[derive(Default)]
pub(crate) struct Router(Mutex<HashMap<u16, EventFd>>);

impl MsiRouter for Router {
    fn attach(&self, vector: u16, event: &EventFd, _: MsiMessage) -> io::Result<()> {
        self.0.lock().unwrap().insert(vector, event.try_clone()?);
        Ok(())
    }
    fn detach(&self, vector: u16, _: &EventFd) -> io::Result<()> {
        self.0.lock().unwrap().remove(&vector);
        Ok(())
    }
}

/// Threads that may do anything.
pub(crate) struct Plain;

impl Threads for Plain {
    fn spawn(
        &self,
        _: Kind,
        name: String,
        work: Box<dyn FnOnce() + Send>,
    ) -> io::Result<JoinHandle<()>> {
        std::thread::Builder::new().name(name).spawn(work)
    }
}

impl Router {
    fn event(&self, vector: u16) -> EventFd {
        self.0.lock().unwrap()[&vector].try_clone().unwrap()
    }
}

/// The driver's side of a queue.
#[derive(Clone, Copy)]
struct Ring {
    size: u16,
    free: u16,
    available: u16,
    kicked: u16,
    seen: u16,
}

/// The driver.
pub(crate) struct Driver {
    pub(crate) function: Arc<VirtioPci>,
    pub(crate) memory: Memory,
    router: Arc<Router>,
    rings: Vec<Ring>,
    heap: u64,
    event_idx: bool,
}

impl Driver {
    pub(crate) fn new(device: Box<dyn VirtioDevice>) -> Self {
        let regions = [0, REGION].map(|base| (GuestAddress(base), REGION as usize));
        let memory = Memory::from_ranges(&regions).unwrap();
        let router = Arc::<Router>::default();
        let function =
            VirtioPci::new(device, memory.clone(), router.clone(), Arc::new(Plain)).unwrap();
        Self {
            function,
            memory,
            router,
            rings: Vec::new(),
            heap: HEAP,
            event_idx: false,
        }
    }

    pub(crate) fn get<const N: usize>(&self, offset: u64) -> u64 {
        let mut data = [0; 8];
        self.function.bar_read(0, offset, &mut data[..N]);
        u64::from_le_bytes(data)
    }

    pub(crate) fn set<const N: usize>(&self, offset: u64, value: u64) {
        self.function
            .bar_write(0, offset, &value.to_le_bytes()[..N]);
    }

    pub(crate) fn status(&self) -> u8 {
        self.get::<1>(20) as u8
    }

    pub(crate) fn offered(&self) -> u64 {
        self.set::<4>(0, 0);
        let low = self.get::<4>(4);
        self.set::<4>(0, 1);
        low | self.get::<4>(4) << 32
    }

    /// Resets the device and agrees on `features`; returns the status.
    pub(crate) fn negotiate(&mut self, features: u64) -> u8 {
        self.set::<1>(20, 0);
        assert_eq!(self.status(), 0);
        self.set::<1>(20, 3);
        for half in 0..2 {
            self.set::<4>(8, half);
            self.set::<4>(12, features >> (32 * half) & 0xffff_ffff);
        }
        self.set::<1>(20, 0xb);
        self.event_idx = features & EVENT_IDX != 0;
        self.status()
    }

    /// Enables every queue, each with its vector, at most `size` large.
    pub(crate) fn set_up_queues(&mut self, size: u16) {
        let queues = self.get::<2>(18);
        self.rings.clear();
        for index in 0..queues {
            self.set::<2>(22, index);
            let size = size.min(self.get::<2>(24) as u16);
            self.set::<2>(24, u64::from(size));
            let base = Self::base(index as usize);
            for page in 0..3 {
                self.memory
                    .write_slice(&[0; 0x1000], GuestAddress(base + page * 0x1000))
                    .unwrap();
                self.set::<8>(32 + page * 8, base + page * 0x1000);
            }
            self.set::<2>(26, index + 1);
            self.set::<2>(28, 1);
            self.rings.push(Ring {
                size,
                free: 0,
                available: 0,
                kicked: 0,
                seen: 0,
            });
            self.unmask(index as u16 + 1);
        }
        self.set::<2>(16, 0);
        self.unmask(0);
        self.enable_msix();
    }

    pub(crate) fn enable_msix(&self) {
        let mut at = self.function.config_read(13) as u16 & 0xff;
        loop {
            let header = self.function.config_read(at / 4);
            if header & 0xff == 0x11 {
                break self
                    .function
                    .config_write(at + 2, &0x8000_u16.to_le_bytes());
            }
            at = (header >> 8) as u16 & 0xff;
        }
    }

    fn unmask(&self, vector: u16) {
        self.set::<4>(0x1000 + u64::from(vector) * 16 + 12, 0);
    }

    /// Does everything up to DRIVER_OK with the ring features and `features`.
    pub(crate) fn start(&mut self, features: u64) {
        assert_eq!(self.negotiate(features | VERSION_1) & 8, 8);
        self.set_up_queues(64);
        self.set::<1>(20, 0xf);
        assert_eq!(self.status(), 0xf);
    }

    /// Guest memory for `len` bytes; whole pages are aligned.
    pub(crate) fn alloc(&mut self, len: usize) -> u64 {
        let alignment = if len < 4096 { 16 } else { 4096 };
        let address = self.heap.next_multiple_of(alignment);
        self.heap = address + len as u64;
        address
    }

    /// Guest memory with `data` in it.
    pub(crate) fn put(&mut self, data: &[u8]) -> u64 {
        let address = self.alloc(data.len());
        self.memory
            .write_slice(data, GuestAddress(address))
            .unwrap();
        address
    }

    pub(crate) fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .unwrap();
        data
    }

    fn base(queue: usize) -> u64 {
        RINGS + queue as u64 * 0x4000
    }

    /// Writes one descriptor.
    pub(crate) fn descriptor(
        &self,
        queue: usize,
        index: u16,
        (address, len, flags, next): (u64, u32, u16, u16),
    ) {
        self.raw_descriptor(
            Self::base(queue) + u64::from(index) * 16,
            (address, len, flags, next),
        );
    }

    pub(crate) fn raw_descriptor(
        &self,
        at: u64,
        (address, len, flags, next): (u64, u32, u16, u16),
    ) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Makes the chain that begins at `head` available, whatever it is.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = Self::base(queue) + 0x1000 + 4 + 2 * u64::from(ring.available % ring.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        ring.available = ring.available.wrapping_add(1);
        let available = ring.available;
        self.set_available(queue, available);
    }

    pub(crate) fn set_available(&self, queue: usize, index: u16) {
        let at = GuestAddress(Self::base(queue) + 0x1000 + 2);
        self.memory.store(index, at, Ordering::Release).unwrap();
    }

    /// Adds a chain of (address, length, flags) and makes it available.
    pub(crate) fn add(&mut self, queue: usize, pieces: &[(u64, u32, u16)]) -> u16 {
        let ring = &mut self.rings[queue];
        let (head, size) = (ring.free, ring.size);
        ring.free = (head + pieces.len() as u16) % size;
        for (n, &(address, len, flags)) in pieces.iter().enumerate() {
            let index = (head + n as u16) % size;
            let more = if n + 1 < pieces.len() { NEXT } else { 0 };
            self.descriptor(
                queue,
                index,
                (address, len, flags | more, (index + 1) % size),
            );
        }
        self.offer(queue, head);
        head
    }

    /// Rings the doorbell if the device wants to know.
    pub(crate) fn kick(&mut self, queue: usize) {
        fence(Ordering::SeqCst);
        let ring = &mut self.rings[queue];
        let used = Self::base(queue) + 0x2000;
        let wanted = match self.event_idx {
            true => {
                let at = GuestAddress(used + 4 + 8 * u64::from(ring.size));
                let event: u16 = self.memory.load(at, Ordering::Relaxed).unwrap();
                let (new, old) = (ring.available, ring.kicked);
                new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
            }
            false => {
                self.memory
                    .load::<u16>(GuestAddress(used), Ordering::Relaxed)
                    .unwrap()
                    & 1
                    == 0
            }
        };
        ring.kicked = ring.available;
        if wanted {
            self.set::<2>(0x400 + 4 * queue as u64, queue as u64);
        }
    }

    /// How many chains the device has given back since the start.
    pub(crate) fn used(&self, queue: usize) -> u16 {
        let at = GuestAddress(Self::base(queue) + 0x2000 + 2);
        self.memory.load(at, Ordering::Acquire).unwrap()
    }

    /// Waits for the next chain that the device gives back: its head and written length.
    pub(crate) fn next_used(&mut self, queue: usize) -> (u16, u32) {
        let Ring { seen, size, .. } = self.rings[queue];
        let event_at = Self::base(queue) + 0x1000 + 4 + 2 * u64::from(size);
        self.memory
            .store(seen, GuestAddress(event_at), Ordering::Release)
            .unwrap();
        fence(Ordering::SeqCst);
        while self.used(queue) == seen {
            self.wait_vector(queue as u16 + 1);
        }
        self.rings[queue].seen = seen.wrapping_add(1);
        let slot = Self::base(queue) + 0x2000 + 4 + 8 * u64::from(seen % size);
        let [head, len]: [u32; 2] = self.memory.read_obj(GuestAddress(slot)).unwrap();
        (head as u16, len)
    }

    /// Kicks, and waits for that many chains.
    pub(crate) fn run(&mut self, queue: usize, count: usize) -> Vec<(u16, u32)> {
        self.kick(queue);
        (0..count).map(|_| self.next_used(queue)).collect()
    }

    /// Waits for an interrupt.
    pub(crate) fn wait_vector(&self, vector: u16) {
        let event = self.router.event(vector);
        poll::wait(&[&event], 20_000).unwrap();
        event.read().expect("the device interrupts");
    }

    /// How often a vector was raised since it was waited for.
    pub(crate) fn interrupts(&self, vector: u16) -> u64 {
        self.router.event(vector).read().unwrap_or(0)
    }

    /// Lets the device come to what was offered: until it has given back `count` chains or
    /// given up, or for a while if it does neither.
    pub(crate) fn settle(&self, queue: usize, count: u16) {
        for _ in 0..1000 {
            if self.used(queue) == count || self.status() & 0x40 != 0 {
                return;
            }
            std::thread::yield_now();
        }
    }

    /// Waits until the device says that it needs a reset.
    pub(crate) fn wait_for_needs_reset(&self) {
        while self.status() & 0x40 == 0 {
            self.wait_vector(0);
        }
    }
}
