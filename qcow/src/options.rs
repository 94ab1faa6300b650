//! How to open an image.

use std::sync::Arc;

use crate::chain::{Format, ReferencePolicy};
use crate::crypt::secret::Secret;
use crate::snapshot::Selector;
use crate::storage::Storage;

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Format of the named file.
    pub format: Format,
    /// No write reaches any file.
    pub read_only: bool,
    /// Which backing and data files are followed.
    pub references: ReferencePolicy,
    /// Format of backing files whose image does not record one. Without it they are refused.
    pub backing_format: Option<Format>,
    /// The data file of the named image, if it has one. Without it, the name that its header has
    /// is opened, as [`references`](Self::references) allow.
    pub data_file: Option<Arc<dyn Storage>>,
    /// Bytes of tables to keep in memory, for the whole chain: half for the top image, the rest
    /// shared by its backing files, but never less than 64 KiB each.
    pub cache_bytes: usize,
    /// The file may not grow past this many bytes: writes that would need more fail with
    /// [`Error::Full`](crate::Error::Full).
    pub max_file_size: Option<u64>,
    /// The snapshot of the named file that is to be the disk, which is then only read.
    pub snapshot: Option<Selector>,
    /// The passwords of the chain's encrypted files, one for each of them, from the top down.
    /// There must be as many as there are such files.
    pub secrets: Vec<Secret>,
    /// Iterations of PBKDF2 that may be spent on trying the passwords. A header can ask for hours;
    /// a key slot with more than are left is refused.
    pub max_key_iterations: u64,
    /// Takes no password: encrypted files can be looked at, but neither read nor written.
    pub stay_locked: bool,
}

impl OpenOptions {
    /// Default of [`cache_bytes`](Self::cache_bytes): with 64 KiB clusters the tables of 64 GiB.
    pub const DEFAULT_CACHE_BYTES: usize = 16 << 20;

    /// Default of [`max_key_iterations`](Self::max_key_iterations): about 15 s with SHA-256, and
    /// half a minute with the slowest hash. QEMU's default for a key slot is what takes it two
    /// seconds, some 10 million: five of these can be tried.
    pub const DEFAULT_KEY_ITERATIONS: u64 = 1 << 26;

    /// Read-write, backing files in the image's own folder, 16 MiB of tables.
    pub fn new(format: Format) -> Self {
        OpenOptions {
            format,
            read_only: false,
            references: ReferencePolicy::default(),
            backing_format: None,
            data_file: None,
            cache_bytes: Self::DEFAULT_CACHE_BYTES,
            max_file_size: None,
            snapshot: None,
            secrets: Vec::new(),
            max_key_iterations: Self::DEFAULT_KEY_ITERATIONS,
            stay_locked: false,
        }
    }
}
