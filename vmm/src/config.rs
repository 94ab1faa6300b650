//! What one run is made of: plain data, no I/O. The command line fills it in.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A virtual machine to run once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The kernel: bzImage or ELF. `None`: the default guest's.
    pub kernel: Option<PathBuf>,
    /// The user's initrd.
    pub initrd: Option<PathBuf>,
    /// The kernel command line.
    pub cmdline: Cmdline,
    /// Number of vCPUs, 1 to [`crate::layout::MAX_CPUS`].
    pub cpus: u8,
    /// Guest memory in bytes, a multiple of 1 MiB. `None`: what suits the host.
    pub memory: Option<u64>,
    /// Have the host back guest memory by huge pages.
    pub huge_pages: bool,
    /// The run ends after this long.
    pub timeout: Option<Duration>,
    /// The guest's PID 1 must have said hello after this long, which it does only for a command.
    /// `None`: what suits the host.
    pub boot_timeout: Option<Duration>,
    /// The first disk, which carries the root file system.
    pub root: Root,
    /// The disks after the root, in the order in which the guest sees them.
    pub disks: Vec<Disk>,
    /// How throwaway overlays are kept.
    pub overlays: Overlays,
    /// The command to run in the guest and its arguments; never empty. `None`: the guest's own
    /// init, with an interactive console.
    pub command: Option<Vec<OsString>>,
    /// Environment variables for the command.
    pub env: Vec<(OsString, OsString)>,
    /// The command's working directory in the guest.
    pub cwd: Option<PathBuf>,
    /// Copied into the guest before the command runs: from host paths to guest paths.
    pub copy_in: Vec<Copy>,
    /// Copied out of the guest after the command ran: from guest paths to host paths.
    pub copy_out: Vec<Copy>,
    /// A file that receives all that the guest's console says.
    pub console_log: Option<PathBuf>,
    /// Where the report is written.
    pub report: Option<PathBuf>,
    /// How the guest is kept from the host.
    pub sandbox: Sandbox,
}

/// Which disk carries the root file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Root {
    /// The default guest's root image, its writes kept as said.
    Default(Overlay),
    /// The IMAGE of the command line.
    Image(Disk),
    /// No IMAGE, but a kernel: [`Run::disks`] are all the disks there are, perhaps none.
    None,
}

/// The kernel command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cmdline {
    /// This, which may be empty, after a sensible default.
    Append(String),
    /// This and nothing else.
    Replace(String),
}

/// A disk of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The base image.
    pub path: PathBuf,
    /// The base's format. `None`: not named, so it must have qcow2's magic.
    pub format: Option<Format>,
    /// The guest may not write.
    pub read_only: bool,
    /// What the guest reads as the serial number: at most 20 bytes of printable ASCII.
    pub serial: Option<String>,
    /// The size that the guest sees, in bytes, a multiple of 512. `None`: the image's own.
    pub size: Option<u64>,
    /// Where the guest's writes go.
    pub overlay: Overlay,
    /// The format of the backing file that the base names, where the base does not say it.
    pub backing_format: Option<Format>,
    /// Backing and data files may lie outside the folder of the image that names them.
    pub allow_outside: bool,
    /// Passwords of the encrypted files of its chain, from the top down.
    pub secrets: Vec<SecretSource>,
    /// The internal snapshot, an ID or a name, that is the disk instead of what is there now.
    pub snapshot: Option<String>,
    /// Whether writes wait in the host's page cache, and for how long.
    pub cache: Cache,
    /// Who moves the disk's bytes.
    pub io: Io,
    /// Queues, 1 to [`MAX_QUEUES`](cowshed_devices::virtio::block::MAX_QUEUES). `None`: one a vCPU,
    /// at most four.
    pub queues: Option<u16>,
    /// Bytes of qcow2 tables to keep in memory. `None`: 16 MiB, more than most disks have.
    pub cache_size: Option<usize>,
    /// Bytes a second that the guest can read and write. `None`: no limit.
    pub bytes_per_second: Option<u64>,
    /// Requests a second. `None`: no limit.
    pub requests_per_second: Option<u64>,
}

