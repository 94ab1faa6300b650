//! Disks: from what the command line says to what the block device asks.
//!
//! This is the one place that opens and locks the files of images, for a run and for
//! `cowshed img`, and the one that lets `cowshed-qcow` and `cowshed-devices` meet. In a run a base is
//! opened read-only; only with [`Overlay::Direct`] is an image opened for writing.

mod adapter;
mod base;
pub(crate) mod files;
mod holders;
pub(crate) mod lock;
pub(crate) mod new_file;
mod overlay;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cowshed_devices::virtio::block::{Engine, Limits, Options, disk};

use crate::config::{Disk, Io, Overlay, Root, Run};
use adapter::ImageDisk;
use lock::Use;
use overlay::Wanted;

/// Most queues that a disk gets unasked: beyond that they cost memory, and gain nothing.
const DEFAULT_QUEUES: u16 = 4;

/// Longest polling before a sleep: about as long as it takes to fall asleep and be woken.
const POLL: Duration = Duration::from_micros(50);

/// Why a disk cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be opened or locked.
    #[error("cannot open the image {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its format was not named and it has not qcow2's magic number.
    #[error(
        "{} is not a qcow2 image; if it is the disk's bytes as they are, say so: {},format=raw",
        .0.display(), .0.display()
    )]
    Unnamed(PathBuf),
    /// The chain leads out of its folder.
    #[error("{0}; if you trust the image, add ,allow-outside to it")]
    Outside(cowshed_qcow::Error),
    /// An encrypted image without its password, or with another.
    #[error("{0} (a password comes with ,secret-file=PATH)")]
    Locked(cowshed_qcow::Error),
    /// The chain cannot be used.
    #[error(transparent)]
    Image(cowshed_qcow::Error),
    /// The disk would be smaller than its base.
    #[error("size={size} would cut off the end of {}, which has {of_base} bytes", path.display())]
    Smaller {
        /// The base.
        path: PathBuf,
        /// The size that was asked for, in bytes.
        size: u64,
        /// The base's size, in bytes.
        of_base: u64,
    },
    /// An existing overlay has not the size that was asked for.
    #[error(
        "the overlay {} has {of_overlay} bytes, not size={size}: leave size= out, \
         or resize it first with cowshed img resize",
        path.display()
    )]
    OtherSize {
        /// The overlay.
        path: PathBuf,
        /// The size that was asked for, in bytes.
        size: u64,
        /// The overlay's size, in bytes.
        of_overlay: u64,
    },
    /// An existing overlay records no backing file.
    #[error(
        "{} is there already and is no overlay: it has no backing file. Choose another path, \
         or run it as an image of its own",
        .0.display()
    )]
    NoBacking(PathBuf),
    /// An existing overlay is another base's.
    #[error(
        "the overlay {} is of {recorded}, not of {} ({reason}): run it with its own base, choose \
         another overlay, or, if the base was only moved, tell it so with \
         cowshed img rebase -u -F FORMAT -b BASE OVERLAY",
        overlay.display(), base.display()
    )]
    OtherBase {
        /// The overlay.
        overlay: PathBuf,
        /// The backing file that it records.
        recorded: String,
        /// The base that it was to be used with.
        base: PathBuf,
        /// How they differ.
        reason: String,
    },
    /// An overlay cannot be made.
    #[error("cannot create the overlay {}", path.display())]
    Create {
        /// The overlay.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A throwaway overlay cannot be made.
    #[error("cannot make an overlay in {} (choose a folder with --overlay-dir)", folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A base whose path an overlay cannot record.
    #[error("the path of {} is not UTF-8: an overlay cannot record it", .0.display())]
    Name(PathBuf),
    /// `--keep-overlay` names something that is there.
    #[error("--keep-overlay {} is there already: remove it or choose another path", .0.display())]
    KeepExists(PathBuf),
    /// A password cannot be read.
    #[error("cannot read the password in {}", path.display())]
    Secret {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// `--keep-overlay` with a snapshot as the base.
    #[error(
        "--keep-overlay cannot keep the overlay of a snapshot: no file can name one as its base \
         (make it an image of its own with cowshed img convert -l)"
    )]
    KeepSnapshot,
    /// `--keep-overlay` without a throwaway overlay.
    #[error("--keep-overlay has nothing to keep: no disk has a throwaway overlay")]
    NothingToKeep,
    /// The throwaway overlay could not be kept.
    #[error("cannot keep the overlay as {}", path.display())]
    Keep {
        /// The path that it was to have.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl From<cowshed_qcow::Error> for Error {
    fn from(error: cowshed_qcow::Error) -> Self {
        match error {
            cowshed_qcow::Error::Outside { .. } => Self::Outside(error),
            cowshed_qcow::Error::Locked { .. } => Self::Locked(error),
            error => Self::Image(error),
        }
    }
}

