//! `cowshed run`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, ValueEnum, value_parser};

use super::{disk_option, value};
use crate::config::{self, Cmdline, Copy, Disk, Overlay, Overlays, Root};
use crate::layout::MAX_CPUS;

/// Boot a guest; with a COMMAND, run that in it and end with its status.
///
/// IMAGE is the guest's first disk and its root file system. It is a base: it is never written.
/// What the guest writes goes to an overlay that dies with the run, unless --overlay names one.
/// Without IMAGE and without --kernel the default guest boots; it is made on first use.
#[derive(Args, Clone, Debug)]
#[command(after_long_help = AFTER_HELP)]
pub(super) struct RunArgs {
    /// The disk to boot from: PATH[,key=value...], keys as for --disk
    #[arg(value_name = "IMAGE", value_parser = OsStringValueParser::new().try_map(disk_option::parse))]
    image: Option<Disk>,

    /// What to run in the guest, after '--'; without it: an interactive console
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,

    /// Boot this kernel: a bzImage or an ELF file (vmlinux)
    #[arg(long, value_name = "FILE", help_heading = "Guest")]
    kernel: Option<PathBuf>,

    /// Give the kernel this initrd
    #[arg(long, value_name = "FILE", help_heading = "Guest")]
    initrd: Option<PathBuf>,