/// What becomes of a disk's writes in the host's page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// They wait there until the guest flushes.
    #[default]
    Writeback,
    /// The same, but whole pages go past it to the disk (direct I/O); not those of a throwaway
    /// overlay, which need never get there.
    None,
    /// They wait there for as long as the host likes, whatever the guest says: a crash of the host
    /// loses them. A throwaway overlay is always so.
    Unsafe,
}

/// Who moves a disk's bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Io {
    /// io_uring, or threads where the host refuses it.
    #[default]
    IoUring,
    /// Threads with blocking calls.
    Threads,
}

/// Where a password is read from: all bytes up to the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// A file.
    File(PathBuf),
    /// A file descriptor that this process was given.
    Descriptor(u32),
}

impl Disk {
    /// Whether the guest's writes go to an overlay that dies with the run.
    #[must_use]
    pub fn has_throwaway(&self) -> bool {
        self.overlay == Overlay::Throwaway && !self.read_only
    }

    /// The image at `path` with nothing else said of it.
    #[must_use]
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self {
            path: path.as_ref().to_path_buf(),
            format: None,
            read_only: false,
            serial: None,
            size: None,
            overlay: Overlay::Throwaway,
            backing_format: None,
            allow_outside: false,
            secrets: Vec::new(),
            snapshot: None,
            cache: Cache::default(),
            io: Io::default(),
            queues: None,
            cache_size: None,
            bytes_per_second: None,
            requests_per_second: None,
        }
    }
}

/// A disk image's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// qcow2, versions 2 and 3.
    Qcow2,
    /// The file is the disk.
    Raw,
}

/// Where a guest's writes go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Overlay {
    /// Into a file without a name, which dies with the run.
    Throwaway,
    /// Into the overlay at this path, which is made if it is not there.
    At(PathBuf),
    /// Into the image itself.
    Direct,
}

/// What holds for every throwaway overlay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overlays {
    /// The folder that they take their space from. `None`: `$TMPDIR`, else `/var/tmp`.
    pub folder: Option<PathBuf>,
    /// No overlay file grows beyond this many bytes; applies to those with a path as well.
    pub max_size: Option<u64>,
    /// The first one is kept under this path when the run fails.
    pub keep: Option<PathBuf>,
}

/// How the guest is kept from the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sandbox {
    /// Whether at all.
    pub mode: SandboxMode,
    /// The user, and after a colon the group, that the machine's process becomes.
    pub user: Option<String>,
    /// The folder that becomes the machine's process's root.
    pub chroot: Option<PathBuf>,
}

/// Whether there is a sandbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SandboxMode {
    /// None.
    Off,
    /// As far as the host's kernel has one.
    #[default]
    On,
    /// No run without all of it.
    Require,
}

/// A file or folder to copy between host and guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Copied from.
    pub from: PathBuf,
    /// Copied to.
    pub to: PathBuf,
}

impl Run {
    /// A machine with the default guest and nothing asked of it.
    #[must_use]
    pub fn new() -> Self {
        Self {
            kernel: None,
            initrd: None,
            cmdline: Cmdline::Append(String::new()),
            cpus: 1,
            memory: None,
            huge_pages: false,
            timeout: None,
            boot_timeout: None,
            root: Root::Default(Overlay::Throwaway),
            disks: Vec::new(),
            overlays: Overlays::default(),
            command: None,
            env: Vec::new(),
            cwd: None,
            copy_in: Vec::new(),
            copy_out: Vec::new(),
            console_log: None,
            report: None,
            sandbox: Sandbox::default(),
        }
    }
}

impl Default for Run {
    fn default() -> Self {
        Self::new()
    }
}
