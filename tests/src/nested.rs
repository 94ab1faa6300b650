//! A host with ordinary KVM, on any machine: QEMU emulates a CPU with SVM in software, and Debian's
//! cloud kernel with its `kvm-amd` runs on it from an initramfs that a test filled.
//!
//! ```no_run
//! use cowshed_tests::nested::{Host, Step};
//!
//! let results = Host::new()
//!     .program("/usr/bin/some-vmm", "/bin/some-vmm")
//!     .file("vmlinuz", "/inner/vmlinuz")
//!     .run(&[Step::new("boot", "some-vmm --kernel /inner/vmlinuz")]);
//! assert_eq!(results[0].status, 0);
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use cowshed_guest_images::{Kernel, KernelFiles};

use crate::initramfs::Initramfs;
use crate::{guest, process, skip};

/// The program that emulates the host's machine.
const QEMU: &str = "qemu-system-x86_64";

/// KVM on a CPU with SVM, each after what it needs.
const MODULES: [&str; 3] = ["irqbypass", "kvm", "kvm-amd"];

/// What the host runs as PID 1.
const INIT: &str = include_str!("../nested/init.sh");

/// Whether a nested host can be had here; says `skipped: ...` when it cannot.
///
/// # Panics
/// When `COWSHED_REQUIRE_NESTED=1` is set and it cannot.
pub fn is_available() -> bool {
    let missing = [QEMU, "busybox"]
        .into_iter()
        .find(|name| skip::program(name).is_none());
    let Some(missing) = missing else { return true };
    let why = format!("no nested host: {missing} is missing (qemu-system-x86, busybox-static)");
    assert!(!skip::required("COWSHED_REQUIRE_NESTED"), "{why}");
    skip::say(&why);
    false
}

/// One thing that the host runs: a shell script with a name.
#[derive(Debug, Clone)]
pub struct Step {
    name: String,
    script: String,
    limit: Duration,
}

impl Step {
    /// A step called `name` (letters, digits and dashes) that runs `script` in busybox's shell,
    /// two minutes at most.
    pub fn new(name: &str, script: &str) -> Self {
        Self {
            name: name.into(),
            script: script.into(),
            limit: Duration::from_secs(120),
        }
    }

    /// Has the step killed, which its status tells, when it is not done after `limit`.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }
}

/// What became of a [`Step`].
#[derive(Debug, Clone)]
pub struct StepResult {
    /// The step's name.
    pub name: String,
    /// The status that its shell ended with; [`StepResult::KILLED`] past its limit.
    pub status: i32,
    /// What it wrote to its standard output.
    pub stdout: String,
    /// What it wrote to its standard error.
    pub stderr: String,
}

impl StepResult {
    /// The status of a step that was killed: 128 and SIGKILL.
    pub const KILLED: i32 = 137;
}

/// A nested host before it is started: its size and its files.
#[derive(Debug)]
pub struct Host {
    files: Vec<(PathBuf, PathBuf)>,
    memory_mib: u32,
    cpus: u32,
    limit: Duration,
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Host {
    /// A host of two CPUs and 2 GiB that may take five minutes, with busybox's tools in it.
    pub fn new() -> Self {
        Self {
            files: Vec::new(),
            memory_mib: 2048,
            cpus: 2,
            limit: Duration::from_secs(300),
        }
    }

    /// Has QEMU killed, and the test failed, when the host is not done after `limit`.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Lays a copy of the file `source` at `target`, an absolute path in the host.
    #[must_use]
    pub fn file(mut self, source: impl AsRef<Path>, target: impl AsRef<Path>) -> Self {
        self.files
            .push((source.as_ref().into(), target.as_ref().into()));
        self
    }

    /// Lays the program `source` at `target`, and the dynamic libraries it needs at their own paths.
    #[must_use]
    pub fn program(mut self, source: impl AsRef<Path>, target: impl AsRef<Path>) -> Self {
        let libraries = libraries(source.as_ref());
        self.files
            .extend(libraries.into_iter().map(|path| (path.clone(), path)));
        self.file(source, target)
    }

    /// Boots the host, runs `steps` in their order and gives one result for each.
    ///
    /// # Panics
    /// With the end of the host's console when it did not get through all of them in time.
    pub fn run(self, steps: &[Step]) -> Vec<StepResult> {
        let work = TempDir::new().expect("a temporary folder");
        let kernel = guest::kernel(Kernel::DebianCloud);
        let initrd = work.path().join("initramfs");
        fs::write(&initrd, self.initramfs(&kernel, steps)).expect("write the initramfs");
        let console = work.path().join("console");
        let results = work.path().join("results");
        let started = Instant::now();
        let mut qemu = Command::new(QEMU)
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args(["-accel", "tcg,thread=multi", "-cpu", "max"])
            .args([
                "-smp",
                &self.cpus.to_string(),
                "-m",
                &self.memory_mib.to_string(),
            ])
            .arg("-kernel")
            .arg(&kernel.bzimage)
            .arg("-initrd")
            .arg(&initrd)
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1 mitigations=off nokaslr",
            ])
            .arg("-serial")
            .arg(file_backend(&console))
            .arg("-serial")
            .arg(file_backend(&results))
            .stdin(Stdio::null())
            .spawn()
            .expect("start QEMU");
        let ended = process::wait(&mut qemu, self.limit);
        process::kill(&mut qemu);

