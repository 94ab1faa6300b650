//! Why a run ended: the exit status, and the report for machines.

use std::error::Error;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Serialize, Serializer};

/// Statuses of cowshed's own. A command may end with the same numbers: the report tells which.
pub mod status {
    /// The command line was wrong.
    pub const USAGE: u8 = 120;
    /// The guest did not get to its job.
    pub const BOOT_FAILED: u8 = 121;
    /// The guest ended, and its command had not said with what status.
    pub const ENDED_WITHOUT_STATUS: u8 = 122;
    /// The guest's kernel panicked.
    pub const PANIC: u8 = 123;
    /// `--timeout` ran out.
    pub const TIMEOUT: u8 = 124;
    /// Something failed on the host's side.
    pub const VMM_ERROR: u8 = 125;
}

/// Why a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The command ended with this status.
    Exited(u8),
    /// The command, or an interactive run, was ended by this signal.
    Signaled(u8),
    /// No command was given, and the guest turned itself off.
    PoweredOff,
    /// No command was given, and the guest reset itself.
    Reset,
    /// A person ended an interactive run with the escape.
    Escaped,
    /// The guest never got to its job, for this reason.
    BootFailed(String),
    /// The guest ended before its command's status was known, in this way.
    EndedWithoutStatus(String),
    /// The guest's kernel panicked; its message if it is known.
    Panic(String),
    /// The run took longer than `--timeout`, this long.
    Timeout(Duration),
    /// The host's side failed.
    VmmError(String),
    /// The command line was wrong.
    Usage(String),
}

impl Outcome {
    /// The exit status of `cowshed run`.
    #[must_use]
    pub fn status(&self) -> u8 {
        match self {
            Self::Exited(status) => *status,
            Self::Signaled(signal) => 128_u8.saturating_add(*signal),
            Self::PoweredOff | Self::Reset | Self::Escaped => 0,
            Self::BootFailed(_) => status::BOOT_FAILED,
            Self::EndedWithoutStatus(_) => status::ENDED_WITHOUT_STATUS,
            Self::Panic(_) => status::PANIC,
            Self::Timeout(_) => status::TIMEOUT,
            Self::VmmError(_) => status::VMM_ERROR,
            Self::Usage(_) => status::USAGE,
        }
    }

    /// The report's word for it.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Exited(_) => "exited",
            Self::Signaled(_) => "signaled",
            Self::PoweredOff => "powered_off",
            Self::Reset => "reset",
            Self::Escaped => "escaped",
            Self::BootFailed(_) => "boot_failed",
            Self::EndedWithoutStatus(_) => "ended_without_status",
            Self::Panic(_) => "panic",
            Self::Timeout(_) => "timeout",
            Self::VmmError(_) => "vmm_error",
            Self::Usage(_) => "usage",
        }
    }

    /// One line for people, where there is more to say than a status. A command's own status
    /// says nothing: `cowshed` is as quiet as the command.
    #[must_use]
    pub fn message(&self) -> Option<String> {
        match self {
            Self::Exited(_) | Self::PoweredOff | Self::Reset | Self::Escaped => None,
            Self::Signaled(signal) => Some(format!("ended by signal {signal}")),
            Self::BootFailed(why) => Some(format!("boot failed: {why}")),
            Self::EndedWithoutStatus(how) => {
                Some(format!("the guest ended without a status: {how}"))
            }
            Self::Panic(message) if message.is_empty() => Some("the guest panicked".to_owned()),
            Self::Panic(message) => Some(format!("the guest panicked: {message}")),
            Self::Timeout(limit) => Some(format!(
                "the run took longer than --timeout {}s",
                limit.as_secs_f64()
            )),
            Self::VmmError(message) | Self::Usage(message) => Some(message.clone()),
        }
    }

    /// The run did not do what was asked of it: `--keep-overlay` applies.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.status() != 0
    }
}

