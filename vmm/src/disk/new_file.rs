//! Files that get their name when they are whole, or never.

use std::fs::File;
use std::io::{self, Seek};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat};
use rustix::io::Errno;

use super::overlay::folder_of;

/// A file without a name. Where the file system has no such thing it has a temporary one, which
/// goes when this is dropped.
#[derive(Debug)]
pub(super) struct NewFile {
    file: File,
    temporary: Option<PathBuf>,
}

impl NewFile {
    /// A file that never gets a name, for the user's eyes only.
    pub(super) fn nameless(folder: &Path) -> io::Result<File> {
        let NewFile { file, .. } = &Self::new(folder, 0o600)?;
        file.try_clone()
    }

    /// A file that is to become `path`.
    pub(super) fn beside(path: &Path) -> io::Result<Self> {
        Self::new(folder_of(path), 0o666)
    }

    fn new(folder: &Path, mode: u32) -> io::Result<Self> {
        let mode = Mode::from_raw_mode(mode);
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::open(folder, flags | OFlags::TMPFILE, mode) {
            Ok(fd) => {
                return Ok(Self {
                    file: fd.into(),
                    temporary: None,
                });
            }
            Err(Errno::OPNOTSUPP | Errno::ISDIR) => {}
            Err(errno) => return Err(errno.into()),
        }
        for attempt in 0..100 {
            let name = format!(".cowshed-{}-{attempt}", std::process::id());
            let path = folder.join(name);
            match rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode) {
                Ok(fd) => {
                    return Ok(Self {
                        file: fd.into(),
                        temporary: Some(path),
                    });
                }
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Err(Errno::EXIST.into())
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// A second handle on it.
    pub(super) fn try_clone(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Gives it its name, durably. Nothing that has that name is replaced.
    pub(super) fn publish(self, path: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        match &self.temporary {
            Some(temporary) => std::fs::hard_link(temporary, path)?,
            None => link(&self.file, path)?,
        }
        File::open(folder_of(path))?.sync_all()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // Nothing can be done about a folder that has become read-only.
            let _ = std::fs::remove_file(temporary);
        }
    }
}

/// Gives a file without a name the name `path`; one that cannot be linked there is copied.
/// Nothing that has that name is replaced.
pub(super) fn keep(file: &File, path: &Path) -> io::Result<()> {
    file.sync_all()?;
    match link(file, path) {
        // On another file system; or it was made with a name, which it lost.
        Err(Errno::XDEV | Errno::NOENT) => {
            let copy = NewFile::beside(path)?;
            let mut from = file;
            from.rewind()?;
            io::copy(&mut from, &mut copy.file())?;
            copy.publish(path)
        }
        Err(errno) => Err(errno.into()),
        Ok(()) => File::open(folder_of(path))?.sync_all(),
    }
}

fn link(file: &File, path: &Path) -> Result<(), Errno> {
    let source = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(CWD, source, CWD, path, AtFlags::SYMLINK_FOLLOW)
}
