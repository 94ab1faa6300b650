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

use super::execute::{Context, Executor};
use super::flights::{Flight, Flights};
use super::poll_window::PollWindow;
use super::pool::{Done, Pool};
use super::request::{self, Operation};
use super::ring::{Blank, Ring};
use super::stats::BlockStats;
use super::throttle::Throttle;
use super::transfer::Direction;
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
/// More requests in flight than these are waited for asleep: there is always one that comes soon, and
/// each that comes meanwhile makes the next batch longer.
const POLLED: usize = 2;

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
    /// The longest time to poll before sleeping.
    pub(super) poll: Duration,
}

/// Serves `queue`, by a ring if there is one for it, until `stop` says so. What was begun is answered
/// first.
pub(super) fn serve(
    setup: &Setup,
    ring: Option<Blank>,
    queue: VirtQueue,
    stop: &Stop,
) -> Result<(), Error> {
    Service::new(setup, ring, queue, stop)?.run()
}

/// Serves one queue; `begin.rs` has how requests are begun.
pub(super) struct Service<'a> {
    pub(super) context: &'a Context,
    stats: &'a BlockStats,
    throttle: Option<&'a Mutex<Throttle>>,
    stop: &'a Stop,
    pub(super) queue: VirtQueue,
    pub(super) executor: Executor<'a>,
    // In this order: what flights hold is let go when the ring is done with it; dropping the pool
    // waits for its threads, and they may be waiting for what a flight is to commit.
    pub(super) ring: Option<Ring>,
    pub(super) flights: Flights,
    pub(super) pool: Pool<'a>,
    /// For a request, where none is in flight; for what is in flight.
    polling: [PollWindow; 2],
    moved: Vec<(usize, io::Result<()>)>,
    done: Vec<Done>,
}

