//! Doing one request with blocking calls.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

use super::disk::Disk;
use super::request::{Operation, Range};
use super::transfer::Transfer;
use crate::virtio::Memory;

/// What requests are done with.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) memory: Memory,
    /// Nobody needs the content after a crash.
    pub(super) never_sync: bool,
    /// Make each write durable before it is answered: the driver does not know how to ask.
    pub(super) write_through: bool,
}

/// Does requests one after the other.
pub(super) struct Executor<'a> {
    context: &'a Context,
    /// For whoever has a plan already.
    pub(super) transfer: Transfer<'a>,
}

impl<'a> Executor<'a> {
    pub(super) fn new(context: &'a Context) -> Self {
        Self {
            context,
            transfer: Transfer::new(&*context.disk, &context.memory),
        }
    }

    /// Does a request, whatever it takes.
    pub(super) fn execute(&mut self, operation: &Operation) -> io::Result<()> {
        let Context {
            disk,
            memory,
            never_sync,
            write_through,
        } = self.context;
        match operation {
            Operation::Read { offset, data } => return self.transfer.read(*offset, data),
            Operation::Flush if *never_sync => return Ok(()),
            Operation::Flush => return disk.flush(),
            Operation::GetId { data } => {
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                for (byte, char) in id.iter_mut().zip(disk.geometry().serial.bytes()) {
                    *byte = char;
                }
                data.write(memory, 0, &id).map_err(io::Error::other)?;
                return Ok(());
            }
            Operation::Discard(ranges) => {
                return each(ranges, |range| disk.discard(range.offset, range.len));
            }
            Operation::Write { offset, data } => self.transfer.write(*offset, data)?,
            Operation::WriteZeroes(ranges) => each(ranges, |range| {
                disk.write_zeroes(range.offset, range.len, range.unmap)
            })?,
        }
        if *write_through { disk.flush() } else { Ok(()) }
    }
}

fn each(ranges: &[Range], mut act: impl FnMut(&Range) -> io::Result<()>) -> io::Result<()> {
    ranges
        .iter()
        .filter(|range| range.len > 0)
        .try_for_each(&mut act)
}
