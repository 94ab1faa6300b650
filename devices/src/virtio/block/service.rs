//! The thread that serves one queue of a disk: takes requests in batches, has them done in
//! whichever order they get ready, and tells the driver of many at a time.
//!
//! A request whose bytes lie in files goes to the [`Ring`]. All else goes to the [`Pool`], and so
//! does all where there is no ring; but what would take long is done here and now if nobody waits
//! for anything else, because handing it over costs more than it gains then.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};

use super::disk::{Extent, Pin, Plan};
use super::execute::{Context, Executor};
use super::flights::{Flight, Flights};
use super::pool::{Done, Pool};
use super::request::{self, Operation};
use super::ring::{Ring, Target};
use super::stats::BlockStats;
use super::throttle::Throttle;
use super::transfer::{self, Direction};
use crate::poll;
use crate::threads::Threads;
use crate::virtio::buffers::Buffers;
use crate::virtio::queue::{self, Chain, VirtQueue};
use crate::virtio::worker::Stop;

/// Requests that are begun before the first of them is looked after.
const BATCH: usize = 64;
/// Threads for what a ring cannot do, and for everything where there is none.
const POOL_BESIDE_RING: usize = 4;
const POOL_ALONE: usize = 16;
/// How long to look out for the next request before going to sleep, if the last one came that soon.
const EAGER: Duration = Duration::from_micros(50);

