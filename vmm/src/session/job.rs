//! The host's end of the conversation with PID 1: start a command, copy files, learn the status.

use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use cowshed_guest_protocol::files::{self, Receiver, SendError};
use cowshed_guest_protocol::{Decoder, Failure, FromGuest, Item, Message, Start, ToGuest, VERSION};
use rustix::fs::{CWD, Mode, OFlags};

use crate::config;
use crate::report::chain;

/// Most bytes that a guest can make us write for one `--copy-out`.
const MAX_COPY_OUT: u64 = 64 << 30;
/// Most files, folders and links of one `--copy-out`.
const MAX_ENTRIES: u64 = 1 << 20;
/// How many of those that cannot be copied are named.
const MAX_NAMED: u64 = 10;

/// What the conversation came to, in order; one of the last five ends it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// PID 1 is up.
    Hello,
    /// The command runs.
    Started,
    /// The command ended with a status.
    Exited(u8),
    /// The command was ended by a signal.
    Signaled(u8),
    /// PID 1 could not run the command.
    Failed(Failure, String),
    /// Our side failed: a file to copy, a guest that makes no sense.
    Broken(String),
    /// The guest hung up.
    Closed,
}

/// What the guest is to do.
pub(super) struct Job {
    /// The command and its arguments.
    pub(super) command: Vec<std::ffi::OsString>,
    /// Environment.
    pub(super) env: Vec<(std::ffi::OsString, std::ffi::OsString)>,
    /// Working directory.
    pub(super) cwd: Option<std::path::PathBuf>,
    /// Host to guest.
    pub(super) copy_in: Vec<config::Copy>,
    /// Guest to host.
    pub(super) copy_out: Vec<config::Copy>,
}

/// A running conversation.
pub(super) struct Conversation {
    socket: UnixStream,
    thread: JoinHandle<()>,
}

impl Conversation {
    /// Talks over `socket` on a thread of its own; `tell` hears what comes of it.
    pub(super) fn start(
        job: Job,
        socket: UnixStream,
        tell: impl Fn(Event) + Send + 'static,
    ) -> io::Result<Self> {
        let mut talk = Talk {
            socket: socket.try_clone()?,
            decoder: Decoder::default(),
        };
        let thread = thread::Builder::new()
            .name("job".to_owned())
            .spawn(move || {
                let end = talk.whole(&job, &tell).unwrap_or_else(|error| match error {
                    Error::Closed => talk.last_words(),
                    error => Event::Broken(chain(&error)),
                });
                tell(end);
                // Nobody listens any more: what the guest still says must not keep it waiting.
                let _ = talk.socket.shutdown(std::net::Shutdown::Both);
            })?;
        Ok(Self { socket, thread })
    }

    /// Passes a signal to the command, which must have started. A guest that does not read loses
    /// it: nobody waits for such a guest.
    pub(super) fn signal(&self, number: u8) {
        let mut frame = Vec::new();
        let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
        let sent = ToGuest::Signal { number }
            .encode(&mut frame)
            .map_err(io::Error::other)
            .and_then(|()| Ok(rustix::net::send(&self.socket, &frame, flags)?));
        if let Err(error) = sent {
            tracing::warn!(%error, number, "a signal did not reach the guest");
        }
    }

