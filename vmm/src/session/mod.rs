//! One run, from its configuration to its report: opens what it needs, has the machine's process
//! started, then waits for whatever comes first: a status, an ending, a signal, a deadline.

mod events;
mod job;
pub(crate) mod signals;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::config;
use crate::disk::{self, Keeper};
use crate::exit::Ending;
use crate::guest;
use crate::host::Virtualization;
use crate::machine;
use crate::monitor::link::{Closed, Link, Order, Told};
use crate::monitor::process::Process;
use crate::monitor::{self, Parts, User};
use crate::report::{Measures, Outcome, Report, chain, printable};
use crate::sandbox::{self, Identity, inherited};
use crate::stderr::Stderr;
use crate::terminal;
use events::{Event, Events};
use job::{Conversation, Job};
use signals::{Patience, Signals};

/// How long a guest may take to say hello, by the kind of host.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
const BOOT_TIMEOUT_EMULATED: Duration = Duration::from_secs(600);
/// Guest memory when nobody says how much, by the kind of host: the guest's kernel prepares each
/// page of it, which an emulator does slowly.
const MEMORY: u64 = 1 << 30;
const MEMORY_EMULATED: u64 = 128 << 20;
/// How long a reader that does read has for the last output after `--timeout`.
const DRAIN_GRACE: Duration = Duration::from_secs(1);
/// How long the machine's process may take to write out its disks and end. One that a guest has taken
/// over need not end at all.
const CLOSE_LIMIT: Duration = Duration::from_secs(600);
/// Stands for "never" in arithmetic with instants.
const NEVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Why a run did not come to a machine that runs.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Disk(#[from] disk::Error),
    #[error(transparent)]
    Guest(#[from] guest::Error),
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    #[error("cannot write the console log {}", .0.display())]
    ConsoleLog(PathBuf, #[source] io::Error),
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
}

/// Runs one guest to its end.
pub fn run(config: &config::Run) -> Report {
    let begin = Instant::now();
    match Session::start(config, begin) {
        Ok(session) => session.finish(),
        Err(error) => Outcome::VmmError(chain(&error)).into(),
    }
}

/// A run whose machine is being started or runs.
struct Session<'a> {
    config: &'a config::Run,
    begin: Instant,
    /// When the guest must have said hello, once it runs.
    boot_deadline: Option<Instant>,
    boot_timeout: Duration,
    run_deadline: Instant,
    events: Events,
    /// None once it is known to have ended.
    process: Option<Process>,
    link: Link<Order, Told>,
    keeper: Option<Keeper>,
    conversation: Option<Conversation>,
    terminal: Option<terminal::RawMode>,
    measures: Measures,
    command_started: bool,
    patience: Patience,
}

impl<'a> Session<'a> {
    fn start(config: &'a config::Run, begin: Instant) -> Result<Self, Error> {
        let io = |what| move |source| Error::Io(what, source);
        let mut left_open = inherited::list().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot see in /proc what whoever started this had left open");
            Vec::new()
        });
        let user = config.sandbox.user.as_deref();
        let identity = user.map(Identity::find).transpose()?;
        let virtualization = Virtualization::of_host();
        // Disks before the kernel, which may take minutes to make: mistakes show at once.
        let disks = disk::open(config, guest::root_image(config)?.as_deref())?;
        let keeper = disks.keeper()?;
        let guest = guest::prepare(config, virtualization)?;
        let console_log = open_console_log(config)?;
        let is_terminal = config.command.is_none() && io::stdin().is_terminal();
        let (control, user) = match &config.command {
            None => {
                let terminal = is_terminal;
                (None, User::Console { terminal })
            }
            Some(_) => {
                let pair = UnixStream::pair();
                let (ours, theirs) = pair.map_err(io("make the control port"))?;
                (Some(ours), User::Command(theirs.into()))
            }
        };
        let suited = match virtualization {
            Virtualization::Hardware => MEMORY,
            Virtualization::Emulated => MEMORY_EMULATED,
        };
        let machine = machine::Config {
            memory: config.memory.unwrap_or(suited),
            huge_pages: config.huge_pages,
            cpus: config.cpus,
            virtualization,
        };
        // Not before guests are made, which takes minutes that Ctrl-C should end.
        let signals = Signals::block().map_err(io("watch for signals"))?;
        left_open.push(signals.as_fd().as_raw_fd());
        left_open.extend(control.as_ref().map(AsRawFd::as_raw_fd));
        let mut parts = Some(Parts {
            begin,
            left_open,
            machine,
            guest,
            disks,
            console_log,
            user,
            sandbox: config.sandbox.clone(),
            identity,
        });
        let started = Process::start(|link| {
            if let Some(parts) = parts.take() {
                monitor::run(parts, link);
            }
        });
        let (process, link) = started.map_err(io("make the machine's process"))?;
        // All of it is that process's now. The images here must not write when they are let go; their
        // locks last until we end.
        if let Some(Parts { disks, .. }) = parts {
            std::mem::forget(disks);
        }

        let events = Events::new(signals, link.clone()).map_err(io("make an event"))?;
        let conversation = match (&config.command, control) {
            (Some(command), Some(socket)) => {
                let started = Conversation::start(job(config, command), socket, events.teller());
                Some(started.map_err(io("talk to the guest"))?)
            }
            _ => None,
        };
        let terminal = is_terminal
            .then(|| terminal::RawMode::enter(io::stdin()))
            .transpose()
            .map_err(io("set up the terminal"))?;
        let boot_timeout = match (config.boot_timeout, &config.command, virtualization) {
            (Some(limit), ..) => limit,
            (None, None, _) => NEVER,
            (None, Some(_), Virtualization::Hardware) => BOOT_TIMEOUT,
            (None, Some(_), Virtualization::Emulated) => BOOT_TIMEOUT_EMULATED,
        };
        Ok(Self {
            config,
            begin,
            boot_deadline: None,
            boot_timeout,
            run_deadline: begin + config.timeout.unwrap_or(NEVER).min(NEVER),
            events,
            process: Some(process),
            link,
            keeper,
            conversation,
            terminal,
            measures: Measures::default(),
            command_started: false,
            patience: Patience::default(),
        })
    }

    /// Waits for the end and puts everything away.
    fn finish(mut self) -> Report {
        let mut outcome = self.wait();
        self.measures.end = Some(self.begin.elapsed());
        let closed = self.put_away(&outcome);
        // Nothing more is heard of it.
        self.events.hang_up();
        match self.process.take() {
            Some(process) if closed.is_ok() => process.leave(),
            process => drop(process),
        }
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
        drop(self.terminal.take());
        let overlay_size = match closed {
            Ok(closed) => {
                self.measures.bytes_read = closed.bytes_read;
                self.measures.bytes_written = closed.bytes_written;
                self.show_last_lines(&outcome, &closed);
                closed.overlay_size
            }
            Err(why) => Err(why),
        };
        match overlay_size {
            Ok(size) => self.measures.overlay_size = size,
            // An error from before the machine ran says why it did not.
            Err(_) if matches!(outcome, Outcome::VmmError(_)) => {}
            Err(why) => outcome = Outcome::VmmError(why),
        }
        if let Some(keeper) = self.keeper.take().filter(|_| outcome.failed())
            && let Err(error) = keeper.keep()
        {
            outcome = Outcome::VmmError(chain(&error));
        }
        Report {
            outcome,
            measures: self.measures,
        }
    }

    fn wait(&mut self) -> Outcome {
        loop {
            let begun = self.measures.pid1.is_some();
            let deadline = match self.boot_deadline {
                Some(boot) if !begun => self.run_deadline.min(boot),
                _ => self.run_deadline,
            };
            let Some(event) = self.events.next(deadline) else {
                if deadline == self.run_deadline {
                    return Outcome::Timeout(self.config.timeout.unwrap_or_default());
                }
                let limit = self.boot_timeout.as_secs_f64();
                let why = format!("no sign of the guest's init within --boot-timeout {limit}s");
                return Outcome::BootFailed(why);
            };
            if let Some(outcome) = self.heard(event) {
                return outcome;
            }
        }
    }

    fn heard(&mut self, event: Event) -> Option<Outcome> {
        match event {
            Event::Told(told) => return self.told(told),
            Event::Gone => return Some(Outcome::VmmError(self.how_it_ended(Process::wait))),
            Event::Nonsense => {
                return Some(Outcome::VmmError(self.how_it_ended(Process::end_mad)));
            }
            Event::Job(job::Event::Hello) => self.measures.pid1 = Some(self.begin.elapsed()),
            Event::Job(job::Event::Started) => self.command_started = true,
            Event::Job(event) => return Some(job_outcome(event)),
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
        }
        None
    }

    fn told(&mut self, told: Told) -> Option<Outcome> {
        match told {
            Told::Started(after) if self.boot_deadline.is_none() => {
                let after = after.min(self.begin.elapsed());
                self.measures.first_instruction = Some(after);
                self.boot_deadline = Some(self.begin + after + self.boot_timeout.min(NEVER));
                None
            }
            Told::Failed(why) => Some(Outcome::VmmError(why)),
            Told::Ending { how, panic } => Some(self.ended(&how, panic)),
            // A person may look at old logs on an interactive console.
            Told::Panic(message) if self.config.command.is_some() => Some(Outcome::Panic(message)),
            Told::Escaped => Some(Outcome::Escaped),
            Told::Started(_) | Told::Panic(_) | Told::Drained | Told::Closed(_) => None,
        }
    }

    fn ended(&self, ending: &Ending, panic: Option<String>) -> Outcome {
        let command = self.config.command.is_some();
        let said_hello = self.measures.pid1.is_some();
        match (ending, panic) {
            (Ending::Panic, panic) => Outcome::Panic(panic.unwrap_or_default()),
            // A kernel that panicked resets: panic=-1 is on its command line.
            (Ending::Reset | Ending::TripleFault, Some(panic)) => Outcome::Panic(panic),
            (Ending::PowerOff, _) if !command => Outcome::PoweredOff,
            (Ending::Reset, _) if !command => Outcome::Reset,
            (Ending::PowerOff | Ending::Reset, _) if said_hello => {
                Outcome::EndedWithoutStatus(ending.to_string())
            }
            _ if self.command_started => Outcome::EndedWithoutStatus(ending.to_string()),
            _ => Outcome::BootFailed(ending.to_string()),
        }
    }

    /// Has the machine's process stop, say its last words and end.
    fn put_away(&mut self, outcome: &Outcome) -> Result<Closed, String> {
        if self.process.is_none() {
            return Err("it is gone".to_owned());
        }
        self.link.tell(&Order::Stop);
        self.drain();
        let keep = self.keeper.is_some() && outcome.failed();
        self.link.tell(&Order::Close { keep });
        self.closed()
    }

    /// Waits until the host has taken what the guest has written to its streams. A reader that
    /// does not read keeps us, as it would keep any program, until the timeout or a signal.
    fn drain(&mut self) {
        let deadline = self.run_deadline.max(Instant::now() + DRAIN_GRACE);
        let mut late = Vec::new();
        loop {
            match self.events.next(deadline) {
                Some(Event::Told(Told::Drained) | Event::Signal(_)) | None => break,
                Some(event @ (Event::Gone | Event::Nonsense | Event::Told(Told::Failed(_)))) => {
                    late.push(event);
                    break;
                }
                Some(Event::Told(_)) => {}
                Some(event @ Event::Job(_)) => late.push(event),
            }
        }
        late.into_iter()
            .for_each(|event| self.events.put_back(event));
    }

    /// Waits until the machine is put away. What the guest's init says meanwhile is kept.
    fn closed(&mut self) -> Result<Closed, String> {
        let deadline = Instant::now() + CLOSE_LIMIT;
        let mut late = Vec::new();
        let closed = loop {
            match self.events.next(deadline) {
                Some(Event::Told(Told::Closed(closed))) => break Ok(closed),
                Some(Event::Told(Told::Failed(why))) => break Err(why),
                Some(Event::Gone) => break Err(self.how_it_ended(Process::wait)),
                Some(Event::Nonsense) => break Err(self.how_it_ended(Process::end_mad)),
                Some(Event::Signal(number)) if self.patience.ends_with(number, Instant::now()) => {
                    break Err(
                        self.killed("was killed by signals before its disks were written out")
                    );
                }
                Some(Event::Told(_) | Event::Signal(_)) => {}
                Some(event @ Event::Job(_)) => late.push(event),
                None => break Err(self.killed("did not end and was killed")),
            }
        };
        late.into_iter()
            .for_each(|event| self.events.put_back(event));
        closed
    }

    /// Kills the machine's process, and says why in words that follow its name.
    fn killed(&mut self, why: &str) -> String {
        // Dropping it kills it.
        self.process = None;
        format!("the machine's process {why}")
    }

    /// Why the machine's process is gone.
    fn how_it_ended(&mut self, end: fn(Process) -> String) -> String {
        let how = self.process.take().map(end);
        format!("the machine's process {}", how.unwrap_or_default())
    }

    /// The status, if the guest's last words held one.
    fn late_status(&mut self) -> Option<Outcome> {
        std::iter::from_fn(|| self.events.now()).find_map(|event| match event {
            Event::Job(job::Event::Hello | job::Event::Started | job::Event::Closed) => None,
            Event::Job(event) => Some(job_outcome(event)),
            _ => None,
        })
    }

    /// What a person needs to see why there was no status; an interactive run showed it already.
    fn show_last_lines(&self, outcome: &Outcome, closed: &Closed) {
        let unexplained = matches!(
            outcome,
            Outcome::BootFailed(_) | Outcome::EndedWithoutStatus(_) | Outcome::Panic(_)
        );
        if unexplained && self.config.command.is_some() {
            for line in &closed.last_lines {
                // Standard error may be closed.
                let line = printable(line);
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

fn open_console_log(config: &config::Run) -> Result<Option<File>, Error> {
    let path = config.console_log.as_ref();
    path.map(|path| File::create(path).map_err(|source| Error::ConsoleLog(path.clone(), source)))
        .transpose()
}
