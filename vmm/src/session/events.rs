//! What can happen to a run, from one place.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::job;
use super::signals::Signals;
use crate::monitor::link::{Link, Order, Told};

/// Something that happened.
pub(super) enum Event {
    /// The machine's process says something.
    Told(Told),
    /// It is gone. Nothing more comes of it.
    Gone,
    /// It is out of its mind, and heard no more.
    Nonsense,
    /// The guest's PID 1 did.
    Job(job::Event),
    /// A signal to us.
    Signal(u8),
}

/// Where events come from.
pub(super) struct Events {
    signals: Signals,
    /// `None` once it is gone.
    link: Option<Link<Order, Told>>,
    jobs: Receiver<job::Event>,
    tell: Sender<job::Event>,
    wake: Arc<EventFd>,
    put_back: VecDeque<Event>,
}

impl Events {
    pub(super) fn new(signals: Signals, link: Link<Order, Told>) -> io::Result<Self> {
        let (tell, jobs) = mpsc::channel();
        Ok(Self {
            signals,
            link: Some(link),
            jobs,
            tell,
            wake: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
            put_back: VecDeque::new(),
        })
    }

    /// How the thread that talks to PID 1 tells of it.
    pub(super) fn teller(&self) -> impl Fn(job::Event) + Send + 'static {
        let (tell, wake) = (self.tell.clone(), self.wake.clone());
        move |event| {
            // The run is over when nobody listens.
            let _ = tell.send(event);
            let _ = wake.write(1);
        }
    }

    /// Waits for an event until `deadline`. What the machine's process says comes too late then, so
    /// that one which a guest has taken over cannot put the deadline off by talking.
    pub(super) fn next(&mut self, deadline: Instant) -> Option<Event> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if let Some(event) = self.ours() {
                return Some(event);
            }
            if left.is_zero() {
                return None;
            }
            if let Some(event) = self.hear() {
                return Some(event);
            }
            self.wait(Timespec::try_from(left).ok());
        }
    }

    /// An event that is here already; PID 1's words first, which mean more than the machine's end.
    pub(super) fn now(&mut self) -> Option<Event> {
        self.ours().or_else(|| self.hear())
    }

    /// One that is not the machine's process's.
    fn ours(&mut self) -> Option<Event> {
        // "Would block": nobody has woken us.
        let _ = self.wake.read();
        let job = || self.jobs.try_recv().ok().map(Event::Job);
        let event = self.put_back.pop_front().or_else(job);
        event.or_else(|| self.signals.next().map(Event::Signal))
    }

    /// Has `event` come again.
    pub(super) fn put_back(&mut self, event: Event) {
        self.put_back.push_back(event);
    }

    /// Hears no more of the machine's process.
    pub(super) fn hang_up(&mut self) {
        self.link = None;
    }

    fn hear(&mut self) -> Option<Event> {
        let link = self.link.as_ref()?;
        if !link.has_something() {
            return None;
        }
        match link.hear() {
            Ok(Some(told)) => Some(Event::Told(told)),
            Ok(None) => {
                self.link = None;
                Some(Event::Gone)
            }
            Err(_) => {
                self.link = None;
                Some(Event::Nonsense)
            }
        }
    }

    fn wait(&self, timeout: Option<Timespec>) {
        // SAFETY: the event is open for as long as `self`.
        let wake = unsafe { BorrowedFd::borrow_raw(self.wake.as_raw_fd()) };
        let mut fds = vec![
            PollFd::new(&wake, PollFlags::IN),
            PollFd::new(&self.signals, PollFlags::IN),
        ];
        if let Some(link) = &self.link {
            fds.push(PollFd::new(link, PollFlags::IN));
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => tracing::error!(%error, "cannot wait for events"),
        }
    }
}
