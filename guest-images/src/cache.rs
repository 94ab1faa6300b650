//! Things that are made once and kept.
//!
//! An entry is a folder whose name has a hash of what it was made from. It is made in a folder
//! beside it, under a lock, and renamed when it is whole: what has the name is whole, and no one
//! makes the same entry twice. The lock dies with its process, so what is found half-made under a
//! free lock is no one's and is removed.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use crate::recipe::Recipe;
use crate::{Error, Progress};

/// The folder that has the entries.
#[derive(Debug)]
pub(crate) struct Cache {
    folder: PathBuf,
    progress: Progress,
}

impl Cache {
    pub(crate) fn new(folder: PathBuf, progress: Progress) -> Self {
        Self { folder, progress }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The entry `name`; if it is not there it is made by `make`, which leaves its files in
    /// [`Recipe::out`], while the person waiting is told that `what` is being made.
    pub(crate) fn entry(
        &self,
        name: &str,
        what: &str,
        make: impl FnOnce(&Recipe) -> Result<(), Error>,
    ) -> Result<PathBuf, Error> {
        let path = self.folder.join(name);
        if path.is_dir() {
            return Ok(path);
        }
        let _lock = self.lock(name, what)?;
        if path.is_dir() {
            return Ok(path);
        }
        self.sweep()?;
        let making = self.making(name);
        remove(&making)?;
        let log = self.folder.join("logs").join(format!("{name}.log"));
        let recipe = Recipe::begin(what, &making, &log, self.progress)?;
        let made = make(&recipe).and_then(|()| {
            seal(&recipe.out)?;
            std::fs::rename(&recipe.out, &path).map_err(Error::io(&path))
        });
        remove(&making)?;
        made.map(|()| path)
    }

    /// The newest entry whose name begins with `prefix`.
    pub(crate) fn newest(&self, prefix: &str) -> Option<PathBuf> {
        let entries = std::fs::read_dir(&self.folder).ok()?.flatten();
        let of_it = entries.filter(|entry| {
            entry
                .file_name()
                .to_str()
                .is_some_and(|name| name.starts_with(prefix))
        });
        of_it
            .max_by_key(|entry| entry.metadata().and_then(|data| data.modified()).ok())
            .map(|entry| entry.path())
    }

    fn making(&self, name: &str) -> PathBuf {
        self.folder.join(".making").join(name)
    }

    fn lock(&self, name: &str, what: &str) -> Result<File, Error> {
        let (file, path) = self.lock_file(name)?;
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Ok(file);
        }
        let _step = self
            .progress
            .step(&format!("waiting for another process: {what}"));
        loop {
            match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
                Ok(()) => return Ok(file),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::io(path)(errno.into())),
            }
        }
    }

    fn lock_file(&self, name: &str) -> Result<(File, PathBuf), Error> {
        let locks = self.folder.join(".locks");
        std::fs::create_dir_all(&locks).map_err(Error::io(&locks))?;
        let path = locks.join(name);
        let file = File::create(&path).map_err(Error::io(&path))?;
        Ok((file, path))
    }

    /// Removes what processes that are no more have left half-made.
    fn sweep(&self) -> Result<(), Error> {
        let Ok(abandoned) = std::fs::read_dir(self.folder.join(".making")) else {
            return Ok(());
        };
        for entry in abandoned.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let (file, _) = self.lock_file(name)?;
            if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }
}

fn remove(folder: &Path) -> Result<(), Error> {
    match std::fs::remove_dir_all(folder) {
        Err(source) if source.kind() != ErrorKind::NotFound => Err(Error::io(folder)(source)),
        _ => Ok(()),
    }
}

/// Writes the checksums of the files in `folder`, for `sha256sum --check`, and brings them to disk.
fn seal(folder: &Path) -> Result<(), Error> {
    let mut sums = String::new();
    let mut files = files(folder)?;
    files.sort();
    for path in files {
        let content = std::fs::read(&path).map_err(Error::io(&path))?;
        File::open(&path)
            .and_then(|file| file.sync_all())
            .map_err(Error::io(&path))?;
        let name = path.strip_prefix(folder).unwrap_or(&path);
        sums.push_str(&format!(
            "{}  {}\n",
            hex(&Sha256::digest(content)),
            name.display()
        ));
    }
    let path = folder.join("SHA256SUMS");
    std::fs::write(&path, sums).map_err(Error::io(path))
}

/// Every regular file below `folder`.
pub(crate) fn files(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).map_err(Error::io(&folder))? {
            let entry = entry.map_err(Error::io(&folder))?;
            let kind = entry.file_type().map_err(Error::io(entry.path()))?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}

/// A hash of inputs, each set off from the next.
#[derive(Default)]
pub(crate) struct Key(Sha256);

impl Key {
    pub(crate) fn with(mut self, input: &[u8]) -> Self {
        self.0.update(input.len().to_le_bytes());
        self.0.update(input);
        self
    }

    /// Sixteen hexadecimal digits.
    pub(crate) fn finish(self) -> String {
        let mut digits = hex(&self.0.finalize());
        digits.truncate(16);
        digits
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
