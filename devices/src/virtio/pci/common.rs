//! The common configuration structure (virtio 1.2, section 4.1.4.3): features, status, queues.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::layout::COMMON_LEN;
use crate::threads::Threads;
use crate::virtio::Memory;
use crate::virtio::device::{Activation, VirtioDevice, feature};
use crate::virtio::link::DriverLink;
use crate::virtio::queue::VirtQueue;

const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
/// What transport and rings offer beside the device's own features.
const RING_FEATURES: u64 = feature(VIRTIO_F_VERSION_1)
    | feature(VIRTIO_RING_F_EVENT_IDX)
    | feature(VIRTIO_RING_F_INDIRECT_DESC);

/// What the driver has set up. Plain data.
#[derive(Clone, Debug)]
struct State {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueState>,
}

impl State {
    fn new(queue_sizes: &[u16]) -> Self {
        let queue = |&size: &u16| QueueState {
            max_size: size,
            size,
            ..QueueState::default()
        };
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(queue).collect(),
        }
    }
}

/// The registers and the device that they control.
pub(super) struct Common {
    state: State,
    device: Box<dyn VirtioDevice>,
    queue_sizes: Vec<u16>,
    memory: Memory,
    link: Arc<DriverLink>,
    doorbells: Arc<[EventFd]>,
    threads: Arc<dyn Threads>,
}