    /// Hangs up and waits for the thread.
    pub(super) fn end(self) {
        // Fails when the guest's end is closed: then the thread is on its way out already.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        if self.thread.join().is_err() {
            tracing::error!("the job thread panicked");
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("the guest hung up")]
    Closed,
    #[error("cannot talk to the guest")]
    Io(#[source] io::Error),
    #[error("the guest's init said something that makes no sense")]
    Wire(#[from] cowshed_guest_protocol::WireError),
    #[error("the guest's init speaks protocol {0}, this cowshed {VERSION}: use matching versions")]
    Version(u32),
    #[error("the guest's init spoke out of turn")]
    OutOfTurn,
    #[error("cannot copy {0} into the guest")]
    CopyIn(String, #[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("cannot copy {0} out of the guest")]
    CopyOut(String, #[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What came of copying a tree out.
enum Tree {
    Whole,
    Failed(Error),
    Ending(Event),
}

struct Talk {
    socket: UnixStream,
    decoder: Decoder,
}

impl Talk {
    /// From the hello to the status.
    fn whole(&mut self, job: &Job, tell: &dyn Fn(Event)) -> Result<Event, Error> {
        let version = self.receive(|message| match message {
            FromGuest::Hello { version } => Ok(version),
            _ => Err(Error::OutOfTurn),
        })?;
        if version != VERSION {
            return Err(Error::Version(version));
        }
        tell(Event::Hello);
        for copy in &job.copy_in {
            self.copy_in(copy)?;
        }
        for copy in &job.copy_out {
            self.say(&ToGuest::CopyOut {
                source: copy.from.as_os_str().as_bytes(),
            })?;
        }
        self.start(job)?;
        if let Some(early) = self.receive(|message| Ok(ending(&message)))? {
            return Ok(early);
        }
        tell(Event::Started);
        let mut failure = None;
        for copy in &job.copy_out {
            match self.copy_out(copy)? {
                Tree::Whole => {}
                Tree::Failed(error) => failure = failure.or(Some(error)),
                Tree::Ending(early) => return Ok(early),
            }
        }
        let end = self.receive(|message| ending(&message).ok_or(Error::OutOfTurn))?;
        match failure {
            // A command that failed may well have left nothing to copy: its status says more.
            Some(error) if end == Event::Exited(0) => Err(error),
            Some(error) => {
                tracing::warn!("{}", chain(&error));
                Ok(end)
            }
            None => Ok(end),
        }
    }

    /// What a guest that hung up had said before, which we may have met while writing to it.
    fn last_words(&mut self) -> Event {
        loop {
            match self.receive(|message| Ok(ending(&message))) {
                Ok(Some(end)) => return end,
                Ok(None) => {}
                Err(_) => return Event::Closed,
            }
        }
    }

    fn start(&mut self, job: &Job) -> Result<(), Error> {
        let env: Vec<Vec<u8>> = job
            .env
            .iter()
            .map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat())
            .collect();
        self.say(&ToGuest::Start(Start {
            argv: job.command.iter().map(|word| word.as_bytes()).collect(),
            env: env.iter().map(Vec::as_slice).collect(),
            cwd: job
                .cwd
                .as_deref()
                .map_or(&[], |cwd| cwd.as_os_str().as_bytes()),
        }))
    }

    fn copy_in(&mut self, copy: &config::Copy) -> Result<(), Error> {
        let source = copy.from.as_os_str().as_bytes();
        self.say(&ToGuest::CopyIn {
            destination: copy.to.as_os_str().as_bytes(),
            name: files::root_name(source),
        })?;
        let sent = files::send_tree(CWD, source, &mut |item| self.say(&ToGuest::Item(item)));
        sent.map_err(|error| match error {
            SendError::Sink(error) => error,
            error => Error::CopyIn(copy.from.display().to_string(), error.into()),
        })
    }

    /// Receives one tree. What cannot be written does not stop the guest: its command's status is
    /// still to come.
    fn copy_out(&mut self, copy: &config::Copy) -> Result<Tree, Error> {
        let failed = |error| Error::CopyOut(copy.from.display().to_string(), error);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let here = rustix::fs::open(".", flags, Mode::empty()).map_err(|e| failed(e.into()))?;
        let from = copy.from.as_os_str().as_bytes();
        let to = copy.to.as_os_str().as_bytes();
        let mut receiver = Receiver::new(here, to, files::root_name(from), MAX_COPY_OUT);
        let mut error: Option<Box<dyn std::error::Error + Send + Sync>> = None;
        let (mut entries, mut skipped) = (0, 0);
        loop {
            let step = self.receive(|message| {
                let FromGuest::Item(item) = message else {
                    return ending(&message)
                        .map(Tree::Ending)
                        .map(Some)
                        .ok_or(Error::OutOfTurn);
                };
                if let Item::Skipped { name } = item {
                    skipped += 1;
                    if skipped <= MAX_NAMED {
                        let name = String::from_utf8_lossy(name);
                        tracing::warn!(%name, "not copied out: neither a file, a folder nor a link");
                    }
                }
                let last = matches!(item, Item::End | Item::Failed { .. });
                if last && skipped > MAX_NAMED {
                    let more = skipped - MAX_NAMED;
                    tracing::warn!(more, "not copied out, as those that were named");
                }
                if error.is_none() {
                    let root_is_link = entries == 0 && matches!(item, Item::Symlink { .. });
                    let entry = matches!(
                        item,
                        Item::Enter { .. }
                            | Item::File { .. }
                            | Item::Symlink { .. }
                            | Item::Skipped { .. }
                    );
                    entries += u64::from(entry);
                    error = if root_is_link {
                        // DST would then be where the guest says, for the next copy to land in.
                        Some("it is a symbolic link: name what it points to".into())
                    } else if entries > MAX_ENTRIES {
                        Some("more than a million files".into())
                    } else {
                        receiver.item(item).err().map(Into::into)
                    };
                }
                Ok(last.then(|| match error.take() {
                    None => Tree::Whole,
                    Some(error) => Tree::Failed(failed(error)),
                }))
            })?;
            if let Some(tree) = step {
                return Ok(tree);
            }
        }
    }

    fn say(&mut self, message: &ToGuest<'_>) -> Result<(), Error> {
        let mut frame = Vec::new();
        message.encode(&mut frame)?;
        self.socket
            .write_all(&frame)
            .map_err(|error| match error.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Error::Closed,
                _ => Error::Io(error),
            })
    }

    /// Waits for the next message and hands it to `take`.
    fn receive<T>(
        &mut self,
        mut take: impl FnMut(FromGuest<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut bytes = [0; 16 << 10];
        loop {
            if let Some(message) = self.decoder.next::<FromGuest<'_>>()? {
                return take(message);
            }
            match self.socket.read(&mut bytes) {
                Ok(0) => return Err(Error::Closed),
                Ok(count) => self.decoder.feed(bytes.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Io(error)),
            }
        }
    }
}

/// The ending that a message tells, if it does.
fn ending(message: &FromGuest<'_>) -> Option<Event> {
    match *message {
        FromGuest::Exited { code } => Some(Event::Exited(code)),
        FromGuest::Signaled { number } => Some(Event::Signaled(number)),
        FromGuest::Error { failure, message } => Some(Event::Failed(failure, message.to_owned())),
        FromGuest::Hello { .. } | FromGuest::Started | FromGuest::Item(_) => None,
    }
}
