//! The thread that serves one queue of a disk.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};

use super::device::BlockStats;
use super::disk::Disk;
use super::request::{self, Operation, Range};
use super::transfer::Transfer;
use crate::poll;
use crate::virtio::Memory;
use crate::virtio::queue::{self, Chain, VirtQueue};
use crate::virtio::worker::Stop;

/// Most requests completed before the driver is told of the first.
const BATCH: u32 = 16;

/// Why the device gave up.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error(transparent)]
    Queue(#[from] queue::Error),
    #[error(transparent)]
    Malformed(#[from] request::Malformed),
    #[error("cannot answer: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    #[error("cannot wait for requests: {0}")]
    Wait(#[from] io::Error),
}

/// What the thread works with.
pub(super) struct Service {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) memory: Memory,
    pub(super) stats: Arc<BlockStats>,
    /// Make each write durable before it is answered: the driver does not know how to ask.
    pub(super) write_through: bool,
}

impl Service {
    /// Serves requests until `stop` is signalled. A request that has begun is answered first.
    pub(super) fn run(&self, queue: &mut VirtQueue, stop: &Stop) -> Result<(), Error> {
        let mut transfer = Transfer::new(&*self.disk, &self.memory);
        let mut unannounced = 0;
        queue.disable_doorbell()?;
        while !stop.is_set() {
            if let Some(chain) = queue.pop()? {
                let len = self.serve(&chain, queue, &mut transfer)?;
                queue.complete(&chain, len)?;
                unannounced += 1;
                if unannounced >= BATCH {
                    queue.notify()?;
                    unannounced = 0;
                }
                continue;
            }
            if unannounced > 0 {
                queue.notify()?;
                unannounced = 0;
            }
            if !queue.enable_doorbell()? {
                poll::wait(&[queue.doorbell(), stop.event()], -1)?;
                // "Would block": it was the stop event.
                let _ = queue.doorbell().read();
            }
            queue.disable_doorbell()?;
        }
        if unannounced > 0 {
            queue.notify()?;
        }
        Ok(())
    }

    /// Answers one request; returns how many bytes were written to its chain.
    fn serve(
        &self,
        chain: &Chain,
        queue: &mut VirtQueue,
        transfer: &mut Transfer<'_>,
    ) -> Result<u32, Error> {
        let request = request::parse(chain, &self.memory, self.disk.geometry())?;
        let status = match request.operation {
            Ok(operation) => {
                if operation == Operation::Flush {
                    // Syncing takes long: what is done should not wait for it.
                    queue.notify()?;
                }
                match self.execute(&operation, transfer) {
                    Ok(()) => VIRTIO_BLK_S_OK as u8,
                    Err(error) => {
                        self.report(&error, &operation);
                        VIRTIO_BLK_S_IOERR as u8
                    }
                }
            }
            Err(refusal) => {
                tracing::debug!(%refusal, "disk request refused");
                refusal.status()
            }
        };
        request.status.write(&self.memory, 0, &[status])?;
        // The queue keeps chains below 4 GiB.
        Ok(chain.writable.len() as u32)
    }

    /// A full or broken disk fails every request: of many failures a few are told.
    fn report(&self, error: &io::Error, operation: &Operation) {
        let count = self.stats.add_failure();
        if count.is_power_of_two() {
            tracing::warn!(%error, ?operation, count, "disk request failed");
        }
    }

    fn execute(&self, operation: &Operation, transfer: &mut Transfer<'_>) -> io::Result<()> {
        match operation {
            Operation::Read { offset, data } => {
                transfer.read(*offset, data)?;
                self.stats.add_read(data.len());
                return Ok(());
            }
            Operation::Write { offset, data } => {
                transfer.write(*offset, data)?;
                self.stats.add_written(data.len());
            }
            Operation::Flush => return self.disk.flush(),
            Operation::Discard(ranges) => {
                return each(ranges, |range| self.disk.discard(range.offset, range.len));
            }
            Operation::WriteZeroes(ranges) => each(ranges, |range| {
                self.disk.write_zeroes(range.offset, range.len, range.unmap)
            })?,
            Operation::GetId { data } => {
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                for (byte, char) in id.iter_mut().zip(self.disk.geometry().serial.bytes()) {
                    *byte = char;
                }
                data.write(&self.memory, 0, &id).map_err(io::Error::other)?;
                return Ok(());
            }
        }
        if self.write_through {
            self.disk.flush()
        } else {
            Ok(())
        }
    }
}

fn each(ranges: &[Range], mut act: impl FnMut(&Range) -> io::Result<()>) -> io::Result<()> {
    ranges
        .iter()
        .filter(|range| range.len > 0)
        .try_for_each(&mut act)
}