impl Common {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        queue_sizes: Vec<u16>,
        memory: Memory,
        link: Arc<DriverLink>,
        doorbells: Arc<[EventFd]>,
        threads: Arc<dyn Threads>,
    ) -> Self {
        let state = State::new(&queue_sizes);
        Self {
            state,
            device,
            queue_sizes,
            memory,
            link,
            doorbells,
            threads,
        }
    }

    /// The device configuration.
    pub(super) fn device_config(&self) -> Vec<u8> {
        self.device.config()
    }

    /// Ends the device's work.
    pub(super) fn stop(&mut self) {
        self.device.stop();
    }

    /// The structure as the driver reads it now.
    pub(super) fn registers(&self) -> [u8; COMMON_LEN as usize] {
        let state = &self.state;
        let none = QueueState::default();
        let selected = usize::from(state.queue_select);
        let queue = state.queues.get(selected).unwrap_or(&none);
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let mut registers = [0; COMMON_LEN as usize];
        let mut put =
            |at: usize, bytes: &[u8]| registers[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &state.device_feature_select.to_le_bytes());
        put(
            4,
            &half(self.offered(), state.device_feature_select).to_le_bytes(),
        );
        put(8, &state.driver_feature_select.to_le_bytes());
        put(
            12,
            &half(state.driver_features, state.driver_feature_select).to_le_bytes(),
        );
        put(16, &self.link.config_vector().to_le_bytes());
        put(18, &(state.queues.len() as u16).to_le_bytes());
        put(20, &[self.link.status(), self.link.generation()]);
        put(22, &state.queue_select.to_le_bytes());
        put(24, &queue.size.to_le_bytes());
        put(26, &self.link.queue_vector(selected).to_le_bytes());
        put(28, &u16::from(queue.ready).to_le_bytes());
        // The doorbell's place: queue n has the n-th. Meaningless for a queue that is not there.
        put(30, &state.queue_select.to_le_bytes());
        put(32, &queue.desc_table.to_le_bytes());
        put(40, &queue.avail_ring.to_le_bytes());
        put(48, &queue.used_ring.to_le_bytes());
        registers
    }

    /// Takes a write of one register, or one half of a 64-bit one. Returns true if it reset
    /// the device.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        match (offset, data) {
            (20, &[status]) => return self.set_status(status),
            (16, &[a, b]) => self.link.set_config_vector(u16::from_le_bytes([a, b])),
            (22, &[a, b]) => self.state.queue_select = u16::from_le_bytes([a, b]),
            (24 | 26 | 28, &[a, b]) => self.set_queue(offset, u16::from_le_bytes([a, b])),
            (_, &[a, b, c, d]) => self.write_u32(offset, u32::from_le_bytes([a, b, c, d])),
            (32 | 40 | 48, &[a, b, c, d, e, f, g, h]) => {
                self.write_u32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_u32(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        false
    }

    fn offered(&self) -> u64 {
        self.device.features() | RING_FEATURES
    }

    fn write_u32(&mut self, offset: u64, value: u32) {
        let status = self.link.status();
        let state = &mut self.state;
        match offset {
            0 => state.device_feature_select = value,
            8 => state.driver_feature_select = value,
            12 if status & FEATURES_OK == 0 => match state.driver_feature_select {
                0 => replace_low(&mut state.driver_features, value),
                1 => replace_high(&mut state.driver_features, value),
                _ => {}
            },
            32..56 if status & DRIVER_OK == 0 => {
                let Some(queue) = state.queues.get_mut(usize::from(state.queue_select)) else {
                    return;
                };
                match offset {
                    _ if queue.ready => {}
                    32 => replace_low(&mut queue.desc_table, value),
                    36 => replace_high(&mut queue.desc_table, value),
                    40 => replace_low(&mut queue.avail_ring, value),
                    44 => replace_high(&mut queue.avail_ring, value),
                    48 => replace_low(&mut queue.used_ring, value),
                    52 => replace_high(&mut queue.used_ring, value),
                    _ => {}
                }
            }
            _ => {}
        }
    }

    fn set_queue(&mut self, offset: u64, value: u16) {
        let selected = usize::from(self.state.queue_select);
        let running = self.link.status() & DRIVER_OK != 0;
        match (offset, self.state.queues.get_mut(selected)) {
            (26, _) => self.link.set_queue_vector(selected, value),
            (24, Some(queue)) if !running && !queue.ready => queue.size = value,
            (28, Some(queue)) if !running && value == 1 => queue.ready = true,
            _ => {}
        }
    }

    /// The status register (section 2.1): zero resets, other bits are only ever added.
    fn set_status(&mut self, status: u8) -> bool {
        if status == 0 {
            self.device.stop();
            self.link.reset();
            self.state = State::new(&self.queue_sizes);
            return true;
        }
        let new = status & !self.link.status() & !NEEDS_RESET;
        let accepted = self.state.driver_features & !self.offered() == 0
            && self.state.driver_features & feature(VIRTIO_F_VERSION_1) != 0;
        let refused = if accepted { 0 } else { FEATURES_OK };
        self.link.add_status(new & !refused & !DRIVER_OK);
        if new & DRIVER_OK != 0 && self.link.status() & FEATURES_OK != 0 {
            self.link.add_status(DRIVER_OK);
            if self.link.status() & NEEDS_RESET == 0
                && let Err(error) = self.activate()
            {
                self.link.fail(&error);
            }
        }
        false
    }

    fn activate(&mut self) -> io::Result<()> {
        let features = self.state.driver_features;
        let queues = self
            .state
            .queues
            .iter()
            .zip(self.doorbells.iter())
            .enumerate();
        let queues = queues.map(|(index, (state, doorbell))| {
            if !state.ready {
                return Ok(None);
            }
            let mut state = *state;
            state.event_idx_enabled = features & feature(VIRTIO_RING_F_EVENT_IDX) != 0;
            let invalid = |problem: &str| {
                io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("virtqueue {index} {problem}"),
                )
            };
            let queue = Queue::try_from(state)
                .map_err(|_| invalid("has a misaligned ring or an impossible size"))?;
            if !queue.is_valid(&self.memory) {
                return Err(invalid("has a ring outside of guest memory"));
            }
            let (memory, link) = (self.memory.clone(), Arc::clone(&self.link));
            let doorbell = doorbell.try_clone()?;
            Ok(Some(VirtQueue::new(index, queue, memory, link, doorbell)))
        });
        let activation = Activation {
            queues: queues.collect::<io::Result<_>>()?,
            memory: self.memory.clone(),
            features,
            link: Arc::clone(&self.link),
            threads: Arc::clone(&self.threads),
        };
        self.device.activate(activation)
    }
}

fn replace_low(word: &mut u64, low: u32) {
    *word = *word & !0xffff_ffff | u64::from(low);
}

fn replace_high(word: &mut u64, high: u32) {
    *word = *word & 0xffff_ffff | u64::from(high) << 32;
}
