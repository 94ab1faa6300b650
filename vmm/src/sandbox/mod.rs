//! The cage of the monitor's process. A guest that takes it over finds no file to open, no program to
//! run, no network, no privilege, and only the system calls that the monitor's own work needs.
//!
//! It has three layers, from the outside in: privileges are given up, Landlock denies all paths and the
//! network, and seccomp ends the process that makes a call which is not on its thread's list.

mod calls;
mod identity;
pub(crate) mod inherited;
mod paths;
mod privileges;
mod seccomp;

use std::path::PathBuf;

use cowshed_devices::threads::Kind;

use crate::config;
use crate::host::Virtualization;
pub(crate) use identity::Identity;

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host's kernel lacks a part of it, and it was required.
    #[error("this host cannot sandbox a guest, which --sandbox require asks for: it has no {0}")]
    Lacking(&'static str),
    /// `--user` names nobody.
    #[error("--user {0}: no such user or group in /etc/passwd and /etc/group; give UID:GID")]
    Nobody(String),
    /// A file that names users cannot be read.
    #[error("cannot read {0}")]
    Names(&'static str, #[source] std::io::Error),
    /// `--chroot` does not work.
    #[error("cannot make {} the root folder: --chroot needs a folder, and root's privileges", .0.display())]
    Chroot(PathBuf, #[source] std::io::Error),
    /// `--user` does not work.
    #[error("cannot become user {0}, group {1}: --user needs root's privileges")]
    User(u32, u32, #[source] std::io::Error),
    /// A privilege could not be given up.
    #[error("cannot {0}")]
    Privileges(&'static str, #[source] std::io::Error),
    /// Landlock refused.
    #[error("cannot confine to no path")]
    Landlock(#[from] landlock::RulesetError),
}

/// What a thread of the monitor does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Makes the devices' threads and obeys the session: it may do what any of those may. So may the
    /// thread that it makes for what is typed.
    Main,
    /// Runs a vCPU.
    Vcpu,
    /// Serves a device.
    Device(Kind),
}

/// The sandbox of this process, as far as the host has one. Each thread enters it for itself.
#[derive(Clone, Copy, Debug)]
pub struct Sandbox {
    /// `None`: threads are not confined.
    seccomp: Option<Virtualization>,
}

impl Sandbox {
    /// No sandbox.
    #[must_use]
    pub fn off() -> Self {
        Self { seccomp: None }
    }

    /// Takes from this process what its guest must never have. Called by its only thread, with
    /// everything open that it needs; threads made later inherit it.
    ///
    /// # Errors
    /// The host refuses a part, or lacks one that is required.
    pub fn enter(
        config: &config::Sandbox,
        identity: Option<Identity>,
        host: Virtualization,
    ) -> Result<Self, Error> {
        if let Some(folder) = &config.chroot {
            privileges::change_root(folder)?;
        }
        if let Some(identity) = identity {
            privileges::become_user(identity)?;
        }
        if config.mode == config::SandboxMode::Off {
            return Ok(Self::off());
        }
        privileges::give_up()?;
        let landlock = paths::deny()?;
        let seccomp = seccomp::is_available();
        for (has, what) in [(landlock, "Landlock"), (seccomp, "seccomp")] {
            match config.mode {
                _ if has => {}
                config::SandboxMode::Require => return Err(Error::Lacking(what)),
                _ => tracing::warn!("this host's kernel has no {what}: the sandbox does without"),
            }
        }
        Ok(Self {
            seccomp: seccomp.then_some(host),
        })
    }

    /// Confines the calling thread, and those that it makes, to the calls of its kind. A process whose
    /// thread cannot be confined ends.
    pub fn confine(self, thread: Thread) {
        let Some(host) = self.seccomp else { return };
        if let Err(error) = seccomp::install(calls::of(thread, host)) {
            tracing::error!(%error, ?thread, "cannot confine a thread");
            std::process::abort();
        }
    }
}

/// What the host's kernel has of the sandbox: Landlock, seccomp.
pub(crate) fn available() -> [bool; 2] {
    [paths::are_deniable(), seccomp::is_available()]
}
