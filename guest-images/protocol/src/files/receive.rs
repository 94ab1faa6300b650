//! Writing a tree that someone else sends.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT};
use rustix::io::Errno;

use super::MAX_DEPTH;
use super::destination::{Place, place};
use crate::{Item, Reason, Stamp};

/// Why a tree was not received whole. What arrived before stays.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// A part could not be made.
    #[error("cannot write {path}: {}", Reason(*errno))]
    Write {
        /// The part, under the destination as it was given.
        path: String,
        /// What the kernel said.
        errno: Errno,
    },
    /// A name that is no single path component.
    #[error("a file is called {0:?}, which no file in a directory can be")]
    BadName(String),
    /// The parts make no tree in this order.
    #[error("the files arrived in an impossible order")]
    OutOfOrder,
    /// More than [`MAX_DEPTH`] levels.
    #[error("{0} is more than {MAX_DEPTH} directories deep")]
    TooDeep(String),
    /// More than the bytes that were allowed.
    #[error("the files are larger than the {0} bytes that are allowed")]
    TooLarge(u64),
    /// The sender gave up.
    #[error("the other side: {0}")]
    Failed(String),
}

/// Takes the [`Item`]s of one tree and writes it.
#[derive(Debug)]
pub struct Receiver {
    at: OwnedFd,
    destination: Vec<u8>,
    name: Vec<u8>,
    max_bytes: u64,
    bytes_left: u64,
    state: State,
    /// The directories from the root to where parts go now.
    levels: Vec<Level>,
    /// The path of what is being written, for messages.
    path: Vec<u8>,
}

#[derive(Debug)]
enum State {
    /// Nothing arrived yet.
    Empty,
    /// The next part is an entry of the innermost directory.
    Directory,
    /// The next part may be more of this file.
    File(OwnedFd, Stamp),
    /// The root is complete.
    Rooted,
    /// The tree is complete, or given up.
    Over,
}

#[derive(Debug)]
struct Level {
    directory: OwnedFd,
    /// What to set when the directory is complete; nothing when it was there before.
    stamp: Option<Stamp>,
    /// The length of its path.
    path: usize,
}

impl Receiver {
    /// Will write a tree whose root is called `name` (empty: only what is in it) to
    /// `destination`, relative to `at`, by the rules of [`files`](crate::files), and refuse more
    /// than `max_bytes` of file data.
    pub fn new(at: OwnedFd, destination: &[u8], name: &[u8], max_bytes: u64) -> Self {
        Self {
            at,
            destination: destination.to_vec(),
            name: name.to_vec(),
            max_bytes,
            bytes_left: max_bytes,
            state: State::Empty,
            levels: Vec::new(),
            path: destination.to_vec(),
        }
    }

    /// Takes the next part; whether it was the last.
    ///
    /// # Errors
    /// When it cannot be written or must not be. The receiver is of no use afterwards.
    pub fn item(&mut self, item: Item<'_>) -> Result<bool, ReceiveError> {
        let state = core::mem::replace(&mut self.state, State::Over);
        let state = match (state, item) {
            (State::Over, _) => return Err(ReceiveError::OutOfOrder),
            (_, Item::Failed { message }) => return Err(ReceiveError::Failed(message.to_string())),
            (State::File(file, stamp), Item::Data(data)) => {
                self.data(&file, data)?;
                self.state = State::File(file, stamp);
                return Ok(false);
            }
            (State::File(file, stamp), _) => {
                self.stamp(file.as_fd(), stamp)?;
                self.inside()
            }
            (state, _) => state,
        };
        self.state = match (state, item) {
            (State::Empty, Item::Enter { stamp, .. }) => self.root_directory(stamp)?,
            (State::Empty, Item::File { stamp, .. }) => {
                let (parent, name) = self.root_entry()?;
                self.file(parent.as_fd(), &name, stamp)?
            }
            (State::Empty, Item::Symlink { target, .. }) => {
                let (parent, name) = self.root_entry()?;
                self.symlink(parent.as_fd(), &name, target)?;
                State::Rooted
            }
            (State::Directory, Item::Enter { name, stamp }) => {
                self.descend(name)?;
                let level = self.directory(self.innermost()?, name, stamp)?;
                self.levels.push(level);
                State::Directory
            }
            (State::Directory, Item::File { name, stamp }) => {
                self.descend(name)?;
                self.file(self.innermost()?, name, stamp)?
            }
            (State::Directory, Item::Symlink { name, target }) => {
                self.descend(name)?;
                self.symlink(self.innermost()?, name, target)?;
                State::Directory
            }
            (State::Directory, Item::Skipped { .. }) => State::Directory,
            (State::Directory, Item::Leave) => {
                self.leave()?;
                self.inside()
            }
            (State::Rooted, Item::End) => return Ok(true),
            _ => return Err(ReceiveError::OutOfOrder),
        };
        Ok(false)
    }

    /// Where the next part may be, once one is complete.
    fn inside(&self) -> State {
        if self.levels.is_empty() {
            State::Rooted
        } else {
            State::Directory
        }
    }

