//! Finding the root file system and moving onto it.

use alloc::format;
use alloc::string::{String, ToString};
use core::cmp::Reverse;

use cowshed_guest_protocol::Failure;
use rustix::fd::OwnedFd;
use rustix::fs::{Access, Dir, FileType, Mode, OFlags};
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::time::ClockId;

use crate::block_device::BlockDevice;
use crate::kernel_args::KernelArgs;
use crate::modules::Modules;
use crate::volume::Name;
use crate::{Stop, ports};

const DEFAULT: &str = "vda";
const NEW_ROOT: &str = "/newroot";

/// How long a device that the command line names may take to appear, in seconds.
const PATIENCE: i64 = 10;

/// Mounts the root and moves onto it; without a disk, stays in the initramfs.
pub(crate) fn enter(modules: &Modules, args: &KernelArgs) -> Result<(), Stop> {
    modules.load(&["virtio_blk", "virtio_rng"])?;
    let disk = match &args.root {
        Some(root) => named(root)?,
        None => match Wanted::Device(DEFAULT).find() {
            Some(disk) => disk,
            None => return Ok(()),
        },
    };
    let (device, kind) = choose(disk, args)?;
    let device = device.path();
    modules.load(&[&kind])?;
    let doing = format!("mount the root file system ({device}, {kind})");
    let _ = rustix::fs::mkdir(NEW_ROOT, Mode::RWXU);
    let flags = if args.read_only {
        MountFlags::RDONLY
    } else {
        MountFlags::empty()
    };
    let options = alloc::ffi::CString::new(args.root_flags.as_str()).unwrap_or_default();
    mount(&*device, NEW_ROOT, &*kind, flags, &*options).map_err(Stop::boot(&doing))?;
    if exists("/lib/modules") {
        free_initramfs();
    }
    switch().map_err(Stop::boot("move onto the root file system"))
}

/// Removes what takes memory in an initramfs with modules: its files, not what is mounted in it.
fn free_initramfs() {
    let open = |path: &str| {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty())
    };
    let device = |folder: &OwnedFd| rustix::fs::fstat(folder).map(|stat| stat.st_dev);
    let Ok(here) = open("/").and_then(|root| device(&root)) else {
        return;
    };
    let mut folders = alloc::vec![String::new()];
    while let Some(path) = folders.pop() {
        let Ok(folder) = open(&format!("{path}/")) else {
            continue;
        };
        if device(&folder) != Ok(here) {
            continue;
        }
        for entry in Dir::new(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy();
            match entry.file_type() {
                FileType::Directory if !matches!(&*name, "." | "..") => {
                    folders.push(format!("{path}/{name}"));
                }
                FileType::RegularFile => drop(rustix::fs::unlink(format!("{path}/{name}"))),
                _ => {}
            }
        }
    }
}

/// Makes what is mounted at [`NEW_ROOT`] the root, and takes the pseudo file systems along.
fn switch() -> Result<(), rustix::io::Errno> {
    for name in ["dev", "proc", "sys"] {
        let target = format!("{NEW_ROOT}/{name}");
        let _ = rustix::fs::mkdir(&*target, Mode::from_raw_mode(0o755));
        mount_move(format!("/{name}"), target)?;
    }
    rustix::process::chdir(NEW_ROOT)?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")
}

/// What `root=` names.
enum Wanted<'a> {
    /// A file in `/dev`.
    Device(&'a str),
    FileSystem(Name),
    Partition(Name),
}

impl<'a> Wanted<'a> {
    fn of(root: &'a str) -> Option<Self> {
        if let Some(name) = root.strip_prefix("/dev/") {
            return Some(Self::Device(name));
        }
        let (kind, name) = root.split_once('=').filter(|(_, name)| !name.is_empty())?;
        let name = name.to_string();
        match kind {
            "UUID" => Some(Self::FileSystem(Name::Uuid(name))),
            "LABEL" => Some(Self::FileSystem(Name::Label(name))),
            "PARTUUID" => Some(Self::Partition(Name::Uuid(name))),
            "PARTLABEL" => Some(Self::Partition(Name::Label(name))),
            _ => None,
        }
    }

    fn find(&self) -> Option<BlockDevice> {
        match self {
            Self::Device(name) => exists(&format!("/dev/{name}")).then(|| BlockDevice::new(name)),
            Self::FileSystem(name) => BlockDevice::all().into_iter().find(|device| {
                let found = device.file_system();
                found.is_some_and(|found| name.is_in(&found.names))
            }),
            Self::Partition(name) => BlockDevice::all()
                .iter()
                .flat_map(BlockDevice::named_partitions)
                .find_map(|(partition, names)| name.is_in(&names).then_some(partition)),
        }
    }
}

/// The device that `root=` names, once it is there.
fn named(root: &str) -> Result<BlockDevice, Stop> {
    let stop = |message| {
        Err(Stop {
            failure: Failure::Boot,
            message,
        })
    };
    let Some(wanted) = Wanted::of(root) else {
        return stop(format!(
            "root={root} is not understood: name a device, such as /dev/vda1, or UUID=, LABEL=, \
             PARTUUID= or PARTLABEL="
        ));
    };
    let seconds = || rustix::time::clock_gettime(ClockId::Monotonic).tv_sec;
    let deadline = seconds() + PATIENCE;
    loop {
        if let Some(device) = wanted.find() {
            return Ok(device);
        }
        if seconds() > deadline {
            return stop(format!("the root device {root} did not appear"));
        }
        ports::pause();
    }
}

fn exists(path: &str) -> bool {
    rustix::fs::access(path, Access::EXISTS).is_ok()
}

/// The device to mount and its file system: the disk itself, else the largest of its partitions
/// that has a file system we know.
fn choose(disk: BlockDevice, args: &KernelArgs) -> Result<(BlockDevice, String), Stop> {
    if let Some(kind) = &args.root_type {
        return Ok((disk, kind.clone()));
    }
    if let Some(found) = disk.file_system() {
        return Ok((disk, found.kind.to_string()));
    }
    let mut partitions = disk.partitions();
    partitions.sort_unstable_by_key(|partition| Reverse(partition.size()));
    let known = partitions.into_iter().find_map(|partition| {
        let kind = partition.file_system()?.kind;
        Some((partition, kind.to_string()))
    });
    known.ok_or_else(|| Stop {
        failure: Failure::Boot,
        message: format!(
            "neither {} nor a partition of it has a file system that we know: name one with \
             root= and rootfstype=",
            disk.path()
        ),
    })
}
