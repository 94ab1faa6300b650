//! Running the built `cowshed`, with a deadline.

use std::ffi::OsStr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::process;

/// How long a run may take before its test fails: it is there for runs that never end, since a boot
/// takes ten times as long where KVM emulates and other work has the CPUs.
const LIMIT: Duration = Duration::from_secs(600);

/// The binary that `./release` builds, on the first call, unless `COWSHED_BIN` names one.
///
/// # Panics
/// When it does not build.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| match std::env::var_os("COWSHED_BIN") {
        Some(path) => path.into(),
        None => build(),
    })
}

/// Cargo has no `CARGO_BIN_EXE_` for another package's binary; it does say where it put one.
fn build() -> PathBuf {
    let output = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../release"))
        .args(["--quiet", "--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .expect("run ./release");
    assert!(output.status.success(), "./release: {}", output.status);
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .expect("cargo named no executable")
}

/// A `cowshed` command line before it is started. The end of standard input is given at once
/// unless [`Cowshed::stdin`] says otherwise.
#[derive(Debug)]
pub struct Cowshed {
    command: Command,
    stdin: Vec<u8>,
    limit: Duration,
}

impl Cowshed {
    /// `cowshed run`, with no options yet.
    pub fn run() -> Self {
        let mut command = Command::new(binary());
        command.arg("run");
        Self {
            command,
            stdin: Vec::new(),
            limit: LIMIT,
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds the option `name` with its `value`.
    #[must_use]
    pub fn option(self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.arg(name).arg(value)
    }

    /// Adds `-- sh -c SCRIPT`, the guest's command; nothing may follow it.
    #[must_use]
    pub fn script(self, script: &str) -> Self {
        self.command(["sh", "-c", script])
    }

    /// Adds `-- COMMAND ARGS...`; nothing may follow it.
    #[must_use]
    pub fn command<S: AsRef<OsStr>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        self.command.arg("--").args(words);
        self
    }

    /// What standard input gives before its end.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Fails the test when the run is not over after `limit`; ten minutes unless said.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs it to its end.
    ///
    /// # Panics
    /// When it does not start, or not end in time.
    pub fn output(self) -> Output {
        let stdin = self.stdin.clone();
        let mut running = self.spawn();
        let mut pipe = running.take_stdin();
        // The guest need not read it all: its write may end in EPIPE, which is no failure.
        let writer = std::thread::spawn(move || std::io::Write::write_all(&mut pipe, &stdin));
        let ended = running.wait();
        let _ = writer.join().expect("write standard input");
        ended
    }

    /// Starts it, with pipes for the three standard streams.
    ///
    /// # Panics
    /// When it does not start.
    pub fn spawn(mut self) -> Running {
        let child = self
            .command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start cowshed");
        Running {
            child,
            started: Instant::now(),
            limit: self.limit,
        }
    }
}

/// A `cowshed` that runs; killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    started: Instant,
    limit: Duration,
}

impl Running {
    /// The pipe to its standard input; dropping it is the input's end.
    ///
    /// # Panics
    /// When it was taken before.
    pub fn take_stdin(&mut self) -> ChildStdin {
        self.child.stdin.take().expect("standard input, once")
    }

    /// The pipe from its standard output, which somebody must read.
    ///
    /// # Panics
    /// When it was taken before.
    pub fn take_stdout(&mut self) -> ChildStdout {
        self.child.stdout.take().expect("standard output, once")
    }

    /// The pipe from its standard error, which somebody must read.
    ///
    /// # Panics
    /// When it was taken before.
    pub fn take_stderr(&mut self) -> ChildStderr {
        self.child.stderr.take().expect("standard error, once")
    }

    /// The number of its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends it `signal`.
    ///
    /// # Panics
    /// When it has ended and was waited for.
    pub fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal)
            .expect("send a signal");
    }

    /// Kills the processes that it made, not itself.
    ///
    /// # Panics
    /// When the kernel does not say which those are.
    pub fn kill_children(&self) {
        let id = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children"))
            .expect("read who the children are");
        for child in children.split_ascii_whitespace() {
            let pid = child.parse().ok().and_then(rustix::process::Pid::from_raw);
            // It may have ended by itself in between, which is as good.
            let _ = rustix::process::kill_process(
                pid.expect("a process ID"),
                rustix::process::Signal::KILL,
            );
        }
    }

    /// Waits for its end: ends the input and reads the output, as far as nobody took their pipes.
    ///
    /// # Panics
    /// When it does not end in time; the message has its standard error.
    pub fn wait(mut self) -> Output {
        drop(self.child.stdin.take());
        let stdout = self.child.stdout.take().map(process::drain);
        let stderr = self.child.stderr.take().map(process::drain);
        let left = self.limit.saturating_sub(self.started.elapsed());
        let status = process::wait(&mut self.child, left);
        let elapsed = self.started.elapsed();
        process::kill(&mut self.child);
        let join = |reader: Option<JoinHandle<Vec<u8>>>| {
            reader.map_or_else(Vec::new, |reader| reader.join().expect("read a pipe"))
        };
        let (stdout, stderr) = (join(stdout), join(stderr));
        let Some(status) = status else {
            panic!(
                "cowshed did not end within {:?}\n--- stdout ---\n{}\n--- stderr ---\n{}",
                self.limit,
                tail(&stdout),
                tail(&stderr),
            );
        };
        Output {
            status,
            stdout,
            stderr,
            elapsed,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        process::kill(&mut self.child);
    }
}

/// What a run left behind.
#[derive(Debug)]
pub struct Output {
    /// How the process ended.
    pub status: ExitStatus,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
    /// From start to end.
    pub elapsed: Duration,
}

impl Output {
    /// The exit status.
    ///
    /// # Panics
    /// When a signal ended the process.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| {
            panic!(
                "cowshed was ended by signal {:?}\n{}",
                self.status.signal(),
                self.stderr()
            )
        })
    }

    /// Standard output as text.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// The output itself, if the status is `status`.
    ///
    /// # Panics
    /// When it is another; the message has both streams' ends.
    #[must_use]
    pub fn expect_status(self, status: i32) -> Self {
        let code = self.code();
        assert!(
            code == status,
            "status {code} instead of {status} after {:?}\n--- stdout ---\n{}\n--- stderr ---\n{}",
            self.elapsed,
            tail(&self.stdout),
            tail(&self.stderr),
        );
        self
    }
}

/// The last part of `bytes`: a failed test has no use for ten megabytes.
fn tail(bytes: &[u8]) -> String {
    let start = bytes.len().saturating_sub(4000);
    String::from_utf8_lossy(bytes.get(start..).unwrap_or_default()).into_owned()
}
