//! What a device tells its driver beside the queues: interrupts, configuration changes, and
//! that it cannot go on.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET};
use vmm_sys_util::eventfd::EventFd;

use crate::rarely::Rarely;

/// The vector that stands for "no interrupt".
pub const NO_VECTOR: u16 = 0xffff;

const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const ISR_QUEUE: u8 = 1 << 0;
const ISR_CONFIG: u8 = 1 << 1;

/// State that the transport (on vCPU threads) and the device's threads share.
pub struct DriverLink {
    /// The virtio device ID, for the log.
    device: u16,
    events: Arc<[EventFd]>,
    status: AtomicU8,
    isr: AtomicU8,
    generation: AtomicU8,
    failures: Rarely,
    config_vector: AtomicU16,
    queue_vectors: Box<[AtomicU16]>,
}

impl DriverLink {
    /// A link of a device with that ID and `queues` queues, which signals `events`, one a vector.
    pub(super) fn new(device: u16, queues: usize, events: Arc<[EventFd]>) -> Self {
        Self {
            device,
            events,
            status: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            failures: Rarely::new(),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        }
    }

    /// Interrupts the driver: queue `index` has used buffers.
    pub fn interrupt_queue(&self, index: usize) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
        self.signal(self.queue_vector(index));
    }

    /// Interrupts the driver: the device configuration has changed.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.interrupt_config();
    }

    /// Tells the driver that the device does nothing more until it is reset, because of what
    /// the driver did or because the host cannot go on. Of many reasons a few are logged: a
    /// driver can reset and fail as often as it likes.
    pub fn fail(&self, reason: &dyn Display) {
        if let Some(count) = self.failures.count() {
            let device = self.device;
            tracing::warn!(device, %reason, count, "a virtio device needs a reset");
        }
        if self.status.fetch_or(NEEDS_RESET, Ordering::SeqCst) & DRIVER_OK != 0 {
            self.interrupt_config();
        }
    }

    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn add_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::SeqCst);
    }

    /// Reading the interrupt status acknowledges it.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::SeqCst)
    }

    /// Sets the vector of configuration changes; one that does not exist becomes "none".
    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector
            .store(self.existing(vector), Ordering::SeqCst);
    }

    pub(super) fn queue_vector(&self, index: usize) -> u16 {
        self.queue_vectors
            .get(index)
            .map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    /// Sets the vector of queue `index`; one that does not exist becomes "none".
    pub(super) fn set_queue_vector(&self, index: usize, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(index) {
            slot.store(self.existing(vector), Ordering::SeqCst);
        }
    }

    /// Back to what it was at the beginning, when no thread of the device runs. The generation
    /// goes on counting, so that a stale one is never taken for current.
    pub(super) fn reset(&self) {
        self.isr.store(0, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.status.store(0, Ordering::SeqCst);
    }

    fn interrupt_config(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        self.signal(self.config_vector());
    }

    fn signal(&self, vector: u16) {
        if let Some(event) = self.events.get(usize::from(vector)) {
            // Fails only when the counter is full, and then the signal is there already.
            let _ = event.write(1);
        }
    }

    fn existing(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.events.len() {
            vector
        } else {
            NO_VECTOR
        }
    }
}
