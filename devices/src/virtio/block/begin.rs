//! How a request is begun: who does it.

use super::disk::{Commit, Extent, Pin, Plan};
use super::execute::Context;
use super::flights::Flight;
use super::request::{self, Operation};
use super::ring::Target;
use super::service::{Error, Service};
use super::transfer::{self, Direction};
use crate::virtio::buffers::Buffers;
use crate::virtio::queue::Chain;

impl Service<'_> {
    /// Begins a request; it may end at once.
    pub(super) fn begin(&mut self, chain: Chain) -> Result<(), Error> {
        let Context { disk, memory, .. } = self.context;
        let request = request::parse(&chain, memory, disk.geometry())?;
        let operation = match request.operation {
            Ok(operation) => operation,
            Err(refusal) => {
                tracing::debug!(%refusal, "disk request refused");
                return self.answer(&chain, &request.status, refusal.status());
            }
        };
        self.charge(operation.bytes().map_or(0, |(_, _, data)| data.len()));
        let at = self.flights.insert(Flight {
            chain,
            status: request.status,
            operation: None,
            pin: None,
            commit: None,
            parts: 0,
            failed: false,
        });
        let Some((direction, offset, data)) = operation.bytes() else {
            return match operation {
                Operation::Flush if !self.context.never_sync => self.flush(at),
                other => self.block(at, other),
            };
        };
        let write = direction == Direction::Write;
        if write && self.context.write_through || data.len() > transfer::CHUNK {
            return self.block(at, operation);
        }
        // What is planned for a write is to be done so: who allocates in vain gives back.
        if write && !self.can_write_at_once(offset, data) {
            return self.block(at, operation);
        }
        let plan = match direction {
            Direction::Read => disk.plan_read(offset, data.len(), false),
            Direction::Write => disk.plan_write(offset, data.len(), false),
        };
        match plan {
            Ok(Plan::Fast(extents, pin)) => {
                self.transfer(at, operation, &extents, (Some(pin), None))
            }
            Ok(Plan::Fill(extents, commit)) => {
                self.transfer(at, operation, &extents, (None, Some(commit)))
            }
            Ok(Plan::Slow) => self.block(at, operation),
            Err(error) => self.end(at, &operation, Err(error)),
        }
    }

    /// Whether the page cache takes a write, or the ring does.
    fn can_write_at_once(&mut self, offset: u64, data: &Buffers) -> bool {
        let unit = self.context.disk.alignment(0);
        let room = self.ring.as_ref().is_some_and(|ring| ring.has_room(1));
        // While the ring writes what this thread is to commit, it must not wait itself for a write
        // that waits for that: somebody else has to be there to do so.
        unit == 1 || room && transfer::fits(unit, offset, data) && self.pool.has_thread()
    }

    /// Moves bytes between guest memory and these extents, now or by the ring.
    fn transfer(
        &mut self,
        at: usize,
        operation: Operation,
        extents: &[Extent],
        (pin, commit): (Option<Pin>, Option<Commit>),
    ) -> Result<(), Error> {
        let disk = &*self.context.disk;
        let Some((direction, _, data)) = operation.bytes() else {
            return self.block(at, operation);
        };
        if transfer::alignment(disk, extents) == 1 {
            // The page cache takes a write as fast as anyone could be asked to do it (and only the
            // host's limit of dirty pages, which is everyone's, makes that wait), and knows at once
            // what there is to read. But of many reads the ring does all in one call.
            let (now, flags) = match direction {
                Direction::Write => (true, 0),
                Direction::Read => {
                    let now = self.ring.is_none() || self.is_alone()?;
                    (now, libc::RWF_NOWAIT)
                }
            };
            if now {
                let transfer = &self.executor.transfer;
                let moved = transfer.move_extents(extents, data, direction, flags);
                if flags == 0 || moved.is_ok() {
                    let done = moved.and_then(|()| commit.map_or(Ok(()), |commit| commit()));
                    return self.end(at, &operation, done);
                }
            }
        }
        let ring = self
            .ring
            .as_ref()
            .map(|ring| (ring.files(), ring.has_room(extents.len())));
        let Some((files, true)) = ring.filter(|_| transfer::aligned(disk, extents, data)) else {
            drop(commit);
            return self.block(at, operation);
        };
        match transfer::check(extents, files, data.len(), direction) {
            Ok(()) => self.launch(at, operation, extents, (pin, commit)),
            Err(error) => self.end(at, &operation, Err(error)),
        }
    }

    /// Gives a request to the ring, by extents that were checked.
    fn launch(
        &mut self,
        at: usize,
        operation: Operation,
        extents: &[Extent],
        (pin, commit): (Option<Pin>, Option<Commit>),
    ) -> Result<(), Error> {
        let (Some(ring), Some((direction, _, data))) = (&mut self.ring, operation.bytes()) else {
            return self.block(at, operation);
        };
        let Some(flight) = self.flights.get_mut(at) else {
            return Ok(());
        };
        // Before the ring has any of it: whatever becomes of the rest, what is held outlives that.
        (flight.pin, flight.commit) = (pin, commit);
        let mut done = 0;
        for extent in extents {
            let slices = data.part(done, extent.len()).slices(&self.context.memory)?;
            done += extent.len();
            match *extent {
                Extent::Zero { .. } => slices.iter().for_each(transfer::zero),
                Extent::File { file, offset, len } => {
                    let target = Target {
                        direction,
                        file,
                        offset,
                        len,
                    };
                    flight.parts += 1;
                    ring.add(at, target, &slices)?;
                }
            }
        }
        if flight.parts == 0 {
            return self.end(at, &operation, Ok(()));
        }
        flight.operation = Some(operation);
        Ok(())
    }

    /// Has the ring make durable what was written, where that is all.
    fn flush(&mut self, at: usize) -> Result<(), Error> {
        let ring = self.ring.as_mut();
        let ring = ring.filter(|ring| ring.files() > 0 && ring.has_room(1));
        let (Some(ring), Some(flight)) = (ring, self.flights.get_mut(at)) else {
            return self.block(at, Operation::Flush);
        };
        if !self.context.disk.needs_sync_only() {
            return self.block(at, Operation::Flush);
        }
        flight.operation = Some(Operation::Flush);
        flight.parts = 1;
        Ok(ring.sync(at, 0)?)
    }

    /// Does a request with blocking calls, here or elsewhere.
    pub(super) fn block(&mut self, at: usize, operation: Operation) -> Result<(), Error> {
        // A flush takes so long that handing it over is nothing.
        let here = match operation {
            Operation::GetId { .. } => true,
            Operation::Flush => self.context.never_sync,
            _ => self.is_alone()?,
        };
        let operation = match here {
            true => operation,
            false => match self.pool.start(at, operation) {
                Ok(()) => return Ok(()),
                Err(operation) => operation,
            },
        };
        let result = self.executor.execute(&operation);
        self.end(at, &operation, result)
    }

    /// Whether there is only one request, in flight or waiting.
    fn is_alone(&self) -> Result<bool, Error> {
        Ok(self.flights.len() == 1 && !self.queue.has_available()?)
    }
}
