//! What the queues' thread shares with the rest of the program.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Port;
use super::blocking::wait;
use super::input::Input;
use super::output::Output;

/// The host's side of a port. It outlives resets of the device.
pub(super) struct HostPort {
    pub(super) name: String,
    pub(super) is_console: bool,
    pub(super) input: Option<Arc<Input>>,
    pub(super) output: Arc<Output>,
}

#[derive(Default)]
struct State {
    /// The queues' thread runs.
    running: bool,
    /// Number of the newest drain that was asked for, and of the newest that is done.
    drain_asked: u64,
    drain_done: u64,
}

pub(super) struct Hub {
    pub(super) ports: Vec<HostPort>,
    pub(super) wake: EventFd,
    state: Mutex<State>,
    changed: Condvar,
}

impl Hub {
    pub(super) fn new(ports: Vec<Port>) -> io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let host_port = |port: Port| {
            let Port {
                name,
                is_console,
                input,
                output,
            } = port;
            let shared = input.is_some();
            let output = Output::new(&name, output, shared, wake.try_clone()?);
            let input = match input {
                Some(input) => Some(Arc::new(Input::new(&name, input, wake.try_clone()?))),
                None => None,
            };
            Ok(HostPort {
                name,
                is_console,
                input,
                output: Arc::new(output),
            })
        };
        let ports = ports
            .into_iter()
            .map(host_port)
            .collect::<io::Result<_>>()?;
        Ok(Self {
            ports,
            wake,
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    pub(super) fn set_running(&self, running: bool) {
        self.state().running = running;
        self.changed.notify_all();
    }

    /// The newest drain that was asked for, if it is not done.
    pub(super) fn wanted_drain(&self) -> Option<u64> {
        let state = self.state();
        (state.drain_asked > state.drain_done).then_some(state.drain_asked)
    }

    pub(super) fn drain_done(&self, number: u64) {
        self.state().drain_done = number;
        self.changed.notify_all();
    }

    /// Lets the readers and writers of every port go when they are done.
    pub(super) fn close(&self) {
        for port in &self.ports {
            port.output.end();
            if let Some(input) = &port.input {
                input.close();
            }
        }
    }

    fn wake(&self) {
        // Fails only when the counter is full: then it is awake already.
        let _ = self.wake.write(1);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The VMM's hold on a console that belongs to the guest's bus.
#[derive(Clone)]
pub struct ConsoleHandle(pub(super) Arc<Hub>);

impl ConsoleHandle {
    /// Waits until everything that the guest has put into output queues so far has been written
    /// to the host's descriptors, or cannot be any more. False if that took longer than
    /// `timeout`, as it does when a peer does not read.
    pub fn drain(&self, timeout: Option<Duration>) -> bool {
        let hub = &self.0;
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = hub.state();
        state.drain_asked += 1;
        let number = state.drain_asked;
        hub.wake();
        // Without the thread the driver has taken its buffers back.
        while state.running && state.drain_done < number {
            state = match wait(&hub.changed, state, deadline) {
                Some(state) => state,
                None => return false,
            };
        }
        drop(state);
        hub.ports.iter().all(|port| port.output.settle(deadline))
    }
}
