//! Reading a tree.

use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::MAX_DEPTH;
use crate::{Item, MAX_DATA, Reason, Stamp};

/// Why a tree could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError<E> {
    /// A part of the tree could not be read.
    #[error("cannot read {path}: {}", Reason(*errno))]
    Read {
        /// The part, under the tree's root.
        path: String,
        /// What the kernel said.
        errno: Errno,
    },
    /// The root is a device, a socket or a FIFO.
    #[error("{0} is neither a file, a directory nor a link")]
    Special(String),
    /// The tree has more than [`MAX_DEPTH`] levels.
    #[error("{0} is more than {MAX_DEPTH} directories deep")]
    TooDeep(String),
    /// What takes the parts does not.
    #[error("cannot send a file")]
    Sink(#[source] E),
}

/// Hands the tree at `source`, relative to `at`, to `sink`, ending with [`Item::End`].
///
/// # Errors
/// When a part cannot be read, or `sink` fails. The receiver has then seen an incomplete tree; if
/// `sink` still works, tell it with [`Item::Failed`].
pub fn send_tree<E>(
    at: BorrowedFd<'_>,
    source: &[u8],
    sink: &mut dyn FnMut(Item<'_>) -> Result<(), E>,
) -> Result<(), SendError<E>> {
    let mut sender = Sender {
        sink,
        buffer: vec![0; MAX_DATA],
        path: source.to_vec(),
    };
    let mut levels: Vec<Level> = Vec::new();
    match sender.entry(at, source, b"")? {
        Sent::Directory(level) => levels.push(level),
        Sent::Leaf => {}
        Sent::Special => return Err(SendError::Special(sender.shown())),
    }
    while let Some(level) = levels.last_mut() {
        sender.path.truncate(level.path);
        let Some(entry) = level.dir.read() else {
            sender.give(Item::Leave)?;
            levels.pop();
            continue;
        };
        let entry = entry.map_err(|errno| sender.unread(errno))?;
        let name = entry.file_name().to_bytes();
        if matches!(name, b"." | b"..") {
            continue;
        }
        sender.path.push(b'/');
        sender.path.extend_from_slice(name);
        let dir = level.dir.fd().map_err(|errno| sender.unread(errno))?;
        match sender.entry(dir, name, name)? {
            Sent::Directory(_) if levels.len() >= MAX_DEPTH => {
                return Err(SendError::TooDeep(sender.shown()));
            }
            Sent::Directory(level) => levels.push(level),
            Sent::Leaf => {}
            Sent::Special => sender.give(Item::Skipped { name })?,
        }
    }
    sender.give(Item::End)
}

/// A directory that is being read.
struct Level {
    dir: Dir,
    /// The length of its path.
    path: usize,
}

enum Sent {
    Directory(Level),
    Leaf,
    Special,
}

struct Sender<'s, E> {
    sink: &'s mut dyn FnMut(Item<'_>) -> Result<(), E>,
    buffer: Vec<u8>,
    /// The path of what is being read, for messages.
    path: Vec<u8>,
}

impl<E> Sender<'_, E> {
    fn give(&mut self, item: Item<'_>) -> Result<(), SendError<E>> {
        (self.sink)(item).map_err(SendError::Sink)
    }

    /// Sends what `path` is, under `name`; a directory only as its beginning.
    fn entry(
        &mut self,
        at: BorrowedFd<'_>,
        path: &[u8],
        name: &[u8],
    ) -> Result<Sent, SendError<E>> {
        let found = rustix::fs::statat(at, path, AtFlags::SYMLINK_NOFOLLOW);
        let kind = found.map(|stat| FileType::from_raw_mode(stat.st_mode));
        match kind.map_err(|errno| self.unread(errno))? {
            FileType::RegularFile => {
                let (file, stamp) = self.open(at, path, OFlags::NONBLOCK | OFlags::NOCTTY)?;
                self.give(Item::File { name, stamp })?;
                self.data(&file)?;
                Ok(Sent::Leaf)
            }
            FileType::Directory => {
                let (directory, stamp) = self.open(at, path, OFlags::DIRECTORY)?;
                let dir = Dir::new(directory).map_err(|errno| self.unread(errno))?;
                self.give(Item::Enter { name, stamp })?;
                Ok(Sent::Directory(Level {
                    dir,
                    path: self.path.len(),
                }))
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(at, path, Vec::new())
                    .map_err(|errno| self.unread(errno))?;
                self.give(Item::Symlink {
                    name,
                    target: target.to_bytes(),
                })?;
                Ok(Sent::Leaf)
            }
            _ => Ok(Sent::Special),
        }
    }

    fn open(
        &self,
        at: BorrowedFd<'_>,
        path: &[u8],
        flags: OFlags,
    ) -> Result<(OwnedFd, Stamp), SendError<E>> {
        let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(at, path, flags, Mode::empty());
        let file = opened.map_err(|errno| self.unread(errno))?;
        let stat = rustix::fs::fstat(&file).map_err(|errno| self.unread(errno))?;
        Ok((file, stamp(&stat)))
    }

    fn data(&mut self, file: &OwnedFd) -> Result<(), SendError<E>> {
        loop {
            let count = match rustix::io::read(file.as_fd(), &mut self.buffer[..]) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(self.unread(errno)),
            };
            let data = self.buffer.get(..count).unwrap_or_default();
            (self.sink)(Item::Data(data)).map_err(SendError::Sink)?;
        }
    }

    fn unread(&self, errno: Errno) -> SendError<E> {
        SendError::Read {
            path: self.shown(),
            errno,
        }
    }

    fn shown(&self) -> String {
        String::from_utf8_lossy(&self.path).into_owned()
    }
}

fn stamp(stat: &Stat) -> Stamp {
    Stamp {
        mode: stat.st_mode & 0o777,
        seconds: stat.st_mtime,
        nanoseconds: u32::try_from(stat.st_mtime_nsec)
            .unwrap_or(0)
            .min(999_999_999),
    }
}
