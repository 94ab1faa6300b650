//! Running the command.

use alloc::ffi::CString;
use alloc::format;
use alloc::vec::Vec;

use cowshed_guest_protocol::{Failure, Reason};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;

use crate::control::Job;
use crate::environment::{environment, value};
use crate::raw::Pointers;
use crate::relay::{ChildEnds, Pumps, Streams};
use crate::{Stop, raw};

/// What a status byte on the error pipe says was being done.
const CHANGING_DIRECTORY: u8 = 1;
const EXECUTING: u8 = 2;

/// Runs the command in a session of its own, its streams on pipes; the pumps join these to the
/// ports. `SIGCHLD` is blocked from here on.
pub(crate) fn spawn(job: &Job, streams: Streams) -> Result<(Pid, Pumps), Stop> {
    let (errors, report) = pipe_with(PipeFlags::CLOEXEC).map_err(Stop::boot("make a pipe"))?;
    raw::block_child_signal(true).map_err(Stop::boot("block a signal"))?;
    let pid = match raw::fork().map_err(Stop::boot("fork"))? {
        Some(pid) => pid,
        None => {
            let (doing, errno) = child(job, &streams.child);
            let [low, high, ..] = errno.raw_os_error().to_le_bytes();
            let _ = rustix::io::write(&report, &[doing, low, high]);
            raw::exit(127)
        }
    };
    drop(report);
    let mut failed = [0; 3];
    if matches!(rustix::io::read(&errors, &mut failed[..]), Ok(3)) {
        let [doing, low, high] = failed;
        let errno = Errno::from_raw_os_error(i32::from(u16::from_le_bytes([low, high])));
        return Err(refused(job, doing, errno));
    }
    Ok((pid, streams.pumps))
}

fn refused(job: &Job, doing: u8, errno: Errno) -> Stop {
    let command = job
        .argv
        .first()
        .map(|name| name.to_string_lossy())
        .unwrap_or_default();
    if doing == CHANGING_DIRECTORY {
        let message = format!(
            "cannot change to {}: {}",
            job.cwd.to_string_lossy(),
            Reason(errno)
        );
        return Stop {
            failure: Failure::NotExecutable,
            message,
        };
    }
    match errno {
        Errno::NOENT | Errno::NOTDIR => Stop {
            failure: Failure::NotFound,
            message: format!("{command}: command not found"),
        },
        _ => Stop {
            failure: Failure::NotExecutable,
            message: format!("{command}: {}", Reason(errno)),
        },
    }
}

/// Becomes the command, or says what it was doing and why it failed.
fn child(job: &Job, ends: &ChildEnds) -> (u8, Errno) {
    let prepared = rustix::process::setsid()
        .map(drop)
        .and_then(|()| raw::block_child_signal(false))
        .and_then(|()| rustix::stdio::dup2_stdin(&ends.stdin))
        .and_then(|()| rustix::stdio::dup2_stdout(&ends.stdout))
        .and_then(|()| rustix::stdio::dup2_stderr(&ends.stderr));
    if let Err(errno) = prepared {
        return (EXECUTING, errno);
    }
    if !job.cwd.is_empty()
        && let Err(errno) = rustix::process::chdir(&*job.cwd)
    {
        return (CHANGING_DIRECTORY, errno);
    }
    let environment = environment(&job.env);
    (EXECUTING, execute(&job.argv, &environment))
}

/// Looks the command up as `execvp` does, and returns only on a failure.
fn execute(argv: &[CString], environment: &[CString]) -> Errno {
    let Some(command) = argv.first() else {
        return Errno::INVAL;
    };
    if command.to_bytes().contains(&b'/') {
        return execute_path(command.clone(), argv, environment);
    }
    let mut denied = None;
    for folder in value(environment, b"PATH")
        .unwrap_or_default()
        .split(|byte| *byte == b':')
    {
        let folder = if folder.is_empty() { b"." } else { folder };
        let path = [folder, b"/", command.to_bytes()].concat();
        let Ok(path) = CString::new(path) else {
            continue;
        };
        match execute_path(path, argv, environment) {
            Errno::NOENT | Errno::NOTDIR => {}
            Errno::ACCESS => denied = Some(Errno::ACCESS),
            errno => return errno,
        }
    }
    denied.unwrap_or(Errno::NOENT)
}

fn execute_path(path: CString, argv: &[CString], environment: &[CString]) -> Errno {
    let variables = Pointers::new(environment);
    let errno = raw::execve(&path, &Pointers::new(argv), &variables);
    if errno != Errno::NOEXEC {
        return errno;
    }
    // A script without `#!`, as every shell takes it.
    let arguments = argv.iter().skip(1).cloned();
    let script: Vec<CString> = [c"sh".into(), path].into_iter().chain(arguments).collect();
    raw::execve(c"/bin/sh", &Pointers::new(&script), &variables)
}

/// Becomes the init of the root that we are on.
pub(crate) fn become_init() -> Stop {
    let environment = environment(&[]);
    let mut last = Errno::NOENT;
    for init in [c"/sbin/init", c"/etc/init", c"/bin/init", c"/bin/sh"] {
        last = execute_path(init.into(), &[init.into()], &environment);
    }
    Stop::boot("run an init of the root file system")(last)
}