impl Error {
    fn open(path: &Path, source: io::Error) -> Self {
        Self::Open {
            path: path.to_path_buf(),
            source,
        }
    }
}

/// A disk for a block device.
#[derive(Clone)]
pub struct Attached {
    /// The disk.
    pub disk: Arc<dyn disk::Disk>,
    /// How it is to be offered, but for its name.
    pub options: Options,
}

/// The disks of a run.
#[derive(Debug, Default)]
pub struct Disks {
    opened: Vec<Opened>,
    keep: Option<PathBuf>,
}

#[derive(Debug)]
struct Opened {
    disk: Arc<ImageDisk>,
    overlay: Kind,
    options: Options,
}

#[derive(Debug)]
enum Kind {
    /// The image itself.
    None,
    /// An overlay with a name.
    Named,
    /// An overlay without one: its file.
    Throwaway(File),
}

/// Opens all disks of a run, the root first. `default_root` is the default guest's root image.
///
/// # Errors
/// An image cannot be opened, is in use, or is not what was said of it.
pub fn open(run: &Run, default_root: Option<&Path>) -> Result<Disks, Error> {
    let root = match (&run.root, default_root) {
        (Root::Image(disk), _) => Some(disk.clone()),
        (Root::Default(overlay), Some(path)) => Some(Disk {
            overlay: overlay.clone(),
            ..Disk::new(path)
        }),
        (Root::Default(_), None) | (Root::None, _) => None,
    };
    let mut keep = run.overlays.keep.as_deref();
    if let Some(path) = keep.filter(|path| path.symlink_metadata().is_ok()) {
        return Err(Error::KeepExists(path.to_path_buf()));
    }
    // With one processor, who polls keeps waiting whom it waits for. (The standard library would ask
    // for quotas too, which a poll does not wait for, and read a dozen files.)
    let poll = match rustix::thread::sched_getaffinity(None) {
        Ok(processors) if processors.count() == 1 => Duration::ZERO,
        _ => POLL,
    };
    let mut opened = Vec::new();
    for disk in root.iter().chain(&run.disks) {
        let next = open_one(disk, run, keep, poll)?;
        if matches!(next.overlay, Kind::Throwaway(_)) {
            // The first one has it.
            keep = None;
        }
        opened.push(next);
    }
    if keep.is_some() {
        return Err(Error::NothingToKeep);
    }
    Ok(Disks {
        opened,
        keep: run.overlays.keep.clone(),
    })
}