        let console = String::from_utf8_lossy(&fs::read(&console).unwrap_or_default()).into_owned();
        let results = parse_results(&fs::read_to_string(&results).unwrap_or_default());
        assert!(
            ended.is_some_and(|status| status.success()) && results.len() == steps.len(),
            "the nested host ended as {ended:?} (None: killed after {:?}) with {} of {} results\n\
             {results:#?}\n--- its console ---\n{console}",
            started.elapsed(),
            results.len(),
            steps.len(),
        );
        results
    }

    /// The host's root file system.
    fn initramfs(&self, kernel: &KernelFiles, steps: &[Step]) -> Vec<u8> {
        let mut root = Initramfs::default();
        let busybox = skip::program("busybox").expect("is_available() was asked");
        root.copy(&busybox, Path::new("/bin/busybox"));
        for module in MODULES {
            let source = guest::module(kernel, module);
            root.copy(&source, Path::new(&format!("/modules/{module}.ko")));
        }
        for (source, target) in &self.files {
            root.copy(source, target);
        }
        root.file(Path::new("/init"), INIT.as_bytes());
        for (index, step) in steps.iter().enumerate() {
            let folder = PathBuf::from(format!("/steps/{index:02}-{}", step.name));
            root.file(&folder.join("script"), step.script.as_bytes());
            root.file(
                &folder.join("limit"),
                step.limit.as_secs().to_string().as_bytes(),
            );
        }
        root.finish()
    }
}

/// QEMU's character device that writes to `path`, whose commas it would take for its own.
fn file_backend(path: &Path) -> String {
    format!("file:{}", path.display().to_string().replace(',', ",,"))
}

/// The shared libraries of `program` and its loader; none for a static one.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().expect("run ldd");
    // "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)" or "/lib64/ld-linux-x86-64.so.2 (0x...)"
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect()
}

/// Reads the lines that `init.sh` wrote: `RESULT NN-name status=N stdout=HEX stderr=HEX`.
fn parse_results(text: &str) -> Vec<StepResult> {
    text.lines()
        .filter_map(|line| parse_result(line.strip_prefix("RESULT ")?))
        .collect()
}

fn parse_result(line: &str) -> Option<StepResult> {
    let mut words = line.split_whitespace();
    let (_, name) = words.next()?.split_once('-')?;
    let status = words.next()?.strip_prefix("status=")?.parse().ok()?;
    let stdout = decode_hex(words.next()?.strip_prefix("stdout=")?)?;
    let stderr = decode_hex(words.next()?.strip_prefix("stderr=")?)?;
    Some(StepResult {
        name: name.into(),
        status,
        stdout,
        stderr,
    })
}

fn decode_hex(digits: &str) -> Option<String> {
    let bytes: Option<Vec<u8>> = (0..digits.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok())
        .collect();
    Some(String::from_utf8_lossy(&bytes?).into_owned())
}
