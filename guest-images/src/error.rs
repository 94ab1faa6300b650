//! What can go wrong while something is made.

use std::path::PathBuf;
use std::process::ExitStatus;

/// Why a guest image, kernel or program could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither `XDG_CACHE_HOME` nor `HOME` names an absolute folder.
    #[error("no folder to keep guest images in: set XDG_CACHE_HOME or HOME to an absolute path")]
    NoCacheFolder,
    /// Debian packages are missing.
    #[error("{what} needs packages that are missing here: apt-get install {}", packages.join(" "))]
    MissingPackages {
        /// What was to be made.
        what: String,
        /// Their names.
        packages: Vec<&'static str>,
    },
    /// This source tree is needed and not where it was when this program was built.
    #[error("cannot build {what}: its sources are no longer in {}; what ./release builds needs none", folder.display())]
    NoSources {
        /// What was to be built.
        what: String,
        /// Where they were.
        folder: PathBuf,
    },
    /// A command of a recipe failed.
    #[error("{what}: {command} failed ({status}); its output is in {}\n{tail}", log.display())]
    Command {
        /// What was to be made.
        what: String,
        /// The command.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// All it printed.
        log: PathBuf,
        /// The last lines of that.
        tail: String,
    },
    /// A command of a recipe could not be run.
    #[error("{what}: cannot run {command}")]
    Spawn {
        /// What was to be made.
        what: String,
        /// The command.
        command: String,
        /// Why.
        source: std::io::Error,
    },
    /// A recipe did not make what it should.
    #[error("{what}: no {missing} came of it")]
    Incomplete {
        /// What was to be made.
        what: String,
        /// The file or module that is missing.
        missing: String,
    },
    /// A file or folder of the cache or of the sources.
    #[error("cannot use {}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl Error {
    /// For `map_err` on something done to `path`.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        |source| Self::Io { path, source }
    }
}
