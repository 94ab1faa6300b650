//! The process that the guest runs in: it has the machine, its devices and its disks, and nothing
//! else of the host. What a run is about (its deadlines, its command, its end) is the session's.

mod console;
mod input;
pub(crate) mod link;
pub(crate) mod process;
mod sink;
mod workers;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use cowshed_devices::virtio::block::{Block, BlockStats, Options};
use cowshed_devices::virtio::console::{Console as ConsoleDevice, ConsoleHandle, Port};
use cowshed_devices::virtio::rng::Rng;
use cowshed_guest_protocol::{CONTROL_PORT, STDERR_PORT, STDIN_PORT, STDOUT_PORT};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::config;
use crate::disk::Disks;
use crate::guest::{self, Guest};
use crate::machine::{self, Machine, RunningMachine};
use crate::report::chain;
use crate::sandbox::{self, Identity, Sandbox};
use crate::stderr::Stderr;
use console::Console;
use input::Typed;
use link::{Closed, Link, Order, Told};
use sink::Closer;
use workers::Workers;

/// What a machine is made of, all of it open.
pub(crate) struct Parts {
    /// When the run began.
    pub(crate) begin: Instant,
    /// What is open in this copy of the session's process and not for the machine: nothing here
    /// refers to it.
    pub(crate) left_open: Vec<RawFd>,
    /// Memory, vCPUs, the kind of KVM.
    pub(crate) machine: machine::Config,
    /// What boots.
    pub(crate) guest: Guest,
    /// The disks.
    pub(crate) disks: Disks,
    /// Where the console is logged.
    pub(crate) console_log: Option<File>,
    /// Who uses the guest.
    pub(crate) user: User,
    /// What it is kept from.
    pub(crate) sandbox: config::Sandbox,
    /// Whose rights it has; `None`: ours.
    pub(crate) identity: Option<Identity>,
}

/// Who uses the guest.
pub(crate) enum User {
    /// Somebody at its console, on our standard input and output.
    Console {
        /// They are a terminal: the escape is looked for.
        terminal: bool,
    },
    /// A command on our standard streams, started over this socket.
    Command(OwnedFd),
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Machine(#[from] machine::Error),
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
}

/// Runs the machine until the session has it put away, or is gone.
pub(crate) fn run(parts: Parts, link: Link<Told, Order>) {
    let begin = parts.begin;
    // SAFETY: as the field says.
    unsafe { sandbox::inherited::close(&parts.left_open) };
    match Monitor::start(parts, link.clone()) {
        Ok(monitor) => {
            let started = monitor.machine.started.duration_since(begin);
            link.tell(&Told::Started(started));
            monitor.serve();
        }
        Err(error) => link.tell(&Told::Failed(chain(&error))),
    }
}

/// A machine whose guest has started.
struct Monitor {
    link: Link<Told, Order>,
    machine: RunningMachine,
    sandbox: Sandbox,
    workers: Arc<Workers>,
    disks: Disks,
    stats: Vec<Arc<BlockStats>>,
    console: Console,
    /// Until there is something typed.
    typed: Option<Typed>,
    /// Of the console.
    copies: Closer,
    streams: Option<ConsoleHandle>,
}

impl Monitor {
    fn start(parts: Parts, link: Link<Told, Order>) -> Result<Self, Error> {
        let io = |what| move |source| Error::Io(what, source);
        let interactive = matches!(parts.user, User::Console { .. });
        let copies = Closer::new().map_err(io("make an event"))?;
        let log = parts.console_log.map(|log| copies.sink(log.into()));
        let screen = interactive.then(|| {
            let stdout = io::stdout().as_fd().try_clone_to_owned()?;
            copies.sink(stdout)
        });
        let sinks: io::Result<_> = log.into_iter().chain(screen).collect();
        let tell = link.clone();
        let console = Console::new(sinks.map_err(io("copy the console"))?, move |message| {
            tell.tell(&Told::Panic(message.to_owned()));
        });

        let (tell, shown) = (link.clone(), console.clone());
        let end = Arc::new(move |how| {
            let panic = shown.panic();
            tell.tell(&Told::Ending { how, panic });
        });
        let host = parts.machine.virtualization;
        let workers = Arc::new(Workers::new().map_err(io("make an event"))?);
        let mut machine = Machine::new(parts.machine, end, workers.clone())?;
        let serial = machine.add_serial(Box::new(console.clone()))?;
        let mut stats = Vec::new();
        for disk in parts.disks.devices() {
            let counters = Arc::new(BlockStats::default());
            let options = Options {
                name: format!("blk{}", stats.len()),
                ..disk.options
            };
            let device = Block::new(disk.disk, options, counters.clone());
            stats.push(counters);
            machine.add_virtio(Box::new(device))?;
        }
        let mut streams = None;
        let terminal = match parts.user {
            User::Console { terminal } => Some(terminal),
            User::Command(control) => {
                let ports = ports(control).map_err(io("pass on a standard stream"))?;
                let (device, handle) =
                    ConsoleDevice::new(ports).map_err(io("make the guest's streams"))?;
                machine.add_virtio(Box::new(device))?;
                streams = Some(handle);
                None
            }
        };
        machine.add_virtio(Box::new(Rng::new()))?;
        let (kernel, initrd) = (parts.guest.kernel(), parts.guest.initrd());
        let unpacked = guest::unpacked_kernels();
        machine.load(kernel, &initrd, &parts.guest.cmdline, unpacked.as_ref())?;

        // A panic's words, without the backtrace that would open files.
        std::panic::set_hook(Box::new(|panic| {
            let _ = writeln!(Stderr, "cowshed: {panic}");
        }));
        let sandbox = Sandbox::enter(&parts.sandbox, parts.identity, host)?;
        let machine = machine.start(sandbox)?;
        Ok(Self {
            link,
            machine,
            sandbox,
            workers,
            disks: parts.disks,
            stats,
            console,
            typed: terminal.map(|terminal| Typed::new(serial, terminal)),
            copies,
            streams,
        })
    }

