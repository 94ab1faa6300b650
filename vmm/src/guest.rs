//! What boots: the kernel, the initrd and the command line that a configuration comes to.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use cowshed_guest_images::{Builder, EMBEDDED_INIT, Kernel, Progress, initramfs};

use crate::boot::{Source, UnpackedKernels};
use crate::config::{self, Cmdline, Root};
use crate::fallback;
use crate::host::Virtualization;

/// What every kernel is told: the console, to end the machine by the keyboard controller's reset
/// (which is there without ACPI, too), and to do so at once when it panics.
const ARGUMENTS: &str = "console=ttyS0 reboot=k panic=-1 quiet";

/// Why there is nothing to boot.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot open {}", .0.display())]
    Open(PathBuf, #[source] io::Error),
    #[error(transparent)]
    Build(#[from] cowshed_guest_images::Error),
}

/// What boots.
pub(crate) struct Guest {
    kernel: File,
    initrd: Option<File>,
    init: Option<Vec<u8>>,
    /// The kernel command line.
    pub(crate) cmdline: String,
}

/// The default guest's root image, if that is what boots.
pub(crate) fn root_image(config: &config::Run) -> Result<Option<PathBuf>, Error> {
    Ok(match config.root {
        Root::Default(_) => Some(builder()?.root_image()?),
        Root::Image(_) | Root::None => None,
    })
}

/// Where unpacked kernels are kept; nowhere without a cache folder.
pub(crate) fn unpacked_kernels() -> Option<UnpackedKernels> {
    let folder = builder().ok()?.folder().join("unpacked");
    Some(UnpackedKernels::new(folder))
}

/// Only asked for what is needed: a run with everything given needs no cache folder.
fn builder() -> Result<Builder, cowshed_guest_images::Error> {
    Builder::new(Progress::to_stderr())
}

/// Opens what the configuration names and makes what it leaves to us.
pub(crate) fn prepare(config: &config::Run, host: Virtualization) -> Result<Guest, Error> {
    let (kernel, own_initrd) = match &config.kernel {
        Some(path) => (path.clone(), None),
        None => {
            let files = builder()?.kernel(match host {
                Virtualization::Hardware => Kernel::DebianCloud,
                Virtualization::Emulated => Kernel::Small,
            })?;
            (files.kernel, files.initrd)
        }
    };
    let mut cmdline = cmdline(config, host);
    // A kernel whose drivers are modules cannot mount its root by itself: our init does that and
    // makes way for the root's own.
    let hands_over = own_initrd.is_some() && config.initrd.is_none() && config.command.is_none();
    if hands_over {
        cmdline.push_str(" cowshed.handover");
    }
    let wants_init = config.command.is_some() || hands_over;
    let init = wants_init.then(init_archive).transpose()?;
    let initrd = config.initrd.clone().or(own_initrd);
    Ok(Guest {
        kernel: open(&kernel)?,
        initrd: initrd.as_deref().map(open).transpose()?,
        init,
        cmdline,
    })
}

/// The archive with the guest's PID 1.
fn init_archive() -> Result<Vec<u8>, Error> {
    if let Some(program) = EMBEDDED_INIT {
        return Ok(initramfs(program));
    }
    let path = builder()?.init()?;
    match std::fs::read(&path) {
        Ok(program) => Ok(initramfs(&program)),
        Err(source) => Err(Error::Open(path, source)),
    }
}

impl Guest {
    pub(crate) fn kernel(&self) -> Source<'_> {
        Source::File(&self.kernel)
    }

    /// Our archive comes last: of two files of one name the kernel keeps the later.
    pub(crate) fn initrd(&self) -> Vec<Source<'_>> {
        let file = self.initrd.as_ref().map(Source::File);
        file.into_iter()
            .chain(self.init.as_deref().map(Source::Bytes))
            .collect()
    }
}

fn open(path: &Path) -> Result<File, Error> {
    File::open(path).map_err(|source| Error::Open(path.to_path_buf(), source))
}

fn cmdline(config: &config::Run, host: Virtualization) -> String {
    let emulated = host == Virtualization::Emulated;
    match &config.cmdline {
        Cmdline::Replace(whole) => {
            for argument in fallback::REQUIRED_ARGUMENTS {
                if emulated && !whole.contains(argument) {
                    tracing::warn!(
                        "this host runs the guest's kernel in an emulator: without {argument} on \
                         its command line it may not boot"
                    );
                }
            }
            whole.clone()
        }
        Cmdline::Append(more) => {
            let mut line = ARGUMENTS.to_owned();
            if emulated {
                line = format!("{line} {}", fallback::KERNEL_ARGUMENTS);
            }
            match &config.root {
                Root::Image(disk) if disk.read_only => line.push_str(" root=/dev/vda ro"),
                Root::Image(_) | Root::Default(_) => line.push_str(" root=/dev/vda rw"),
                Root::None => {}
            }
            if !more.is_empty() {
                line = format!("{line} {more}");
            }
            line
        }
    }
}