    /// Append to the default kernel command line. With COMMAND, root= may name a device or be
    /// UUID=, LABEL=, PARTUUID= or PARTLABEL=
    #[arg(
        long,
        value_name = "STR",
        allow_hyphen_values = true,
        help_heading = "Guest"
    )]
    cmdline: Option<String>,

    /// Use this kernel command line and nothing else
    #[arg(
        long,
        value_name = "STR",
        allow_hyphen_values = true,
        conflicts_with = "cmdline",
        help_heading = "Guest"
    )]
    cmdline_replace: Option<String>,

    /// Number of vCPUs
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = value_parser!(u8).range(1..=i64::from(MAX_CPUS)),
        help_heading = "Guest"
    )]
    cpus: u8,

    /// Guest memory, with a suffix k, M, G or T [default: 1G, or 128M where KVM is not ordinary]
    #[arg(long, value_name = "SIZE", value_parser = value::memory, help_heading = "Guest")]
    memory: Option<u64>,

    /// Back guest memory by huge pages, 2 MiB each
    ///
    /// Large transfers from and to disks take less of the processor then, and the guest misses its
    /// page tables less often; the host gives it memory in larger pieces. The host decides whether
    /// there are any: /sys/kernel/mm/transparent_hugepage/enabled must not say 'never'
    #[arg(long, help_heading = "Guest")]
    huge_pages: bool,

    /// A further disk; may be repeated
    ///
    /// Keys after the path, separated by commas (a comma within a path is written ',,'):
    ///
    ///   format=qcow2|raw          qcow2 is recognised; raw must be named.
    ///                             Naming the format also allows what allow-outside allows
    ///   readonly                  the guest may not write
    ///   serial=TEXT               what the guest reads as serial number, 20 characters
    ///   size=SIZE                 give the guest a larger disk than the base
    ///   overlay=PATH|none         keep the writes in this overlay; none: write to the image
    ///   backing-format=qcow2|raw  the backing file's format, if the image does not record it
    ///   allow-outside             follow backing and data files outside the image's folder
    ///   secret-file=PATH          password of an encrypted image, all bytes of the file;
    ///                             repeated for the encrypted files beneath it. Without
    ///                             overlay=none the guest's writes are kept in clear
    ///   secret-fd=N               the same from a file descriptor
    ///   snapshot=NAME             the disk is this snapshot in the image, by ID or name
    ///   cache=writeback|none|unsafe
    ///                             writeback: writes wait in the host's memory until the guest
    ///                             flushes; none: whole pages go past it (direct I/O); unsafe:
    ///                             nothing is flushed, as in a throwaway overlay anyway
    ///                             [default: writeback]
    ///   io=io_uring|threads       who moves the bytes [default: io_uring where the host has it]
    ///   queues=N                  up to 16 [default: one a vCPU, at most 4]
    ///   cache-size=SIZE           memory for the image's tables [default: 16M]
    ///   bps=SIZE                  bytes a second that the guest can read and write
    ///   iops=N                    requests a second
    #[arg(
        long = "disk",
        value_name = "PATH[,key=value...]",
        verbatim_doc_comment,
        value_parser = OsStringValueParser::new().try_map(disk_option::parse),
        help_heading = "Disks"
    )]
    disks: Vec<Disk>,

    /// Keep the root's writes in this overlay: made if absent, else continued; 'none' writes to IMAGE
    #[arg(
        long,
        value_name = "PATH",
        value_parser = OsStringValueParser::new().map(disk_option::overlay),
        help_heading = "Disks"
    )]
    overlay: Option<Overlay>,

    /// Let no overlay file grow beyond this; the guest sees write errors then
    #[arg(long, value_name = "SIZE", value_parser = value::size, help_heading = "Disks")]
    overlay_size: Option<u64>,

    /// The folder whose file system holds throwaway overlays [default: $TMPDIR, else /var/tmp]
    #[arg(long, value_name = "FOLDER", help_heading = "Disks")]
    overlay_dir: Option<PathBuf>,

    /// If the run fails, keep the first throwaway overlay under this path
    #[arg(long, value_name = "PATH", help_heading = "Disks")]
    keep_overlay: Option<PathBuf>,

    /// Set an environment variable for COMMAND; may be repeated
    #[arg(
        long,
        value_name = "K=V",
        requires = "command",
        value_parser = OsStringValueParser::new().try_map(value::env),
        help_heading = "Command"
    )]
    env: Vec<(OsString, OsString)>,

    /// Run COMMAND in this folder of the guest
    #[arg(
        long,
        value_name = "PATH",
        requires = "command",
        value_parser = OsStringValueParser::new().try_map(value::working_directory),
        help_heading = "Command"
    )]
    cwd: Option<PathBuf>,

    /// Copy a file or folder of the host into the guest first; may be repeated. DST is a folder
    /// that is there, or the copy's name in one
    #[arg(
        long,
        value_name = "SRC:DST",
        requires = "command",
        value_parser = OsStringValueParser::new().try_map(value::copy_in),
        help_heading = "Command"
    )]
    copy_in: Vec<Copy>,

    /// Copy a file or folder of the guest to the host after COMMAND; may be repeated. DST is a
    /// folder that is there, or the copy's name in one
    #[arg(
        long,
        value_name = "SRC:DST",
        requires = "command",
        value_parser = OsStringValueParser::new().try_map(value::copy_out),
        help_heading = "Command"
    )]
    copy_out: Vec<Copy>,

    /// End the run after this long, with status 124: 90, 90s, 2m, 1h
    #[arg(long, value_name = "TIME", value_parser = value::duration, help_heading = "Limits")]
    timeout: Option<Duration>,

    /// End the run with status 121 if the guest is not up, to copy into it and run COMMAND, after
    /// this long [default: 120s, more where KVM emulates]
    #[arg(
        long,
        value_name = "TIME",
        requires = "command",
        value_parser = value::duration,
        help_heading = "Limits"
    )]
    boot_timeout: Option<Duration>,

    /// Keep the process that the guest runs in from files, network and all system calls but its own:
    /// 'on' as far as this host can, 'require' all of it
    #[arg(
        long,
        value_name = "WHETHER",
        default_value = "on",
        help_heading = "Sandbox"
    )]
    sandbox: SandboxMode,

    /// As root: run the guest as this user (names or numbers)
    #[arg(long, value_name = "USER[:GROUP]", help_heading = "Sandbox")]
    user: Option<String>,

    /// As root: give the process that the guest runs in this folder for its root; an empty one is enough
    #[arg(long, value_name = "FOLDER", help_heading = "Sandbox")]
    chroot: Option<PathBuf>,

    /// Write all that the guest's console says to this file
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    console_log: Option<PathBuf>,

    /// Write a JSON report: why the run ended, status, times, bytes, overlay size
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    report: Option<PathBuf>,
}

/// Words for [`config::SandboxMode`].
#[derive(Clone, Copy, Debug, ValueEnum)]
enum SandboxMode {
    Off,
    On,
    Require,
}

/// Options that do not fit together, where clap cannot say it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum UsageError {
    #[error("'--' is not followed by a command")]
    EmptyCommand,
    #[error("--overlay is about IMAGE, and there is none: use --disk PATH,overlay=PATH")]
    OverlayWithoutRoot,
    #[error("the default guest is shared by all runs: it cannot be written with --overlay none")]
    OverlayNoneOfDefault,
    #[error("--overlay and IMAGE's own overlay= exclude each other")]
    OverlayTwice,
    #[error("--overlay and IMAGE's readonly exclude each other")]
    OverlayReadOnly,
    #[error("--overlay none and IMAGE's size= exclude each other")]
    OverlayNoneWithSize,
}

