//! One run, from its configuration to its report: builds the machine, then waits for whatever
//! comes first: a status, an ending, a signal, a deadline.

mod console;
mod guest;
mod input;
mod job;
mod screen;
mod signals;

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use cowshed_devices::virtio::block::{Block, BlockStats, Options};
use cowshed_devices::virtio::console::{Console as ConsoleDevice, ConsoleHandle, Port};
use cowshed_devices::virtio::rng::Rng;
use cowshed_guest_protocol::{CONTROL_PORT, STDERR_PORT, STDIN_PORT, STDOUT_PORT};

use crate::config;
use crate::disk::{self, Disks};
use crate::exit::Ending;
use crate::host::Virtualization;
use crate::machine::{self, Machine, RunningMachine};
use crate::report::{Measures, Outcome, Report, chain};
use crate::stderr::Stderr;
use crate::terminal;
use console::Console;
use job::{Conversation, Job};
use screen::{Closer, Screen};
use signals::Patience;

/// How long a guest may take to say hello, by the kind of host.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
const BOOT_TIMEOUT_EMULATED: Duration = Duration::from_secs(600);
/// Guest memory when nobody says how much, by the kind of host: the guest's kernel prepares each
/// page of it, which an emulator does slowly.
const MEMORY: u64 = 1 << 30;
const MEMORY_EMULATED: u64 = 128 << 20;
/// How long a reader that does read has for the last output after `--timeout`.
const DRAIN_GRACE: Duration = Duration::from_secs(1);
/// Stands for "never" in arithmetic with instants.
const NEVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Why a run did not come to a machine that runs.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Machine(#[from] machine::Error),
    #[error(transparent)]
    Disk(#[from] disk::Error),
    #[error(transparent)]
    Guest(#[from] guest::Error),
    #[error("cannot write the console log {}", .0.display())]
    ConsoleLog(PathBuf, #[source] io::Error),
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
}

/// What can happen to a run.
enum Event {
    Ending(Ending),
    ConsolePanic,
    Job(job::Event),
    Signal(u8),
    Escape,
    Drained,
}

/// Runs one guest to its end.
pub fn run(config: &config::Run) -> Report {
    let begin = Instant::now();
    match Session::start(config, begin) {
        Ok(session) => session.finish(),
        Err(error) => Outcome::VmmError(chain(&error)).into(),
    }
}

/// A run whose guest has started.
struct Session<'a> {
    config: &'a config::Run,
    begin: Instant,
    /// When the guest must have said hello.
    boot_deadline: Instant,
    boot_timeout: Duration,
    run_deadline: Instant,
    events: Receiver<Event>,
    sender: Sender<Event>,
    machine: RunningMachine,
    disks: Disks,
    stats: Vec<Arc<BlockStats>>,
    console: Console,
    screen: Option<Closer>,
    streams: Option<ConsoleHandle>,
    conversation: Option<Conversation>,
    terminal: Option<terminal::RawMode>,
    measures: Measures,
    command_started: bool,
    patience: Patience,
}

impl<'a> Session<'a> {
    fn start(config: &'a config::Run, begin: Instant) -> Result<Self, Error> {
        let (sender, events) = mpsc::channel();
        let virtualization = Virtualization::of_host();
        // Disks before the kernel, which may take minutes to make: mistakes show at once.
        let disks = disk::open(config, guest::root_image(config)?.as_deref())?;
        let guest = guest::prepare(config, virtualization)?;

        // Before any other thread, which inherits that these are blocked; but not before guests are
        // made, which takes minutes that Ctrl-C should end.
        let signal_sender = sender.clone();
        signals::forward(move |number| {
            let _ = signal_sender.send(Event::Signal(number));
        })
        .map_err(|source| Error::Io("watch for signals", source))?;

        let suited = match virtualization {
            Virtualization::Hardware => MEMORY,
            Virtualization::Emulated => MEMORY_EMULATED,
        };
        let end = sender.clone();
        let mut machine = Machine::new(
            machine::Config {
                memory: config.memory.unwrap_or(suited),
                cpus: config.cpus,
                virtualization,
            },
            Arc::new(move |ending| {
                let _ = end.send(Event::Ending(ending));
            }),
        )?;
        let screen = config.command.is_none().then(Screen::new).transpose();
        let screen = screen.map_err(|source| Error::Io("use standard output", source))?;
        let (screen, closer) = screen.unzip();
        let console = open_console(config, screen, sender.clone())?;
        let serial = machine.add_serial(Box::new(console.clone()))?;
        let mut stats = Vec::new();
        for disk in disks.devices() {
            let counters = Arc::new(BlockStats::default());
            let options = Options {
                name: format!("blk{}", stats.len()),
                never_sync: disk.never_sync,
            };
            let device = Block::new(disk.disk.clone(), options, counters.clone());
            stats.push(counters);
            machine.add_virtio(Box::new(device))?;
        }
        let mut streams = None;
        let mut conversation = None;
        if let Some(command) = &config.command {
            let (ours, theirs) =
                UnixStream::pair().map_err(|source| Error::Io("make the control port", source))?;
            let (device, handle) = ConsoleDevice::new(ports(theirs)?)
                .map_err(|source| Error::Io("make the guest's streams", source))?;
            machine.add_virtio(Box::new(device))?;
            streams = Some(handle);
            let tell = sender.clone();
            let tell = move |event| {
                let _ = tell.send(Event::Job(event));
            };
            let started = Conversation::start(job(config, command), ours, tell);
            conversation = Some(started.map_err(|source| Error::Io("talk to the guest", source))?);
        }
        machine.add_virtio(Box::new(Rng::new()))?;
        let unpacked = guest::unpacked_kernels();
        machine.load(
            guest.kernel(),
            &guest.initrd(),
            &guest.cmdline,
            unpacked.as_ref(),
        )?;

        let mut raw_mode = None;
        if config.command.is_none() {
            raw_mode = raw_terminal().map_err(|source| Error::Io("set up the terminal", source))?;
            let escape = sender.clone();
            input::forward(serial, raw_mode.is_some(), move || {
                let _ = escape.send(Event::Escape);
            })
            .map_err(|source| Error::Io("read standard input", source))?;
        }
        let machine = machine.start()?;
        let boot_timeout = match (config.boot_timeout, &config.command, virtualization) {
            (Some(limit), ..) => limit,
            (None, None, _) => NEVER,
            (None, Some(_), Virtualization::Hardware) => BOOT_TIMEOUT,
            (None, Some(_), Virtualization::Emulated) => BOOT_TIMEOUT_EMULATED,
        };
        let first_instruction = Some(machine.started.duration_since(begin));
        Ok(Self {
            config,
            begin,
            boot_deadline: machine.started + boot_timeout.min(NEVER),
            boot_timeout,
            run_deadline: begin + config.timeout.unwrap_or(NEVER).min(NEVER),
            events,
            sender,
            machine,
            disks,
            stats,
            console,
            screen: closer,
            streams,
            conversation,
            terminal: raw_mode,
            measures: Measures {
                first_instruction,
                ..Measures::default()
            },
            command_started: false,
            patience: Patience::default(),
        })
    }

    /// Waits for the end and puts everything away.
    fn finish(mut self) -> Report {
        let mut outcome = self.wait();
        self.measures.end = Some(self.begin.elapsed());
        if let Some(screen) = &self.screen {
            screen.close();
        }
        // From here on nothing of the guest moves but what it has already said.
        self.machine.stop_vcpus();
        self.drain();
        self.machine.stop_devices();
        if let Some(conversation) = self.conversation.take() {
            conversation.end();
        }
        if matches!(
            outcome,
            Outcome::EndedWithoutStatus(_) | Outcome::BootFailed(_)
        ) {
            // A guest says its status and powers off: the second may have been heard first.
            outcome = self.late_status().unwrap_or(outcome);
        }
        for stats in &self.stats {
            self.measures.bytes_read += stats.read();
            self.measures.bytes_written += stats.written();
        }
        drop(self.terminal.take());
        self.show_last_lines(&outcome);
        match self.disks.close(outcome.failed()) {
            Ok(overlay_size) => self.measures.overlay_size = overlay_size,
            Err(error) => {
                outcome = Outcome::VmmError(chain(&error));
            }
        }
        Report {
            outcome,
            measures: self.measures,
        }
    }

    fn wait(&mut self) -> Outcome {
        loop {
            let begun = self.measures.pid1.is_some();
            let deadline = if begun {
                self.run_deadline
            } else {
                self.run_deadline.min(self.boot_deadline)
            };
            let event = match self
                .events
                .recv_timeout(deadline.duration_since(Instant::now()))
            {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => continue,
                Err(_) if Instant::now() >= self.run_deadline => {
                    return Outcome::Timeout(self.config.timeout.unwrap_or_default());
                }
                Err(_) => {
                    let limit = self.boot_timeout.as_secs_f64();
                    let why = format!("no sign of the guest's init within --boot-timeout {limit}s");
                    return Outcome::BootFailed(why);
                }
            };
            if let Some(outcome) = self.heard(event) {
                return outcome;
            }
        }
    }

    fn heard(&mut self, event: Event) -> Option<Outcome> {
        match event {
            Event::Ending(ending) => return Some(self.ended(&ending)),
            // A person may look at old logs on an interactive console.
            Event::ConsolePanic if self.config.command.is_some() => {
                return Some(Outcome::Panic(self.panic_message()));
            }
            Event::Job(job::Event::Hello) => self.measures.pid1 = Some(self.begin.elapsed()),
            Event::Job(job::Event::Started) => self.command_started = true,
            Event::Job(event) => return Some(job_outcome(event)),
            Event::Escape => return Some(Outcome::Escaped),
            Event::Signal(number) => match &self.conversation {
                Some(conversation) if self.command_started => {
                    if self.patience.ends_with(number, Instant::now()) {
                        // Nor is anybody to wait for a reader of its output.
                        self.run_deadline = Instant::now();
                        return Some(Outcome::Signaled(number));
                    }
                    conversation.signal(number);
                }
                _ => return Some(Outcome::Signaled(number)),
            },
            Event::ConsolePanic | Event::Drained => {}
        }
        None
    }

    fn ended(&self, ending: &Ending) -> Outcome {
        let command = self.config.command.is_some();
        let said_hello = self.measures.pid1.is_some();
        match ending {
            Ending::Panic => Outcome::Panic(self.panic_message()),
            // A kernel that panicked resets: panic=-1 is on its command line.
            Ending::Reset | Ending::TripleFault if self.console.panic().is_some() => {
                Outcome::Panic(self.panic_message())
            }
            Ending::PowerOff if !command => Outcome::PoweredOff,
            Ending::Reset if !command => Outcome::Reset,
            Ending::PowerOff | Ending::Reset if said_hello => {
                Outcome::EndedWithoutStatus(ending.to_string())
            }
            _ if self.command_started => Outcome::EndedWithoutStatus(ending.to_string()),
            _ => Outcome::BootFailed(ending.to_string()),
        }
    }

    fn panic_message(&self) -> String {
        self.console.panic().unwrap_or_default()
    }

    /// Waits until the host has taken what the guest has written to its streams. A reader that
    /// does not read keeps us, as it would keep any program, until the timeout or a signal.
    fn drain(&mut self) {
        let Some(streams) = self.streams.take() else {
            return;
        };
        let done = self.sender.clone();
        let thread = thread::Builder::new()
            .name("drain".to_owned())
            .spawn(move || {
                streams.drain(None);
                let _ = done.send(Event::Drained);
            });
        if let Err(error) = thread {
            tracing::warn!(%error, "output of the guest may be lost");
            return;
        }
        let deadline = self.run_deadline.max(Instant::now() + DRAIN_GRACE);
        let mut late = Vec::new();
        loop {
            match self
                .events
                .recv_timeout(deadline.duration_since(Instant::now()))
            {
                Ok(Event::Drained | Event::Signal(_)) | Err(_) => break,
                Ok(event) => late.push(event),
            }
        }
        late.into_iter().for_each(|event| {
            let _ = self.sender.send(event);
        });
    }

    /// The status, if the guest's last words held one.
    fn late_status(&self) -> Option<Outcome> {
        self.events.try_iter().find_map(|event| match event {
            Event::Job(job::Event::Hello | job::Event::Started | job::Event::Closed) => None,
            Event::Job(event) => Some(job_outcome(event)),
            _ => None,
        })
    }

    /// What a person needs to see why there was no status; an interactive run showed it already.
    fn show_last_lines(&self, outcome: &Outcome) {
        let unexplained = matches!(
            outcome,
            Outcome::BootFailed(_) | Outcome::EndedWithoutStatus(_) | Outcome::Panic(_)
        );
        if unexplained && self.config.command.is_some() {
            for line in self.console.last_lines() {
                // Standard error may be closed.
                let _ = Stderr.write_all(format!("  | {line}\n").as_bytes());
            }
        }
    }
}

fn job_outcome(event: job::Event) -> Outcome {
    match event {
        job::Event::Exited(status) => Outcome::Exited(status),
        job::Event::Signaled(number) => Outcome::Signaled(number),
        job::Event::Failed(failure, message) => match failure.shell_status() {
            Some(status) => {
                // As a shell would say it: the command's own standard error.
                let _ = Stderr.write_all(format!("cowshed: {message}\n").as_bytes());
                Outcome::Exited(status)
            }
            None => Outcome::BootFailed(message),
        },
        job::Event::Broken(why) => Outcome::VmmError(why),
        job::Event::Hello | job::Event::Started | job::Event::Closed => {
            Outcome::EndedWithoutStatus("its init hung up".to_owned())
        }
    }
}

fn job(config: &config::Run, command: &[std::ffi::OsString]) -> Job {
    Job {
        command: command.to_vec(),
        env: config.env.clone(),
        cwd: config.cwd.clone(),
        copy_in: config.copy_in.clone(),
        copy_out: config.copy_out.clone(),
    }
}

/// The console's log is the file of `--console-log`; an interactive run shows it on the screen.
fn open_console(
    config: &config::Run,
    screen: Option<Screen>,
    sender: Sender<Event>,
) -> Result<Console, Error> {
    let log = config
        .console_log
        .as_ref()
        .map(|path| File::create(path).map_err(|source| Error::ConsoleLog(path.clone(), source)));
    let screen = screen.map(|screen| Box::new(screen) as Box<dyn Write + Send>);
    Ok(Console::new(log.transpose()?, screen, move || {
        let _ = sender.send(Event::ConsolePanic);
    }))
}

/// The terminal, if there is one: without, the guest's console takes what comes on stdin.
fn raw_terminal() -> io::Result<Option<terminal::RawMode>> {
    io::stdin()
        .is_terminal()
        .then(|| terminal::RawMode::enter(io::stdin()))
        .transpose()
}

/// The command's streams are our own; what PID 1 says goes over `control`.
fn ports(control: UnixStream) -> Result<Vec<Port>, Error> {
    let duplicate = |fd: io::Result<OwnedFd>| {
        fd.map_err(|source| Error::Io("pass on a standard stream", source))
    };
    let stdin = duplicate(io::stdin().as_fd().try_clone_to_owned())?;
    let stdout = duplicate(io::stdout().as_fd().try_clone_to_owned())?;
    let stderr = duplicate(io::stderr().as_fd().try_clone_to_owned())?;
    let control_input = duplicate(control.try_clone().map(OwnedFd::from))?;
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
        port(CONTROL_PORT, Some(control_input), Some(control.into())),
    ])
}
