//! What can go wrong with a disk image, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

/// A value in an image that the specification, or a limit of this crate, does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} at offset {offset:#x} is {value}, expected {expected}")]
pub struct Violation {
    /// Name of the field, as the specification has it.
    pub field: String,
    /// Where in the file it was read, in bytes.
    pub offset: u64,
    /// The value that was found.
    pub value: String,
    /// What would have been right.
    pub expected: String,
}

impl Violation {
    pub(crate) fn new(
        field: impl Into<String>,
        offset: u64,
        value: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Violation {
            field: field.into(),
            offset,
            value: value.to_string(),
            expected: expected.into(),
        }
    }
}

/// What an image can name another file as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reference {
    /// What shows through where the image has nothing.
    BackingFile,
    /// What has the guest's data, while the image has the tables.
    DataFile,
}

impl std::fmt::Display for Reference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Reference::BackingFile => "backing file",
            Reference::DataFile => "data file",
        })
    }
}

/// Why an image cannot be opened, read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call on one of the chain's files failed.
    #[error("cannot {action} {file}")]
    Io {
        /// The file.
        file: PathBuf,
        /// What was attempted: a verb with its object's place, such as `read 512 bytes at 0x200 of`.
        action: String,
        /// What the system said.
        source: io::Error,
    },
    /// The image breaks the format.
    #[error("{file} is not a valid image (`cowshed img check` may say more)")]
    Invalid {
        /// The image.
        file: PathBuf,
        /// Field, offset, value and expectation.
        source: Violation,
    },
    /// The image is valid and uses something that this crate does not do yet.
    #[error("{file} uses {feature}, which is not supported: {advice}")]
    Unsupported {
        /// The image.
        file: PathBuf,
        /// The feature's name.
        feature: String,
        /// What a person can do.
        advice: &'static str,
    },
    /// A backing or data file that the policy, the name or the chain's shape forbids.
    #[error("{file} names the {kind} {name:?}, which is refused: {reason}")]
    Reference {
        /// The image that names it.
        file: PathBuf,
        /// What it names.
        kind: Reference,
        /// The name as it is recorded.
        name: String,
        /// Why, and what to do.
        reason: String,
    },
    /// A backing or data file that only [`ReferencePolicy::Any`](crate::ReferencePolicy::Any) follows.
    #[error("{file} names the {kind} {name:?}, which is outside the image's own folder {folder}")]
    Outside {
        /// The image that names it.
        file: PathBuf,
        /// What it names.
        kind: Reference,
        /// The name as it is recorded.
        name: String,
        /// The folder of the image, symbolic links resolved.
        folder: PathBuf,
    },
    /// A write to an image that was opened for reading.
    #[error("{file} is open read-only")]
    ReadOnly {
        /// The image.
        file: PathBuf,
    },
    /// The image is marked corrupt, or was found corrupt while open; it is not written any more.
    #[error(
        "{file} is corrupt and is not written: {reason}; repair it with `cowshed img check -r all`"
    )]
    Corrupt {
        /// The image.
        file: PathBuf,
        /// What was found.
        reason: String,
    },
    /// A bitmap that is not there, or cannot be what was asked of it.
    #[error("cannot use the bitmap {name:?} of {file}: {reason}")]
    Bitmap {
        /// The image.
        file: PathBuf,
        /// The bitmap's name.
        name: String,
        /// Why, and what to do.
        reason: String,
    },
    /// No key opens the image, or none would be left that does.
    #[error("cannot unlock {file}: {reason}")]
    Locked {
        /// The image.
        file: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// A request past the end of the disk.
    #[error("{len} bytes at {offset:#x} reach past the end of a disk of {size} bytes")]
    OutOfRange {
        /// Start of the request in bytes.
        offset: u64,
        /// Length of the request in bytes.
        len: u64,
        /// The disk's size in bytes.
        size: u64,
    },
    /// Long work was told to stop.
    #[error("stopped before the end")]
    Stopped,
    /// Compressed clusters are written whole.
    #[error(
        "{len} bytes at {offset:#x} are no whole clusters of {cluster} bytes, as compressed ones must be"
    )]
    Unaligned {
        /// Start of the request in bytes.
        offset: u64,
        /// Length of the request in bytes.
        len: u64,
        /// Bytes in a cluster.
        cluster: u64,
    },
    /// The file may not grow any further.
    #[error("{file} may not grow past {limit} bytes: raise the overlay's size limit")]
    Full {
        /// The image.
        file: PathBuf,
        /// The limit in bytes, or the most that the format can address.
        limit: u64,
    },
    /// A change of the image that it, or its format, does not allow.
    #[error("cannot change {file}: {reason}")]
    Change {
        /// The image.
        file: PathBuf,
        /// What stands against it, and what to do.
        reason: String,
    },
    /// No snapshot is the one that was asked for.
    #[error("{file} has no snapshot with {wanted}: `cowshed img snapshot -l` lists those it has")]
    NoSnapshot {
        /// The image.
        file: PathBuf,
        /// ID or name.
        wanted: String,
    },
    /// Creation options that contradict each other or the format.
    #[error("cannot create {file}: {reason}")]
    Options {
        /// The image to be.
        file: PathBuf,
        /// Which option, and what it may be.
        reason: String,
    },
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn io(
        file: &Path,
        action: impl FnOnce() -> String,
    ) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io {
            file: file.to_owned(),
            action: action(),
            source,
        }
    }

    /// The kind that an I/O error of the same meaning would have.
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Error::Io { source, .. } => source.kind(),
            Error::Invalid { .. } | Error::Corrupt { .. } => io::ErrorKind::InvalidData,
            Error::Unsupported { .. } => io::ErrorKind::Unsupported,
            Error::Reference { .. } | Error::Outside { .. } | Error::Locked { .. } => {
                io::ErrorKind::PermissionDenied
            }
            Error::ReadOnly { .. } => io::ErrorKind::ReadOnlyFilesystem,
            Error::OutOfRange { .. }
            | Error::Unaligned { .. }
            | Error::Change { .. }
            | Error::Options { .. }
            | Error::Bitmap { .. } => io::ErrorKind::InvalidInput,
            Error::NoSnapshot { .. } => io::ErrorKind::NotFound,
            Error::Stopped => io::ErrorKind::Interrupted,
            Error::Full { .. } => io::ErrorKind::StorageFull,
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        io::Error::new(error.kind(), error)
    }
}
