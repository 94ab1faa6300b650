//! The thread that serves the console's queues.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use vm_memory::GuestMemoryError;

use super::control::{self, FromDriver, ToDriver};
use super::hub::{HostPort, Hub};
use super::output::{LAST_LIMIT, LIMIT};
use crate::poll;
use crate::virtio::Memory;
use crate::virtio::buffers::Buffers;
use crate::virtio::device::Activation;
use crate::virtio::queue::{self, Chain, VirtQueue};
use crate::virtio::worker::Stop;

/// Bytes copied from guest memory at a time.
const COPY: usize = 64 << 10;

/// Why the device gave up.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error(transparent)]
    Queue(#[from] queue::Error),
    #[error("console buffer is not in guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    #[error("cannot wait for the guest: {0}")]
    Wait(#[from] io::Error),
}

/// The guest's side of a port, from one start of the driver to the next.
#[derive(Default)]
struct Session {
    receive: Option<VirtQueue>,
    transmit: Option<VirtQueue>,
    /// A program in the guest has the port open.
    guest_open: bool,
    /// The guest thinks that the host has it open.
    host_open: bool,
    /// The guest has closed it; its last output may still be in the queue.
    closing: bool,
    /// The chain that is being sent, and how much of it is done.
    current: Option<(Chain, u64)>,
}

/// A drain that is under way: its number, and where each transmit queue was when it began.
struct Drain {
    number: u64,
    targets: Vec<Option<u16>>,
}

pub(super) struct Service {
    hub: Arc<Hub>,
    memory: Memory,
    multiport: bool,
    sessions: Vec<Session>,
    control_receive: Option<VirtQueue>,
    control_transmit: Option<VirtQueue>,
    /// Messages that wait for a buffer of the driver's.
    outbox: VecDeque<Vec<u8>>,
    drain: Option<Drain>,
    copy: Vec<u8>,
}

impl Service {
    pub(super) fn new(hub: Arc<Hub>, mut activation: Activation, multiport: bool) -> Self {
        let mut sessions: Vec<_> = hub.ports.iter().map(|_| Session::default()).collect();
        let mut queues = activation.queues.iter_mut().map(Option::take);
        let mut pair = || (queues.next().flatten(), queues.next().flatten());
        // Port 0, control, then the other ports.
        let first = pair();
        let (control_receive, control_transmit) = pair();
        let pairs = std::iter::once(first).chain(std::iter::repeat_with(pair));
        for (session, (receive, transmit)) in sessions.iter_mut().zip(pairs) {
            (session.receive, session.transmit) = (receive, transmit);
        }
        if !multiport && let Some(only) = sessions.first_mut() {
            (only.guest_open, only.host_open) = (true, true);
        }
        Self {
            hub,
            memory: activation.memory,
            multiport,
            sessions,
            control_receive,
            control_transmit,
            outbox: VecDeque::new(),
            drain: None,
            copy: Vec::new(),
        }
    }

    /// Serves the queues until `stop` is signalled, then takes over what output is left.
    pub(super) fn run(&mut self, stop: &Stop) -> Result<(), Error> {
        while !stop.is_set() {
            self.begin_drain()?;
            let more = self.turn()?;
            self.finish_drain()?;
            // A drain that was asked for during another begins when that one is done.
            let next_drain = self.drain.is_none() && self.hub.wanted_drain().is_some();
            if !more && !next_drain {
                self.wait(stop)?;
            }
        }
        for index in 0..self.sessions.len() {
            self.transmit(index, LAST_LIMIT)?;
        }
        Ok(())
    }

    /// Does what can be done without waiting; true if there is more.
    fn turn(&mut self) -> Result<bool, Error> {
        let mut more = self.hear()?;
        for index in 0..self.sessions.len() {
            more |= self.transmit(index, LIMIT)?;
            more |= self.receive(index)?;
        }
        self.close_broken();
        more |= self.tell()?;
        Ok(more)
    }

    fn wait(&self, stop: &Stop) -> Result<(), Error> {
        let queues = self
            .sessions
            .iter()
            .flat_map(|port| [&port.receive, &port.transmit]);
        let queues = queues
            .chain([&self.control_receive, &self.control_transmit])
            .flatten();
        let mut events: Vec<_> = queues.map(VirtQueue::doorbell).collect();
        events.push(&self.hub.wake);
        events.push(stop.event());
        poll::wait(&events, -1)?;
        for event in events.iter().take(events.len() - 1) {
            // "Would block" says that it was another.
            let _ = event.read();
        }
        Ok(())
    }

    /// Hears what the driver says. Stops while it does not take the answers.
    fn hear(&mut self) -> Result<bool, Error> {
        let Some(mut queue) = self.control_transmit.take() else {
            return Ok(false);
        };
        let answers = 4 * self.sessions.len();
        let mut more = false;
        for _ in 0..queue.size() {
            if self.outbox.len() > answers {
                break;
            }
            let Some(chain) = queue.pop()? else {
                more = queue.enable_doorbell()?;
                break;
            };
            let mut message = [0; control::HEADER];
            let len = chain.readable.read(&self.memory, 0, &mut message)?;
            queue.complete(&chain, 0)?;
            if len == message.len()
                && let Some(message) = FromDriver::decode(message)
            {
                self.act(message);
            }
        }
        queue.notify()?;
        self.control_transmit = Some(queue);
        Ok(more)
    }

    fn act(&mut self, message: FromDriver) {
        match message {
            FromDriver::DeviceReady => {
                for port in 0..self.sessions.len() {
                    self.say(port, &ToDriver::Add);
                }
            }
            FromDriver::PortReady(port) => self.introduce(port as usize),
            FromDriver::PortOpen(port, open) => {
                let port = port as usize;
                if let Some(session) = self.sessions.get_mut(port) {
                    session.guest_open = open;
                    let is_console = self.hub.ports.get(port).is_some_and(|port| port.is_console);
                    session.closing |= !open && !is_console;
                }
            }
        }
    }

    /// Says what there is to know of a port that the driver has set up.
    fn introduce(&mut self, index: usize) {
        let hub = Arc::clone(&self.hub);
        let Some(port) = hub.ports.get(index) else {
            return;
        };
        if port.is_console {
            self.say(index, &ToDriver::Console);
        }
        self.say(index, &ToDriver::Name(&port.name));
        let over = port.input.as_ref().is_some_and(|input| input.is_over());
        if !over && let Some(session) = self.sessions.get_mut(index) {
            session.host_open = true;
            self.say(index, &ToDriver::Open(true));
        }
    }

    fn say(&mut self, port: usize, message: &ToDriver<'_>) {
        if self.multiport {
            self.outbox.push_back(message.encode(port as u32));
        }
    }

    /// Sends messages as far as there are buffers for them.
    fn tell(&mut self) -> Result<bool, Error> {
        let Some(queue) = &mut self.control_receive else {
            return Ok(false);
        };
        let mut sent = false;
        while let Some(message) = self.outbox.front() {
            let Some(chain) = queue.pop()? else {
                if queue.enable_doorbell()? {
                    continue;
                }
                break;
            };
            let len = chain.writable.write(&self.memory, 0, message)?;
            queue.complete(&chain, len as u32)?;
            self.outbox.pop_front();
            sent = true;
        }
        if sent {
            queue.notify()?;
        }
        // The driver may have been kept waiting for these.
        Ok(sent)
    }

    /// Takes the guest's output, at most `limit` bytes of it and as long as less than that are
    /// held; true if there is more that could be taken at once.
    fn transmit(&mut self, index: usize, limit: usize) -> Result<bool, Error> {
        let (Some(session), Some(port)) = (self.sessions.get_mut(index), self.hub.ports.get(index))
        else {
            return Ok(false);
        };
        let Some(queue) = &mut session.transmit else {
            return Ok(false);
        };
        let mut completed = false;
        let mut more = true;
        let mut budget = limit as u64;
        for _ in 0..queue.size() {
            let (chain, done) = match session.current.take() {
                Some(current) => current,
                None => match queue.pop()? {
                    Some(chain) => (chain, 0),
                    None => {
                        more = queue.enable_doorbell()?;
                        break;
                    }
                },
            };
            let data = chain.readable.part(done, budget);
            let sent = send(port, &data, limit, &self.memory, &mut self.copy)?;
            budget -= sent;
            if done + sent < chain.readable.len() {
                session.current = Some((chain, done + sent));
                more = sent == data.len();
                break;
            }
            queue.complete(&chain, 0)?;
            completed = true;
        }
        if completed {
            queue.notify()?;
        }
        if session.closing && session.current.is_none() && !queue.has_available()? {
            session.closing = false;
            port.output.end();
        }
        Ok(more)
    }

    /// Gives the guest input while it has buffers and a reader; true if there is more to do.
    fn receive(&mut self, index: usize) -> Result<bool, Error> {
        let (Some(session), Some(port)) = (self.sessions.get_mut(index), self.hub.ports.get(index))
        else {
            return Ok(false);
        };
        let (Some(queue), Some(input)) = (&mut session.receive, &port.input) else {
            return Ok(false);
        };
        if !session.guest_open {
            return Ok(false);
        }
        let mut completed = false;
        let mut more = true;
        for _ in 0..queue.size() {
            if !queue.has_available()? {
                more = queue.enable_doorbell()?;
                break;
            }
            if !input.poll() {
                more = false;
                break;
            }
            let Some(chain) = queue.pop()? else { break };
            let memory = &self.memory;
            input.give(|bytes| {
                let len = chain.writable.write(memory, 0, bytes)?;
                queue.complete(&chain, len as u32)?;
                Ok::<_, Error>(len)
            })?;
            completed = true;
        }
        if completed {
            queue.notify()?;
        }
        if session.host_open && input.is_over() {
            session.host_open = false;
            self.say(index, &ToDriver::Open(false));
        }
        Ok(more)
    }

    /// Closes the ports whose output nobody reads any more.
    fn close_broken(&mut self) {
        for index in 0..self.sessions.len() {
            let (Some(session), Some(port)) =
                (self.sessions.get_mut(index), self.hub.ports.get(index))
            else {
                return;
            };
            if session.host_open && port.input.is_none() && port.output.is_broken() {
                session.host_open = false;
                self.say(index, &ToDriver::Open(false));
            }
        }
    }

    fn begin_drain(&mut self) -> Result<(), Error> {
        if let (None, Some(number)) = (&self.drain, self.hub.wanted_drain()) {
            let target = |session: &Session| match &session.transmit {
                Some(queue) => queue.position().map(|(available, _)| Some(available)),
                None => Ok(None),
            };
            let targets = self.sessions.iter().map(target).collect::<Result<_, _>>()?;
            self.drain = Some(Drain { number, targets });
        }
        Ok(())
    }

    fn finish_drain(&mut self) -> Result<(), Error> {
        let Some(drain) = &self.drain else {
            return Ok(());
        };
        for (session, target) in self.sessions.iter().zip(&drain.targets) {
            if let (Some(queue), Some(target)) = (&session.transmit, target) {
                let (_, next) = queue.position()?;
                let done = next.wrapping_sub(u16::from(session.current.is_some()));
                // Indices wrap; a queue has at most half as many entries.
                if done.wrapping_sub(*target) > u16::MAX / 2 {
                    return Ok(());
                }
            }
        }
        self.hub.drain_done(drain.number);
        self.drain = None;
        Ok(())
    }
}

/// Passes on as much of `data` as there is room for; returns how much that is.
fn send(
    port: &HostPort,
    data: &Buffers,
    limit: usize,
    memory: &Memory,
    copy: &mut Vec<u8>,
) -> Result<u64, Error> {
    let len = data.len();
    let mut done = 0;
    while done < len {
        let room = port.output.room(limit).min(COPY);
        if room == 0 {
            break;
        }
        copy.resize(room.min((len - done) as usize), 0);
        done += data.read(memory, done, copy)? as u64;
        port.output.push(copy);
    }
    Ok(done)
}