fn open_one(disk: &Disk, run: &Run, keep: Option<&Path>, poll: Duration) -> Result<Opened, Error> {
    let overlays = &run.overlays;
    let wanted = Wanted {
        size: disk.size,
        max_size: overlays.max_size,
        cache: disk.cache,
        cache_size: disk.cache_size,
    };
    let (image, overlay) = match &disk.overlay {
        _ if disk.read_only => (base::open(disk, Use::Read)?.image, Kind::None),
        Overlay::Direct => (base::open(disk, Use::Write)?.image, Kind::None),
        Overlay::At(path) => (
            overlay::at(base::open(disk, Use::Read)?, path, &wanted)?,
            Kind::Named,
        ),
        Overlay::Throwaway if keep.is_some() && disk.snapshot.is_some() => {
            return Err(Error::KeepSnapshot);
        }
        Overlay::Throwaway => {
            let folder = overlays.folder.clone().unwrap_or_else(default_folder);
            let base = base::open(disk, Use::Read)?;
            let (image, file) = overlay::throwaway(base, &folder, keep, &wanted)?;
            (image, Kind::Throwaway(file))
        }
    };
    Ok(Opened {
        disk: Arc::new(ImageDisk::new(image, disk)),
        options: Options {
            // With `cache=unsafe`, and for an overlay that may be kept, a flush still writes tables:
            // they outlive this process, if not the host.
            never_sync: keep.is_none() && matches!(overlay, Kind::Throwaway(_)),
            queues: disk
                .queues
                .unwrap_or(u16::from(run.cpus).min(DEFAULT_QUEUES)),
            engine: match disk.io {
                Io::IoUring => Engine::IoUring,
                Io::Threads => Engine::Threads,
            },
            limits: Limits {
                bytes: disk.bytes_per_second,
                requests: disk.requests_per_second,
            },
            poll,
            ..Options::default()
        },
        overlay,
    })
}

/// The folder of throwaway overlays: `$TMPDIR`, else `/var/tmp`, which unlike `/tmp` is on a
/// disk everywhere.
#[must_use]
pub fn default_folder() -> PathBuf {
    match std::env::var_os("TMPDIR") {
        Some(folder) if !folder.is_empty() => folder.into(),
        _ => "/var/tmp".into(),
    }
}

impl Disks {
    /// The disks in the order in which the guest sees them.
    pub fn devices(&self) -> impl Iterator<Item = Attached> {
        self.opened.iter().map(|opened| Attached {
            disk: opened.disk.clone(),
            options: opened.options.clone(),
        })
    }

    /// The overlay that may get a name in the end, if one was asked for.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn keeper(&self) -> Result<Option<Keeper>, Error> {
        let Some(path) = self.keep.clone() else {
            return Ok(None);
        };
        let first = self.opened.iter().find_map(|opened| match &opened.overlay {
            Kind::Throwaway(file) => Some(file),
            Kind::None | Kind::Named => None,
        });
        match first.map(File::try_clone).transpose() {
            Ok(file) => Ok(file.map(|file| Keeper { file, path })),
            Err(source) => Err(Error::Keep { path, source }),
        }
    }

    /// Makes what stays durable, after the guest has ended; `keep`: also makes whole what
    /// [`Self::keeper`] keeps. Returns the size of all overlay files in bytes.
    ///
    /// # Errors
    /// Something cannot be written.
    pub fn close(self, keep: bool) -> Result<Option<u64>, Error> {
        let mut size = None;
        for opened in self.opened {
            let image = opened.disk.image();
            match &opened.overlay {
                Kind::None | Kind::Named if image.read_only() => {}
                // What its bitmaps missed would be missing from a backup.
                Kind::None | Kind::Named => image.store_bitmaps()?,
                Kind::Throwaway(_) if keep => image.flush()?,
                Kind::Throwaway(_) => {}
            }
            if !matches!(opened.overlay, Kind::None) {
                size = Some(size.unwrap_or(0_u64).saturating_add(image.file_len()?));
            }
        }
        Ok(size)
    }
}

/// A second handle on the first throwaway overlay, and the name that it is to get if the run fails.
#[derive(Debug)]
pub struct Keeper {
    file: File,
    path: PathBuf,
}

impl Keeper {
    /// Gives the overlay its name, after [`Disks::close`].
    ///
    /// # Errors
    /// It cannot have it.
    pub fn keep(self) -> Result<(), Error> {
        let Self { file, path } = self;
        new_file::keep(&file, &path).map_err(|source| Error::Keep { path, source })
    }
}

#[cfg(test)]
mod tests;