/// What was measured on the way. Times are from the start of the program; what never happened
/// is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Measures {
    /// The first vCPU entered the guest.
    #[serde(rename = "first_instruction_ms", serialize_with = "milliseconds")]
    pub first_instruction: Option<Duration>,
    /// The guest's PID 1 said hello. Only with a command: nothing else says it.
    #[serde(rename = "pid1_ms", serialize_with = "milliseconds")]
    pub pid1: Option<Duration>,
    /// The guest ended.
    #[serde(rename = "end_ms", serialize_with = "milliseconds")]
    pub end: Option<Duration>,
    /// Bytes that the guest read from its disks.
    pub bytes_read: u64,
    /// Bytes that the guest wrote to its disks.
    pub bytes_written: u64,
    /// Size of all overlay files at the end, in bytes.
    pub overlay_size: Option<u64>,
}

/// A run that came to an end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Why it ended.
    pub outcome: Outcome,
    /// What was measured.
    pub measures: Measures,
}

impl From<Outcome> for Report {
    fn from(outcome: Outcome) -> Self {
        Self {
            outcome,
            measures: Measures::default(),
        }
    }
}

/// The report could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the report {}", path.display())]
pub struct WriteError {
    path: PathBuf,
    source: io::Error,
}

impl Report {
    /// The report as JSON, with a newline at its end.
    #[must_use]
    pub fn to_json(&self) -> String {
        #[derive(Serialize)]
        struct Page<'a> {
            reason: &'static str,
            status: u8,
            message: Option<String>,
            #[serde(flatten)]
            measures: &'a Measures,
            version: &'static str,
        }
        let page = Page {
            reason: self.outcome.reason(),
            status: self.outcome.status(),
            message: self.outcome.message(),
            measures: &self.measures,
            version: env!("CARGO_PKG_VERSION"),
        };
        // Strings and numbers always serialise.
        let mut json = serde_json::to_string_pretty(&page).unwrap_or_default();
        json.push('\n');
        json
    }

    /// Writes the report whole or not at all: to a file beside `path`, which then takes its
    /// place. A `path` that is no regular file, such as `/dev/stderr`, is written to as it is.
    ///
    /// # Errors
    /// The file cannot be written or named.
    pub fn write(&self, path: &Path) -> Result<(), WriteError> {
        let json = self.to_json();
        let written = match path.metadata() {
            Ok(meta) if !meta.is_file() => File::options()
                .write(true)
                .open(path)
                .and_then(|mut f| f.write_all(json.as_bytes())),
            _ => replace(path, json.as_bytes()),
        };
        written.map_err(|source| WriteError {
            path: path.to_path_buf(),
            source,
        })
    }
}

/// An error and its causes in one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a string does not fail.
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

/// `text` without what would command a terminal: a guest may have had a hand in it.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .filter(|char| !char.is_control() || matches!(char, '\t' | '\n'))
        .collect()
}

/// Puts `bytes` at `path` by renaming a file that was written beside it.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut name = path
        .file_name()
        .ok_or(io::ErrorKind::IsADirectory)?
        .to_os_string();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = folder.join(name);
    // Perhaps a process that had our number has left one; what else bears the name is not followed.
    let _ = std::fs::remove_file(&temporary);
    let result = File::create_new(&temporary)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| std::fs::rename(&temporary, path));
    if result.is_err() {
        // Nothing half-made stays behind; that it cannot be removed adds nothing to the error.
        let _ = std::fs::remove_file(&temporary);
    }
    result
}

#[expect(clippy::ref_option, reason = "serde's signature")]
fn milliseconds<S: Serializer>(time: &Option<Duration>, out: S) -> Result<S::Ok, S::Error> {
    match time {
        // Microseconds are kept: a boot takes a few milliseconds.
        Some(time) => out.serialize_some(&(time.as_micros() as f64 / 1000.0)),
        None => out.serialize_none(),
    }
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