impl RunArgs {
    /// The run that these arguments describe. `dashes`: they end with '--'.
    ///
    /// # Errors
    /// They contradict each other.
    pub(super) fn into_config(self, dashes: bool) -> Result<config::Run, UsageError> {
        if dashes && self.command.is_empty() {
            return Err(UsageError::EmptyCommand);
        }
        Ok(config::Run {
            root: root(self.image, self.overlay, self.kernel.is_some())?,
            kernel: self.kernel,
            initrd: self.initrd,
            cmdline: match self.cmdline_replace {
                Some(all) => Cmdline::Replace(all),
                None => Cmdline::Append(self.cmdline.unwrap_or_default()),
            },
            cpus: self.cpus,
            memory: self.memory,
            huge_pages: self.huge_pages,
            timeout: self.timeout,
            boot_timeout: self.boot_timeout,
            disks: self.disks,
            overlays: Overlays {
                folder: self.overlay_dir,
                max_size: self.overlay_size,
                keep: self.keep_overlay,
            },
            command: (!self.command.is_empty()).then_some(self.command),
            env: self.env,
            cwd: self.cwd,
            copy_in: self.copy_in,
            copy_out: self.copy_out,
            console_log: self.console_log,
            report: self.report,
            sandbox: config::Sandbox {
                mode: match self.sandbox {
                    SandboxMode::Off => config::SandboxMode::Off,
                    SandboxMode::On => config::SandboxMode::On,
                    SandboxMode::Require => config::SandboxMode::Require,
                },
                user: self.user,
                chroot: self.chroot,
            },
        })
    }
}

fn root(
    image: Option<Disk>,
    overlay: Option<Overlay>,
    has_kernel: bool,
) -> Result<Root, UsageError> {
    match (image, overlay) {
        (Some(disk), None) => Ok(Root::Image(disk)),
        (Some(disk), Some(_)) if disk.overlay != Overlay::Throwaway => {
            Err(UsageError::OverlayTwice)
        }
        (Some(disk), Some(Overlay::At(_))) if disk.read_only => Err(UsageError::OverlayReadOnly),
        (Some(disk), Some(Overlay::Direct)) if disk.size.is_some() => {
            Err(UsageError::OverlayNoneWithSize)
        }
        (Some(disk), Some(overlay)) => Ok(Root::Image(Disk { overlay, ..disk })),
        (None, Some(_)) if has_kernel => Err(UsageError::OverlayWithoutRoot),
        (None, Some(Overlay::Direct)) => Err(UsageError::OverlayNoneOfDefault),
        (None, None) if has_kernel => Ok(Root::None),
        (None, overlay) => Ok(Root::Default(overlay.unwrap_or(Overlay::Throwaway))),
    }
}

const AFTER_HELP: &str = "\
Examples:
  cowshed run                              the default guest, on this terminal
  cowshed run -- uname -a                  a command in it
  cowshed run debian.qcow2                 your image; it is not changed
  cowshed run --overlay work.qcow2 debian.qcow2
                                           keep what the guest writes, go on another day
  tar c . | cowshed run -- tar t           standard input, output and error pass through
  cowshed run --timeout 60 --copy-in .:/src --cwd /src base.qcow2 -- make test
                                           in CI: the status is make's
  cowshed run disk.img,format=raw          a raw image: its format must be named
  cowshed run --kernel vmlinux --disk data.qcow2,serial=DATA,size=20G

Leaving an interactive console: Ctrl-A x ends the guest, Ctrl-A a sends a Ctrl-A.
SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGQUIT are passed on to COMMAND. The third SIGINT or
SIGTERM within three seconds ends the run itself, whatever the guest does, with 128+n.

Exit status:
  COMMAND's own, or 128+n if signal n ended it; without COMMAND 0 when the guest
  powers off or resets. And cowshed's own:
  120  wrong usage
  121  the boot failed
  122  the guest ended before COMMAND's status was known
  123  the guest's kernel panicked
  124  --timeout ran out
  125  an error on the host's side, or the guest's process was killed
  --report FILE tells these from a command that ends with the same number.

Throwaway overlays have no name and vanish with the process. They take their space in
--overlay-dir, else $TMPDIR, else /var/tmp; --overlay-size bounds it.";
