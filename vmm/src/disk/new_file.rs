//! Files that get their name when they are whole, or never.

use std::fs::File;
use std::io::{self, Seek};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::{Path, PathBuf};

use cowshed_qcow::storage::Identity;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat};
use rustix::io::Errno;

use super::files;

const FLAGS: OFlags = OFlags::RDWR.union(OFlags::CLOEXEC);

/// A file without a name. Where the file system has no such thing it has a temporary one, which
/// goes when this is dropped.
#[derive(Debug)]
pub(crate) struct NewFile {
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
    pub(crate) fn beside(path: &Path) -> io::Result<Self> {
        Self::new(folder_of(path), 0o666)
    }

    fn new(folder: &Path, mode: u32) -> io::Result<Self> {
        let mode = Mode::from_raw_mode(mode);
        match rustix::fs::open(folder, FLAGS | OFlags::TMPFILE, mode) {
            Ok(fd) => Ok(Self {
                file: fd.into(),
                temporary: None,
            }),
            Err(Errno::OPNOTSUPP | Errno::ISDIR) => Self::with_name(folder, mode),
            Err(errno) => Err(errno.into()),
        }
    }

    fn with_name(folder: &Path, mode: Mode) -> io::Result<Self> {
        for attempt in 0..100 {
            let name = format!(".cowshed-{}-{attempt}", std::process::id());
            let path = folder.join(name);
            match rustix::fs::open(&path, FLAGS | OFlags::CREATE | OFlags::EXCL, mode) {
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

    /// The names in `path`'s folder that it may have for a while, before it is `path`.
    pub(crate) fn temporary_names(&self, path: &Path) -> Vec<PathBuf> {
        let target = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let while_replacing = target.exists().then(|| beside_its_target(&target));
        self.temporary
            .iter()
            .cloned()
            .chain(while_replacing)
            .collect()
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// A second handle on it.
    pub(crate) fn try_clone(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Puts it in the place of the file `old`, durably; links to that are followed, and whoever has it
    /// open keeps it. What another process has put there meanwhile is not replaced.
    pub(crate) fn replace(self, path: &Path, old: Identity) -> io::Result<()> {
        let target = match path.canonicalize() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return self.publish(path);
            }
            target => target?,
        };
        let metadata = target.metadata()?;
        if files::identity(&target) != Some(old) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        // Who is not root can give no file to others, nor to groups that are not their own.
        let _ = fchown(&self.file, None, Some(metadata.gid()));
        let _ = fchown(&self.file, Some(metadata.uid()), None);
        self.file.set_permissions(metadata.permissions())?;
        self.file.sync_all()?;
        let folder = folder_of(&target);
        let temporary = beside_its_target(&target);
        self.name(&temporary)?;
        std::fs::rename(&temporary, &target).inspect_err(|_| {
            // The first error says why.
            let _ = std::fs::remove_file(&temporary);
        })?;
        File::open(folder)?.sync_all()
    }

    /// Gives it its name, durably. Nothing that has that name is replaced.
    pub(crate) fn publish(self, path: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        self.name(path)?;
        File::open(folder_of(path))?.sync_all()
    }

    /// The same, but it and what it has may be lost when the host ends before its time.
    pub(crate) fn name(&self, path: &Path) -> io::Result<()> {
        match &self.temporary {
            Some(temporary) => std::fs::hard_link(temporary, path),
            None => Ok(link(&self.file, path)?),
        }
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

/// The name that a file has before it takes that of `target`.
fn beside_its_target(target: &Path) -> PathBuf {
    folder_of(target).join(format!(".cowshed-{}-new", std::process::id()))
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

/// The folder that a path's last part is in.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().as_bytes().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn nothing_that_is_there_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("there");
        std::fs::write(&path, "old").unwrap();
        let new = NewFile::beside(&path).unwrap();
        assert_eq!(
            new.publish(&path).unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["there"]);
    }

    #[test]
    fn what_came_meanwhile_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("there");
        for (change, replaced) in [("none", true), ("another", false), ("gone", true)] {
            std::fs::write(&path, "old").unwrap();
            // Open, so that no other gets its inode.
            let _locked = File::open(&path).unwrap();
            let old = files::identity(&path).unwrap();
            let new = NewFile::beside(&path).unwrap();
            if change != "none" {
                std::fs::remove_file(&path).unwrap();
            }
            if change == "another" {
                std::fs::write(&path, "another").unwrap();
            }
            let result = new.replace(&path, old);
            assert_eq!(result.is_ok(), replaced, "{change}");
            let left = if replaced { "" } else { "another" };
            assert_eq!(std::fs::read_to_string(&path).unwrap(), left, "{change}");
            assert_eq!(names(folder.path()), ["there"]);
        }
    }

    #[test]
    fn the_owner_stays() {
        use std::os::unix::fs::{PermissionsExt, chown};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("there");
        std::fs::write(&path, "old").unwrap();
        // Who is not root owns nothing else than their own.
        let _ = chown(&path, Some(4711), Some(815));
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o4640)).unwrap();
        let of = |path: &Path| {
            let metadata = path.metadata().unwrap();
            (metadata.uid(), metadata.gid(), metadata.mode())
        };
        let before = of(&path);
        let old = files::identity(&path).unwrap();
        NewFile::beside(&path).unwrap().replace(&path, old).unwrap();
        assert_eq!(of(&path), before);
        assert_eq!(std::fs::read(&path).unwrap(), b"");
    }

    #[test]
    fn a_temporary_name_goes_in_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let new = || NewFile::with_name(folder.path(), Mode::RUSR | Mode::WUSR).unwrap();
        let (first, second) = (new(), new());
        assert_eq!(names(folder.path()).len(), 2);
        std::fs::write(first.temporary.as_ref().unwrap(), "content").unwrap();
        let path = folder.path().join("named");
        assert!(second.temporary.is_some());
        drop(second);
        first.publish(&path).unwrap();
        assert_eq!(names(folder.path()), ["named"]);
        assert_eq!(std::fs::read(&path).unwrap(), b"content");
    }

    #[test]
    fn what_cannot_be_linked_is_copied() {
        use std::io::Write;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kept");
        let mut lost = NewFile::with_name(folder.path(), Mode::RUSR | Mode::WUSR).unwrap();
        std::fs::remove_file(lost.temporary.take().unwrap()).unwrap();
        lost.file.write_all(b"content").unwrap();
        keep(&lost.file, &path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"content");
        assert_eq!(
            keep(&lost.file, &path).unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        assert_eq!(names(folder.path()), ["kept"]);
    }

    #[test]
    fn on_another_file_system_it_is_copied_too() {
        use std::io::Write;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kept");
        let mut file = NewFile::nameless(Path::new("/dev/shm")).unwrap();
        file.write_all(b"content").unwrap();
        keep(&file, &path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"content");
    }
}