/// Why the device gave up.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error(transparent)]
    Queue(#[from] queue::Error),
    #[error(transparent)]
    Malformed(#[from] request::Malformed),
    #[error("cannot answer: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    #[error("cannot do or wait for requests: {0}")]
    Io(#[from] io::Error),
}

/// What ends a sleep, beside the completion of a request and [`Stop`].
enum Await {
    /// The driver makes another request.
    Request,
    /// Nothing: more requests are begun only when some are done.
    Nothing,
    /// The disk's limits allow the next request.
    Time(Duration),
}

/// What a queue is served with.
pub(super) struct Setup {
    /// The threads' name.
    pub(super) name: String,
    pub(super) context: Context,
    pub(super) threads: Arc<dyn Threads>,
    pub(super) stats: Arc<BlockStats>,
    pub(super) throttle: Option<Arc<Mutex<Throttle>>>,
    /// Use io_uring if it can be had.
    pub(super) ring: bool,
}

/// Serves `queue` until `stop` says so. What was begun is answered first.
pub(super) fn serve(setup: &Setup, queue: VirtQueue, stop: &Stop) -> Result<(), Error> {
    Service::new(setup, queue, stop)?.run()
}

struct Service<'a> {
    context: &'a Context,
    stats: &'a BlockStats,
    throttle: Option<&'a Mutex<Throttle>>,
    stop: &'a Stop,
    queue: VirtQueue,
    executor: Executor<'a>,
    // These end before the pins in `flights`: dropping them waits for what they are at.
    ring: Option<Ring>,
    pool: Pool<'a>,
    flights: Flights,
    /// Something was completed that the driver was not told of.
    unannounced: bool,
    /// The last request came soon after the one before.
    eager: bool,
    moved: Vec<(usize, bool)>,
    done: Vec<Done>,
}

impl<'a> Service<'a> {
    fn new(setup: &'a Setup, queue: VirtQueue, stop: &'a Stop) -> io::Result<Self> {
        let context = &setup.context;
        let mut pool = Pool::new(setup, POOL_ALONE)?;
        let mut ring = None;
        if setup.ring {
            // A ring belongs to the thread that makes it.
            let wakers = [queue.doorbell(), stop.event(), pool.event()];
            let made = Ring::new(&context.disk, &context.memory, &wakers);
            ring = made.inspect_err(refused).ok();
        }
        if ring.is_some() {
            pool.limit(POOL_BESIDE_RING);
        }
        Ok(Self {
            context,
            stats: &setup.stats,
            throttle: setup.throttle.as_deref(),
            stop,
            queue,
            executor: Executor::new(context),
            ring,
            pool,
            flights: Flights::default(),
            unannounced: false,
            eager: false,
            moved: Vec::new(),
            done: Vec::new(),
        })
    }

    fn run(&mut self) -> Result<(), Error> {
        self.queue.disable_doorbell()?;
        while !self.stop.is_set() {
            let (begun, next) = self.begin_batch()?;
            let ended = self.collect()?;
            self.announce()?;
            // The signal of the end may be among what was collected: it does not come again.
            if !begun && !ended && !self.stop.is_set() {
                self.sleep(&next)?;
            }
        }
        for request in self.pool.cancel() {
            self.flights.remove(request);
        }
        while !self.flights.is_empty() {
            if !self.collect()? {
                self.wait(None)?;
            }
        }
        self.announce()
    }

    /// Begins what the driver has asked for: whether it was anything, and why it is not more.
    fn begin_batch(&mut self) -> Result<(bool, Await), Error> {
        for count in 0..BATCH {
            // A driver cannot have more in flight, unless it does not keep the rules.
            if self.flights.len() >= self.queue.size().into() {
                return Ok((count > 0, Await::Nothing));
            }
            if let Some(throttle) = self.throttle {
                let mut throttle = throttle.lock().unwrap_or_else(PoisonError::into_inner);
                let delay = throttle.delay(Instant::now());
                if !delay.is_zero() {
                    return Ok((count > 0, Await::Time(delay)));
                }
            }
            match self.queue.pop()? {
                Some(chain) => self.begin(chain)?,
                None => return Ok((count > 0, Await::Request)),
            }
        }
        Ok((true, Await::Request))
    }

    fn begin(&mut self, chain: Chain) -> Result<(), Error> {
        let Context { disk, memory, .. } = self.context;
        let request = request::parse(&chain, memory, disk.geometry())?;
        let operation = match request.operation {
            Ok(operation) => operation,
            Err(refusal) => {
                tracing::debug!(%refusal, "disk request refused");
                return self.answer(&chain, &request.status, refusal.status());
            }
        };
        if let Some(throttle) = self.throttle {
            let mut throttle = throttle.lock().unwrap_or_else(PoisonError::into_inner);
            throttle.charge(operation.bytes().map_or(0, |(_, _, data)| data.len()));
        }
        let at = self.flights.insert(Flight {
            chain,
            status: request.status,
            operation: None,
            pin: None,
            parts: 0,
            failed: false,
        });
        // The page cache takes a write as fast as anyone could be asked to do it, and knows at once
        // what there is to read; but of many reads the ring does all in one call.
        let now = match operation.bytes() {
            Some((Direction::Read, ..)) => self.ring.is_none() || self.is_alone()?,
            Some((Direction::Write, ..)) => true,
            None => false,
        };
        let done = match now {
            true => self.executor.execute_cached(&operation),
            false => Ok(false),
        };
        let planned = match done {
            Ok(true) => return self.end(at, &operation, Ok(())),
            Ok(false) => self.plan(&operation),
            Err(error) => Err(error),
        };
        match planned {
            Ok(Some((extents, pin))) => self.launch(at, operation, &extents, pin),
            Ok(None) => self.block(at, operation),
            Err(error) => self.end(at, &operation, Err(error)),
        }
    }

    /// Whether there is only one request, in flight or waiting.
    fn is_alone(&self) -> Result<bool, Error> {
        Ok(self.flights.len() == 1 && !self.queue.has_available()?)
    }

    /// Where the ring can move a request's bytes; `None` if it is not that simple.
    fn plan(&self, operation: &Operation) -> io::Result<Option<(Vec<Extent>, Pin)>> {
        let disk = &*self.context.disk;
        let (Some(ring), Some((direction, offset, data))) = (&self.ring, operation.bytes()) else {
            return Ok(None);
        };
        if data.len() > transfer::CHUNK {
            return Ok(None);
        }
        let plan = match direction {
            Direction::Read => disk.plan_read(offset, data.len())?,
            Direction::Write if self.context.write_through => return Ok(None),
            Direction::Write => disk.plan_write(offset, data.len())?,
        };
        let Plan::Fast(extents, pin) = plan else {
            return Ok(None);
        };
        if !ring.has_room(extents.len()) || !transfer::aligned(disk, &extents, data) {
            return Ok(None);
        }
        transfer::check(&extents, ring.files(), data.len(), direction)?;
        Ok(Some((extents, pin)))
    }

    /// Gives a request to the ring, by extents that were checked.
    fn launch(
        &mut self,
        at: usize,
        operation: Operation,
        extents: &[Extent],
        pin: Pin,
    ) -> Result<(), Error> {
        let (Some(ring), Some((direction, _, data))) = (&mut self.ring, operation.bytes()) else {
            return self.block(at, operation);
        };
        let (mut done, mut parts) = (0, 0);
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
                    ring.add(at, target, &slices)?;
                    parts += 1;
                }
            }
        }
        if parts == 0 {
            return self.end(at, &operation, Ok(()));
        }
        if let Some(flight) = self.flights.get_mut(at) {
            flight.operation = Some(operation);
            flight.pin = Some(pin);
            flight.parts = parts;
        }
        Ok(())
    }

    /// Does a request with blocking calls, here or elsewhere.
    fn block(&mut self, at: usize, operation: Operation) -> Result<(), Error> {
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

    /// Ends requests that are done; whether there were any.
    fn collect(&mut self) -> Result<bool, Error> {
        let mut moved = std::mem::take(&mut self.moved);
        if let Some(ring) = &mut self.ring {
            ring.submit()?;
            ring.completed(|request, whole| moved.push((request, whole)))?;
        }
        let mut done = std::mem::take(&mut self.done);
        self.pool.done(&mut done);
        let any = !moved.is_empty() || !done.is_empty();
        for (at, whole) in moved.drain(..) {
            self.part_moved(at, whole)?;
        }
        for (at, operation, result) in done.drain(..) {
            self.end(at, &operation, result)?;
        }
        (self.moved, self.done) = (moved, done);
        Ok(any)
    }

    fn part_moved(&mut self, at: usize, whole: bool) -> Result<(), Error> {
        let Some(flight) = self.flights.get_mut(at) else {
            return Ok(());
        };
        flight.parts -= 1;
        flight.failed |= !whole;
        if flight.parts > 0 {
            return Ok(());
        }
        let failed = std::mem::take(&mut flight.failed);
        flight.pin = None;
        match flight.operation.take() {
            // The blocking calls go on after short ones, and find out what the error is.
            Some(operation) if failed => self.block(at, operation),
            Some(operation) => self.end(at, &operation, Ok(())),
            None => Ok(()),
        }
    }

    /// Answers a request that was begun.
    fn end(
        &mut self,
        at: usize,
        operation: &Operation,
        result: io::Result<()>,
    ) -> Result<(), Error> {
        let Some(Flight { chain, status, .. }) = self.flights.remove(at) else {
            return Ok(());
        };
        let byte = match result {
            Ok(()) => {
                match operation.bytes() {
                    Some((Direction::Read, _, data)) => self.stats.add_read(data.len()),
                    Some((Direction::Write, _, data)) => self.stats.add_written(data.len()),
                    None => {}
                }
                VIRTIO_BLK_S_OK
            }
            Err(error) => {
                // A full or broken disk fails every request: of many failures a few are told.
                let count = self.stats.add_failure();
                if count.is_power_of_two() {
                    tracing::warn!(%error, ?operation, count, "disk request failed");
                }
                VIRTIO_BLK_S_IOERR
            }
        };
        self.answer(&chain, &status, byte as u8)
    }

    fn answer(&mut self, chain: &Chain, status: &Buffers, byte: u8) -> Result<(), Error> {
        status.write(&self.context.memory, 0, &[byte])?;
        // The queue keeps chains below 4 GiB.
        self.queue.complete(chain, chain.writable.len() as u32)?;
        self.unannounced = true;
        Ok(())
    }

    /// Interrupts the driver, if anything was completed and it wants to know.
    fn announce(&mut self) -> Result<(), Error> {
        if std::mem::take(&mut self.unannounced) {
            self.queue.notify()?;
        }
        Ok(())
    }

    /// Waits until there is something to do.
    fn sleep(&mut self, next: &Await) -> Result<(), Error> {
        let idle = self.flights.is_empty();
        let timeout = match next {
            Await::Request if idle && self.eager && self.look_out()? => return Ok(()),
            Await::Request if self.queue.enable_doorbell()? => {
                return Ok(self.queue.disable_doorbell()?);
            }
            Await::Request | Await::Nothing => None,
            Await::Time(delay) => Some(*delay),
        };
        let begin = Instant::now();
        self.wait(timeout)?;
        self.eager = idle && begin.elapsed() < EAGER;
        Ok(self.queue.disable_doorbell()?)
    }

    /// Looks out for the next request for a short while.
    fn look_out(&self) -> Result<bool, Error> {
        let begin = Instant::now();
        while begin.elapsed() < EAGER && !self.stop.is_set() {
            if self.queue.has_available()? {
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        Ok(false)
    }

    /// Waits for a doorbell, [`Stop`], a completion or the end of `timeout`.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if let Some(ring) = &mut self.ring {
            return ring.wait(timeout);
        }
        let (doorbell, finished) = (self.queue.doorbell(), self.pool.event());
        let millis = timeout.map(|timeout| timeout.as_micros().div_ceil(1000));
        let millis = millis.map_or(-1, |millis| i32::try_from(millis).unwrap_or(i32::MAX));
        poll::wait(&[doorbell, self.stop.event(), finished], millis)?;
        for event in [doorbell, finished] {
            // "Would block": it was another one.
            let _ = event.read();
        }
        Ok(())
    }
}

/// Says once that there is no io_uring.
fn refused(error: &io::Error) {
    static SAID: std::sync::Once = std::sync::Once::new();
    SAID.call_once(|| {
        tracing::warn!(
            %error,
            "the host refuses io_uring: disks are served by threads, which is slower \
             (look at /proc/sys/kernel/io_uring_disabled; io=threads says that this is meant)"
        );
    });
}
