//! Finding the root file system and moving onto it.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use cowshed_guest_protocol::Failure;
use rustix::fd::OwnedFd;
use rustix::fs::{Access, Dir, FileType, Mode, OFlags};
use rustix::mount::{MountFlags, mount, mount_move};

use crate::kernel_args::{KernelArgs, read_file};
use crate::modules::Modules;
use crate::{Stop, filesystem, ports};

const DEFAULT: &str = "/dev/vda";
const NEW_ROOT: &str = "/newroot";

/// How long a device that the command line names may take to appear, in milliseconds.
const PATIENCE: u32 = 10_000;

/// Mounts the root and moves onto it; without a disk, stays in the initramfs.
pub(crate) fn enter(modules: &Modules, args: &KernelArgs) -> Result<(), Stop> {
    modules.load(&["virtio_blk", "virtio_rng"])?;
    let disk = match &args.root {
        Some(root) => named(root)?,
        None if exists(DEFAULT) => DEFAULT.to_string(),
        None => return Ok(()),
    };
    let (device, kind) = choose(&disk, args)?;
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

/// The device that `root=` names, once it is there.
fn named(root: &str) -> Result<String, Stop> {
    let stop = |message| {
        Err(Stop {
            failure: Failure::Boot,
            message,
        })
    };
    if !root.starts_with("/dev/") {
        return stop(format!(
            "root={root} is not understood: name a device, such as /dev/vda1"
        ));
    }
    for _ in 0..PATIENCE {
        if exists(root) {
            return Ok(root.to_string());
        }
        ports::pause();
    }
    stop(format!("the root device {root} did not appear"))
}

fn exists(path: &str) -> bool {
    rustix::fs::access(path, Access::EXISTS).is_ok()
}

/// The device to mount and its file system: the disk itself, else the largest of its partitions
/// that has a file system we know.
fn choose(disk: &str, args: &KernelArgs) -> Result<(String, String), Stop> {
    if let Some(kind) = &args.root_type {
        return Ok((disk.to_string(), kind.clone()));
    }
    if let Some(kind) = filesystem::kind(disk) {
        return Ok((disk.to_string(), kind.to_string()));
    }
    let mut partitions = partitions(disk);
    partitions.sort_unstable();
    let known = partitions.iter().rev().find_map(|(_, partition)| {
        filesystem::kind(partition).map(|kind| (partition.clone(), kind.to_string()))
    });
    known.ok_or_else(|| Stop {
        failure: Failure::Boot,
        message: format!(
            "neither {disk} nor a partition of it has a file system that we know: name one with \
             root= and rootfstype="
        ),
    })
}

/// The partitions of a disk and their sizes.
fn partitions(disk: &str) -> Vec<(u64, String)> {
    let name = disk.trim_start_matches("/dev/");
    let folder = format!("/sys/class/block/{name}");
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let entries = rustix::fs::open(&*folder, flags, Mode::empty()).and_then(Dir::new);
    let entries = entries.into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let sized = names
        .filter(|entry| entry.starts_with(name))
        .filter_map(|entry| {
            let size = read_file(&format!("{folder}/{entry}/size")).ok()?;
            let size = core::str::from_utf8(&size).ok()?.trim().parse().ok()?;
            Some((size, format!("/dev/{entry}")))
        });
    sized.collect()
}