    /// Makes threads for the devices and for what is typed, and does what the session orders.
    fn serve(mut self) {
        loop {
            // SAFETY: the event is open for as long as `self`.
            let wake = unsafe { BorrowedFd::borrow_raw(self.workers.wake().as_raw_fd()) };
            let stdin = io::stdin();
            let mut fds = vec![
                PollFd::new(&self.link, PollFlags::IN),
                PollFd::new(&wake, PollFlags::IN),
            ];
            if self.typed.is_some() {
                fds.push(PollFd::new(&stdin, PollFlags::IN));
            }
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return tracing::error!(%error, "cannot wait for the session"),
            }
            let happened = |index| {
                fds.get(index)
                    .is_some_and(|fd: &PollFd| !fd.revents().is_empty())
            };
            let [ordered, wanted, typing] = [0, 1, 2].map(happened);
            if wanted {
                self.workers.serve(self.sandbox);
            }
            if typing && let Some(typed) = self.typed.take() {
                let escape = self.link.clone();
                typed.forward(move || escape.tell(&Told::Escaped));
            }
            if !ordered {
                continue;
            }
            match self.link.hear() {
                Ok(Some(Order::Stop)) => self.stop(),
                Ok(Some(Order::Close { keep })) => return self.close(keep),
                // The session is gone, and nobody is left to care for the guest.
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// From here on nothing of the guest moves but what it has already said.
    fn stop(&mut self) {
        self.copies.close();
        self.typed = None;
        self.workers.close();
        self.machine.stop_vcpus();
        let link = self.link.clone();
        let Some(streams) = self.streams.take() else {
            return link.tell(&Told::Drained);
        };
        let thread = thread::Builder::new()
            .name("drain".to_owned())
            .spawn(move || {
                streams.drain(None);
                link.tell(&Told::Drained);
            });
        if let Err(error) = thread {
            tracing::warn!(%error, "output of the guest may be lost");
            self.link.tell(&Told::Drained);
        }
    }

    fn close(self, keep: bool) {
        let Self {
            link,
            machine,
            disks,
            stats,
            console,
            ..
        } = self;
        machine.stop_devices();
        let overlay_size = disks.close(keep);
        // What takes long to take down is let go last, when nobody waits for it any more.
        let _shell = machine.shell();
        // The images write out their tables and the readers of our output learn of its end when the
        // last holds of them go: before the following, with which the run is over.
        drop(machine);
        process::close_streams();
        link.tell(&Told::Closed(Closed {
            bytes_read: stats.iter().map(|stats| stats.read()).sum(),
            bytes_written: stats.iter().map(|stats| stats.written()).sum(),
            overlay_size: overlay_size.map_err(|error| chain(&error)),
            last_lines: console.last_lines(),
        }));
    }
}

/// The command's streams are our own; what PID 1 says goes over `control`.
fn ports(control: OwnedFd) -> io::Result<Vec<Port>> {
    let stdin = io::stdin().as_fd().try_clone_to_owned()?;
    let stdout = io::stdout().as_fd().try_clone_to_owned()?;
    let stderr = io::stderr().as_fd().try_clone_to_owned()?;
    let control_input = control.try_clone()?;
    let port = |name: &str, input, output| Port {
        name: name.to_owned(),
        input,
        output,
        ..Port::default()
    };
    Ok(vec![
        port(STDIN_PORT, Some(stdin), None),
        port(STDOUT_PORT, None, Some(stdout)),
        port(STDERR_PORT, None, Some(stderr)),
        port(CONTROL_PORT, Some(control_input), Some(control)),
    ])
}
