//! Backing chains: which names are followed, and who opens them.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::storage::Storage;

/// A format that was named, never guessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// qcow2, version 2 or 3.
    Qcow2,
    /// The bytes of the disk as they are.
    Raw,
}

impl Format {
    /// The name that image headers and command lines use.
    pub fn name(self) -> &'static str {
        match self {
            Format::Qcow2 => "qcow2",
            Format::Raw => "raw",
        }
    }

    /// The format of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Format::Qcow2, Format::Raw]
            .into_iter()
            .find(|format| format.name() == name)
    }
}

/// Opens files for a chain: the only way in which this crate reaches the file system by name.
pub trait Opener {
    /// Opens `path`, and locks it as its use asks. Backing files are never opened `writable`.
    fn open(&self, path: &Path, writable: bool) -> io::Result<Arc<dyn Storage>>;

    /// The absolute path without symbolic links, by which the policy judges where a file is.
    fn canonicalize(&self, path: &Path) -> io::Result<PathBuf> {
        std::fs::canonicalize(path)
    }
}

/// Which backing files an image may name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReferencePolicy {
    /// None: an image with a backing file is refused.
    None,
    /// Those in the folder of the image that names them, or below it, symbolic links resolved.
    #[default]
    OwnFolder,
    /// Any.
    Any,
}
