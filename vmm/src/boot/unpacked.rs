//! Unpacked kernels are kept, since unpacking one takes many times as long as all else before the
//! guest's first instruction.
//!
//! A kept one has its bzImage's device, inode, size and times in its name. It gets that name when it
//! is whole, and only one of the size that the bzImage records is used.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// How many are kept; the oldest goes first.
const KEPT: usize = 4;
/// Largest that is kept: Debian's take 60 MB.
const MAX_SIZE: u64 = 256 << 20;

/// The folder of unpacked kernels.
#[derive(Debug)]
pub struct UnpackedKernels {
    folder: PathBuf,
}

impl UnpackedKernels {
    /// Those in `folder`, which is made when there is something to keep.
    #[must_use]
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// What `bzimage` unpacks to, `size` bytes, if it was kept.
    pub(super) fn get(&self, bzimage: &File, size: u64) -> Option<File> {
        let kept = File::open(self.folder.join(name(bzimage).ok()?)).ok()?;
        let data = kept.metadata().ok()?;
        (data.is_file() && data.len() == size).then_some(kept)
    }

    /// Keeps what `bzimage` unpacks to.
    ///
    /// # Errors
    /// It cannot be written; nothing but the time of the next start depends on it.
    pub(super) fn put(&self, bzimage: &File, elf: &[u8]) -> io::Result<()> {
        if elf.len() as u64 > MAX_SIZE {
            return Ok(());
        }
        let name = name(bzimage)?;
        fs::create_dir_all(&self.folder)?;
        self.make_room()?;
        // Of two processes that do this at once, each writes a file of its own.
        let temporary = self.folder.join(format!("{name}.{}", std::process::id()));
        let kept = write(&temporary, elf).and_then(|()| {
            let path = self.folder.join(name);
            fs::rename(&temporary, path)
        });
        if kept.is_err() {
            // It may not be there, or will be the oldest one day.
            let _ = fs::remove_file(&temporary);
        }
        kept
    }

    /// Removes the oldest until there is room for one more. What a process that is no more has left
    /// half-written counts, too.
    fn make_room(&self) -> io::Result<()> {
        let mut files: Vec<(SystemTime, PathBuf)> = fs::read_dir(&self.folder)?
            .flatten()
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
            .collect();
        files.sort();
        let too_many = (files.len() + 1).saturating_sub(KEPT);
        for (_, path) in files.into_iter().take(too_many) {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    // Before it has its name, which must not survive a power cut that its content does not.
    file.sync_data()
}

fn name(bzimage: &File) -> io::Result<String> {
    let data = bzimage.metadata()?;
    Ok(format!(
        "{:x}-{:x}-{:x}-{:x}.{:x}-{:x}.{:x}",
        data.dev(),
        data.ino(),
        data.len(),
        data.mtime(),
        data.mtime_nsec(),
        data.ctime(),
        data.ctime_nsec(),
    ))
}