    fn innermost(&self) -> Result<BorrowedFd<'_>, ReceiveError> {
        let level = self.levels.last().ok_or(ReceiveError::OutOfOrder)?;
        Ok(level.directory.as_fd())
    }

    /// Checks the name of an entry of the innermost directory and notes its path.
    fn descend(&mut self, name: &[u8]) -> Result<(), ReceiveError> {
        if matches!(name, b"" | b"." | b"..") || name.iter().any(|byte| matches!(byte, 0 | b'/')) {
            return Err(ReceiveError::BadName(
                String::from_utf8_lossy(name).into_owned(),
            ));
        }
        self.path
            .truncate(self.levels.last().map_or(0, |level| level.path));
        self.path.push(b'/');
        self.path.extend_from_slice(name);
        if self.levels.len() >= MAX_DEPTH {
            return Err(ReceiveError::TooDeep(self.shown()));
        }
        Ok(())
    }

    fn root_directory(&mut self, stamp: Stamp) -> Result<State, ReceiveError> {
        let place = place(self.at.as_fd(), &self.destination, &self.name, true);
        let level = match place.map_err(|errno| self.unwritten(errno))? {
            Place::Merge(directory) => Level {
                directory,
                stamp: None,
                path: self.path.len(),
            },
            Place::Entry(parent, name) => self.directory(parent.as_fd(), &name, stamp)?,
        };
        self.levels.push(level);
        Ok(State::Directory)
    }

    fn root_entry(&self) -> Result<(OwnedFd, Vec<u8>), ReceiveError> {
        let place = place(self.at.as_fd(), &self.destination, &self.name, false);
        match place.map_err(|errno| self.unwritten(errno))? {
            Place::Entry(parent, name) => Ok((parent, name)),
            Place::Merge(_) => Err(self.unwritten(Errno::ISDIR)),
        }
    }

    fn directory(
        &self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        stamp: Stamp,
    ) -> Result<Level, ReceiveError> {
        let made = match rustix::fs::mkdirat(parent, name, Mode::RWXU) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(errno) => return Err(self.unwritten(errno)),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(parent, name, flags, Mode::empty());
        let directory = opened.map_err(|errno| self.unwritten(errno))?;
        Ok(Level {
            directory,
            stamp: made.then_some(stamp),
            path: self.path.len(),
        })
    }

    fn leave(&mut self) -> Result<(), ReceiveError> {
        let level = self.levels.pop().ok_or(ReceiveError::OutOfOrder)?;
        self.path.truncate(level.path);
        match level.stamp {
            Some(stamp) => self.stamp(level.directory.as_fd(), stamp),
            None => Ok(()),
        }
    }

    fn file(
        &self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        stamp: Stamp,
    ) -> Result<State, ReceiveError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let make = || rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR);
        let file = self.replacing(parent, name, make)?;
        Ok(State::File(file, stamp))
    }

    fn symlink(
        &self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        target: &[u8],
    ) -> Result<(), ReceiveError> {
        self.replacing(parent, name, || rustix::fs::symlinkat(target, parent, name))
    }

    /// Makes an entry, in place of another of the same name that is no directory.
    fn replacing<T>(
        &self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        make: impl Fn() -> Result<T, Errno>,
    ) -> Result<T, ReceiveError> {
        let made = make().or_else(|errno| {
            if errno != Errno::EXIST {
                return Err(errno);
            }
            rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
            make()
        });
        made.map_err(|errno| self.unwritten(errno))
    }

    fn data(&mut self, file: &OwnedFd, mut data: &[u8]) -> Result<(), ReceiveError> {
        let count = u64::try_from(data.len()).unwrap_or(u64::MAX);
        let left = self.bytes_left.checked_sub(count);
        self.bytes_left = left.ok_or(ReceiveError::TooLarge(self.max_bytes))?;
        while !data.is_empty() {
            let written = match rustix::io::write(file, data) {
                Ok(0) => return Err(self.unwritten(Errno::IO)),
                Err(Errno::INTR) => continue,
                written => written.map_err(|errno| self.unwritten(errno))?,
            };
            data = data.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    fn stamp(&self, file: BorrowedFd<'_>, stamp: Stamp) -> Result<(), ReceiveError> {
        let modified = Timespec {
            tv_sec: stamp.seconds,
            tv_nsec: stamp.nanoseconds.into(),
        };
        let times = Timestamps {
            last_access: Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_OMIT,
            },
            last_modification: modified,
        };
        rustix::fs::fchmod(file, Mode::from_raw_mode(stamp.mode & 0o777))
            .and_then(|()| rustix::fs::futimens(file, &times))
            .map_err(|errno| self.unwritten(errno))
    }

    fn unwritten(&self, errno: Errno) -> ReceiveError {
        ReceiveError::Write {
            path: self.shown(),
            errno,
        }
    }

    fn shown(&self) -> String {
        String::from_utf8_lossy(&self.path).into_owned()
    }
}