impl<'a> Service<'a> {
    fn new(
        setup: &'a Setup,
        blank: Option<Blank>,
        queue: VirtQueue,
        stop: &'a Stop,
    ) -> io::Result<Self> {
        let context = &setup.context;
        let mut pool = Pool::new(setup, POOL_ALONE)?;
        // A ring belongs to the thread that enables it.
        let wakers = [queue.doorbell(), stop.event(), pool.event()];
        let ring = blank.map(|blank| Ring::new(blank, &context.disk, &context.memory, &wakers));
        let ring = ring.and_then(|ring| ring.inspect_err(refused).ok());
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
            polling: [(); 2].map(|()| PollWindow::new(setup.poll)),
            moved: Vec::new(),
            done: Vec::new(),
        })
    }

    fn run(&mut self) -> Result<(), Error> {
        self.queue.disable_doorbell()?;
        while !self.stop.is_set() {
            let (begun, next) = self.begin_batch()?;
            let ended = self.collect()?;
            self.queue.notify()?;
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
        Ok(self.queue.notify()?)
    }

    /// Begins what the driver has asked for: whether it was anything, and why it is not more.
    fn begin_batch(&mut self) -> Result<(bool, Await), Error> {
        for count in 0..BATCH {
            // A driver cannot have more in flight, unless it does not keep the rules.
            if self.flights.len() >= self.queue.size().into() {
                return Ok((count > 0, Await::Nothing));
            }
            let delay = self
                .with_throttle(|throttle| throttle.delay(Instant::now()))
                .unwrap_or_default();
            if !delay.is_zero() {
                return Ok((count > 0, Await::Time(delay)));
            }
            match self.queue.pop()? {
                Some(chain) => self.begin(chain)?,
                None => return Ok((count > 0, Await::Request)),
            }
        }
        Ok((true, Await::Request))
    }

    /// A request of that many bytes begins.
    pub(super) fn charge(&self, bytes: u64) {
        self.with_throttle(|throttle| throttle.charge(bytes));
    }

    fn with_throttle<T>(&self, act: impl FnOnce(&mut Throttle) -> T) -> Option<T> {
        let throttle = self.throttle?.lock();
        Some(act(&mut throttle.unwrap_or_else(PoisonError::into_inner)))
    }

    /// Ends requests that are done; whether there were any.
    fn collect(&mut self) -> Result<bool, Error> {
        let mut moved = std::mem::take(&mut self.moved);
        if let Some(ring) = &mut self.ring {
            ring.submit()?;
            ring.completed(|request, result| moved.push((request, result)))?;
        }
        let mut done = std::mem::take(&mut self.done);
        self.pool.done(&mut done);
        let any = !moved.is_empty() || !done.is_empty();
        for (at, result) in moved.drain(..) {
            self.part_moved(at, result)?;
        }
        for (at, operation, result) in done.drain(..) {
            self.end(at, &operation, result)?;
        }
        (self.moved, self.done) = (moved, done);
        Ok(any)
    }

    fn part_moved(&mut self, at: usize, result: io::Result<()>) -> Result<(), Error> {
        let Some(flight) = self.flights.get_mut(at) else {
            return Ok(());
        };
        flight.parts -= 1;
        flight.failed |= result.is_err();
        if flight.parts > 0 {
            return Ok(());
        }
        let failed = std::mem::take(&mut flight.failed);
        flight.pin = None;
        let commit = flight.commit.take();
        match flight.operation.take() {
            Some(Operation::Flush) => match result {
                // Nothing is lost yet, and the call that blocks goes on after it.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    self.block(at, Operation::Flush)
                }
                result => {
                    let synced = self.context.disk.synced(result);
                    self.end(at, &Operation::Flush, synced)
                }
            },
            // The blocking calls go on after short ones, and find out what the error is.
            Some(operation) if failed => {
                drop(commit);
                self.block(at, operation)
            }
            Some(operation) => {
                let done = commit.map_or(Ok(()), |commit| commit());
                self.end(at, &operation, done)
            }
            None => Ok(()),
        }
    }

    /// Answers a request that was begun.
    pub(super) fn end(
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

    pub(super) fn answer(
        &mut self,
        chain: &Chain,
        status: &Buffers,
        byte: u8,
    ) -> Result<(), Error> {
        status.write(&self.context.memory, 0, &[byte])?;
        // The queue keeps chains below 4 GiB.
        Ok(self.queue.complete(chain, chain.writable.len() as u32)?)
    }

    /// Waits until there is something to do.
    fn sleep(&mut self, next: &Await) -> Result<(), Error> {
        let timeout = match next {
            Await::Time(delay) => Some(*delay),
            Await::Request | Await::Nothing => None,
        };
        // What the pool alone has done shows nowhere but in its event.
        let most = if self.ring.is_some() { POLLED } else { 0 };
        let polled = timeout.is_none() && self.flights.len() <= most;
        let kind = usize::from(!self.flights.is_empty());
        let begin = Instant::now();
        if polled && self.poll(next, begin, self.polling[kind].len())? {
            return Ok(());
        }
        if !matches!(next, Await::Request) || !self.queue.enable_doorbell()? {
            self.wait(timeout)?;
        }
        if polled {
            self.polling[kind].adapt(begin.elapsed());
        }
        Ok(self.queue.disable_doorbell()?)
    }

    /// Looks for a request or a completion in memory for a while; whether there is one.
    fn poll(&mut self, next: &Await, begin: Instant, window: Duration) -> Result<bool, Error> {
        while begin.elapsed() < window {
            let came = matches!(next, Await::Request) && self.queue.has_available()?;
            // The ring tells of the pool and of `stop` too.
            if came || self.ring.as_mut().is_some_and(Ring::has_news) || self.stop.is_set() {
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

impl Drop for Service<'_> {
    /// What a request holds is let go when the ring is done with it, and never if nobody can say when
    /// that is: the kernel might write to clusters that are another's by then.
    fn drop(&mut self) {
        if self
            .ring
            .as_mut()
            .is_some_and(|ring| ring.finish().is_err())
        {
            std::mem::forget(std::mem::take(&mut self.flights));
            self.pool.abandon();
        }
    }
}

/// Says once that there is no io_uring.
pub(super) fn refused(error: &io::Error) {
    static SAID: std::sync::Once = std::sync::Once::new();
    SAID.call_once(|| {
        tracing::warn!(
            %error,
            "the host refuses io_uring: disks are served by threads, which is slower \
             (look at /proc/sys/kernel/io_uring_disabled; io=threads says that this is meant)"
        );
    });
}
