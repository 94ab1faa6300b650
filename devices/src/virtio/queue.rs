//! A split virtqueue as devices use it: `virtio-queue` underneath, with every chain checked
//! before a device sees it.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use super::Memory;
use super::buffers::{Buffers, Segment};
use super::link::DriverLink;

/// What a driver did wrong with a queue. The device that owns the queue needs a reset then.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The rings are broken.
    #[error("virtqueue {queue}: {error}")]
    Ring {
        /// The queue's index.
        queue: usize,
        /// What `virtio-queue` found.
        error: virtio_queue::Error,
    },
    /// A descriptor chain breaks the rules of virtio 1.2, section 2.7.
    #[error("virtqueue {queue}: descriptor chain {head} {problem}")]
    Chain {
        /// The queue's index.
        queue: usize,
        /// The chain's first descriptor.
        head: u16,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// A descriptor chain of a driver that kept the rules; its addresses are not checked yet.
#[derive(Debug)]
pub(crate) struct Chain {
    head: u16,
    /// What the device may read.
    pub(crate) readable: Buffers,
    /// What the device may write, after the readable part.
    pub(crate) writable: Buffers,
}

/// A queue in use.
pub struct VirtQueue {
    index: usize,
    queue: Queue,
    memory: Memory,
    link: Arc<DriverLink>,
    doorbell: EventFd,
    /// Chains that were given back, of which the used ring's index does not tell yet.
    unpublished: Wrapping<u16>,
}

impl VirtQueue {
    /// Wraps a configured queue whose rings lie in guest memory.
    pub(super) fn new(
        index: usize,
        queue: Queue,
        memory: Memory,
        link: Arc<DriverLink>,
        doorbell: EventFd,
    ) -> Self {
        Self {
            index,
            queue,
            memory,
            link,
            doorbell,
            unpublished: Wrapping(0),
        }
    }

    /// Signalled when the driver has made buffers available.
    pub fn doorbell(&self) -> &EventFd {
        &self.doorbell
    }

    /// Most chains that can be available at once.
    pub(crate) fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The index after the newest available chain, and that after the newest one popped.
    pub(crate) fn position(&self) -> Result<(u16, u16), Error> {
        let available = self.queue.avail_idx(&self.memory, Ordering::Acquire);
        let available = available.map_err(|error| self.ring(error))?;
        Ok((available.0, self.queue.next_avail()))
    }

    /// Whether the driver has buffers waiting.
    pub(crate) fn has_available(&self) -> Result<bool, Error> {
        self.position().map(|(available, next)| available != next)
    }

    /// Takes the next chain.
    pub(crate) fn pop(&mut self) -> Result<Option<Chain>, Error> {
        let index = self.index;
        let ring = |error| Error::Ring {
            queue: index,
            error,
        };
        let Some(mut descriptors) = self.queue.iter(&self.memory).map_err(ring)?.next() else {
            return Ok(None);
        };
        let head = descriptors.head_index();
        let wrong = |problem| Error::Chain {
            queue: index,
            head,
            problem,
        };
        let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
        let mut last = None;
        for count in 0.. {
            let Some(descriptor) = descriptors.next() else {
                break;
            };
            if count == self.queue.size() {
                return Err(wrong("is longer than the queue"));
            }
            let piece = Segment {
                address: descriptor.addr(),
                len: descriptor.len(),
            };
            if descriptor.is_write_only() {
                writable.push(piece);
            } else if writable.is_empty() {
                readable.push(piece);
            } else {
                return Err(wrong("has a readable buffer after a writable one"));
            }
            last = Some(descriptor);
        }
        // The iterator ends without a word where it meets a loop, a wild index or table, a
        // nested table, or 4 GiB. A descriptor that should have had a successor tells.
        match last {
            None => Err(wrong("cannot be read")),
            Some(descriptor) if descriptor.has_next() => Err(wrong("has no end")),
            Some(_) => Ok(Some(Chain {
                head,
                readable,
                writable,
            })),
        }
    }

    /// Gives a chain back, `len` bytes of its writable part having been written. The driver
    /// learns of it by [`Self::notify`].
    pub(crate) fn complete(&mut self, chain: &Chain, len: u32) -> Result<(), Error> {
        let next = Wrapping(self.queue.next_used()) + self.unpublished;
        let slot = u64::from(next.0 % self.queue.size());
        let element = u64::from(len) << 32 | u64::from(chain.head);
        let at = self.used_ring(4 + 8 * slot)?;
        let written = self.memory.write_obj(element.to_le(), at);
        written.map_err(|error| self.outside(error))?;
        self.unpublished += 1;
        Ok(())
    }

    /// Tells the driver of what was completed since the last call, all at once, and interrupts it
    /// if it wants to be.
    pub(crate) fn notify(&mut self) -> Result<(), Error> {
        let count = std::mem::take(&mut self.unpublished);
        if count.0 == 0 {
            return Ok(());
        }
        let next = Wrapping(self.queue.next_used()) + count;
        self.queue.set_next_used(next.0);
        let index = self.used_ring(2)?;
        let stored = self.memory.store(next.0.to_le(), index, Ordering::Release);
        stored.map_err(|error| self.outside(error))?;
        // The index must be visible before it is looked at what the driver wants.
        fence(Ordering::SeqCst);
        let wanted = match self.queue.event_idx_enabled() {
            true => {
                let after = self.available_ring(4 + 2 * u64::from(self.queue.size()))?;
                next - Wrapping(after) - Wrapping(1) < count
            }
            false => u32::from(self.available_ring(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0,
        };
        if wanted {
            self.link.interrupt_queue(self.index);
        }
        Ok(())
    }

    /// Asks the driver not to ring the doorbell: the device is looking anyway.
    pub(crate) fn disable_doorbell(&mut self) -> Result<(), Error> {
        self.queue
            .disable_notification(&self.memory)
            .map_err(|error| self.ring(error))
    }

    /// Asks for the doorbell again. True when buffers have arrived meanwhile, for which it may
    /// not ring.
    pub(crate) fn enable_doorbell(&mut self) -> Result<bool, Error> {
        self.queue
            .enable_notification(&self.memory)
            .map_err(|error| self.ring(error))
    }

    /// A place in the used ring.
    fn used_ring(&self, offset: u64) -> Result<GuestAddress, Error> {
        let at = GuestAddress(self.queue.used_ring()).checked_add(offset);
        at.ok_or_else(|| self.ring(virtio_queue::Error::AddressOverflow))
    }

    /// A field of the available ring.
    fn available_ring(&self, offset: u64) -> Result<u16, Error> {
        let at = GuestAddress(self.queue.avail_ring()).checked_add(offset);
        let at = at.ok_or_else(|| self.ring(virtio_queue::Error::AddressOverflow))?;
        let field = self.memory.load::<u16>(at, Ordering::Relaxed);
        field.map(u16::from_le).map_err(|error| self.outside(error))
    }

    fn outside(&self, error: GuestMemoryError) -> Error {
        self.ring(virtio_queue::Error::GuestMemory(error))
    }

    fn ring(&self, error: virtio_queue::Error) -> Error {
        Error::Ring {
            queue: self.index,
            error,
        }
    }
}

#[cfg(test)]
mod tests;
