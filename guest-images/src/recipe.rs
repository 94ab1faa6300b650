//! Running the commands that make something.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Write, pipe};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::progress::Step;
use crate::{Error, Progress, packages};

/// How many lines of a failed command's output an error shows.
const TAIL: usize = 12;

/// Something that is being made.
pub(crate) struct Recipe {
    /// What it is, for a person.
    pub(crate) what: String,
    /// Where its files go.
    pub(crate) out: PathBuf,
    /// A folder for whatever else it takes, removed afterwards.
    pub(crate) work: PathBuf,
    log: PathBuf,
    step: Step,
}

impl Recipe {
    pub(crate) fn begin(
        what: &str,
        folder: &Path,
        log: &Path,
        progress: Progress,
    ) -> Result<Self, Error> {
        let (out, work) = (folder.join("out"), folder.join("work"));
        for folder in [&out, &work]
            .into_iter()
            .map(PathBuf::as_path)
            .chain(log.parent())
        {
            std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        }
        File::create(log).map_err(Error::io(log))?;
        let step = progress.step(what);
        Ok(Self {
            what: what.to_owned(),
            out,
            work,
            log: log.to_owned(),
            step,
        })
    }

    /// A POSIX shell that runs `script` in [`work`](Self::work) and stops at the first failure.
    /// It finds `$OUT` in its environment.
    pub(crate) fn shell(&self, script: &str) -> Command {
        let mut command = self.command("sh");
        command.args(["-euc", script]);
        command
    }

    /// A program to be run in [`work`](Self::work).
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut path = std::env::var_os("PATH").unwrap_or_default();
        path.push(":");
        path.push(packages::ADMIN_PATH);
        let mut command = Command::new(program);
        command.current_dir(&self.work).stdin(Stdio::null());
        command
            .env("PATH", path)
            .env("LC_ALL", "C")
            .env("OUT", &self.out);
        command
    }

    /// Runs a command to its end, its output going to the log; returns its output.
    pub(crate) fn run(&self, mut command: Command) -> Result<String, Error> {
        let name = command.get_program().to_string_lossy().into_owned();
        let (reader, writer) = pipe().map_err(Error::io(&self.log))?;
        let mut log = File::options()
            .append(true)
            .open(&self.log)
            .map_err(Error::io(&self.log))?;
        let errors = writer.try_clone().map_err(Error::io(&self.log))?;
        command.stdout(writer).stderr(errors);
        let mut child = command.spawn().map_err(|source| Error::Spawn {
            what: self.what.clone(),
            command: name.clone(),
            source,
        })?;
        // The command holds the pipe's writing end, which would keep it open.
        drop(command);
        let mut output = String::new();
        let mut tail = VecDeque::new();
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        while reader
            .read_until(b'\n', &mut line)
            .map_err(Error::io(&self.log))?
            > 0
        {
            log.write_all(&line).map_err(Error::io(&self.log))?;
            let text = String::from_utf8_lossy(&line).into_owned();
            self.step.detail(&self.what, &text);
            output.push_str(&text);
            tail.push_back(text);
            if tail.len() > TAIL {
                tail.pop_front();
            }
            line.clear();
        }
        let status = child.wait().map_err(Error::io(&self.log))?;
        if status.success() {
            return Ok(output);
        }
        Err(Error::Command {
            what: self.what.clone(),
            command: name,
            status,
            log: self.log.clone(),
            tail: tail.into_iter().collect(),
        })
    }
}
