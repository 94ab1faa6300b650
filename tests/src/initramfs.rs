//! A root file system in memory, laid out file by file.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use cowshed_guest_images::cpio::Archive;

/// An initramfs that makes the folders its files are in.
#[derive(Default)]
pub(crate) struct Initramfs {
    archive: Archive,
    folders: BTreeSet<PathBuf>,
}

impl Initramfs {
    /// Adds a copy of the host's file `source`, which anybody may execute, at `target`.
    pub(crate) fn copy(&mut self, source: &Path, target: &Path) {
        let content = fs::read(source).unwrap_or_else(|e| panic!("{}: {e}", source.display()));
        self.file(target, &content);
    }

    /// Adds a file that anybody may execute at `target`, an absolute path.
    pub(crate) fn file(&mut self, target: &Path, content: &[u8]) {
        let inside = target.strip_prefix("/").expect("an absolute path");
        let folders: Vec<&Path> = inside.ancestors().skip(1).collect();
        for folder in folders
            .into_iter()
            .rev()
            .filter(|folder| *folder != Path::new(""))
        {
            if self.folders.insert(folder.into()) {
                self.archive.directory(&folder.to_string_lossy());
            }
        }
        self.archive.file(&inside.to_string_lossy(), 0o755, content);
    }

    /// The archive's bytes.
    pub(crate) fn finish(self) -> Vec<u8> {
        self.archive.finish()
    }
}
