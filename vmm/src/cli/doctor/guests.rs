//! What the default guest is made with, and where guests' files are kept.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use cowshed_guest_images::packages::{Needed, missing};
use cowshed_guest_images::{Builder, Progress};

use super::Check;
use crate::disk::default_folder;
use crate::host::Virtualization;

pub(super) fn checks() -> Vec<Check> {
    let mut checks = packages();
    checks.extend([cache(), overlays()]);
    checks
}

/// The packages of the guest that boots here by default are needed, those of the other are not.
fn packages() -> Vec<Check> {
    let (default, other) = match Virtualization::of_host() {
        Virtualization::Emulated => (Needed::SmallKernel, Needed::DebianKernel),
        Virtualization::Hardware => (Needed::DebianKernel, Needed::SmallKernel),
    };
    let needed = [missing(default), missing(Needed::RootImage)].concat();
    let other = missing(other);
    let mut checks = Vec::new();
    if !needed.is_empty() {
        checks.push(Check::missing(
            "packages",
            lacking(&needed),
            install(&needed),
        ));
    }
    if !other.is_empty() {
        let finding = format!("{}, for the kernel of other hosts only", lacking(&other));
        checks.push(Check::note("packages", finding, install(&other)));
    }
    if checks.is_empty() {
        checks.push(Check::ok(
            "packages",
            "all that making guests takes is installed",
        ));
    }
    checks
}

fn lacking(packages: &[&str]) -> String {
    format!("not installed: {}", packages.join(", "))
}

fn install(packages: &[&str]) -> String {
    format!(
        "sudo apt-get install --no-install-recommends {}",
        packages.join(" ")
    )
}

fn cache() -> Check {
    let name = "cache";
    let folder = match Builder::new(Progress::to_stderr()) {
        Ok(builder) => builder.folder().to_path_buf(),
        Err(error) => return Check::missing(name, error.to_string(), "export HOME"),
    };
    if let Err(error) = writable(&folder) {
        let finding = format!("{} is not writable: {error}", folder.display());
        let remedy = "set XDG_CACHE_HOME to a folder of yours with 1 GiB to spare";
        return Check::missing(name, finding, remedy);
    }
    let entries = entries(&folder);
    let size: u64 = entries.iter().map(|(_, size)| size).sum();
    let kernels = entries
        .iter()
        .filter(|(name, _)| name.starts_with("kernel-"))
        .count();
    let content = match kernels {
        0 => "no guest kernel yet: the first run makes it".to_owned(),
        1 => "1 guest kernel".to_owned(),
        more => format!("{more} guest kernels"),
    };
    Check::ok(
        name,
        format!("{}, {} MiB, {content}", folder.display(), size >> 20),
    )
}

/// Whether files can be made in `folder`, or where it would be made itself.
fn writable(folder: &Path) -> io::Result<()> {
    let there = folder
        .ancestors()
        .find(|folder| folder.exists())
        .unwrap_or(Path::new("/"));
    if !there.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    Ok(rustix::fs::access(there, rustix::fs::Access::WRITE_OK)?)
}

/// What is in the cache, and how many bytes each takes on the disk.
fn entries(folder: &Path) -> Vec<(String, u64)> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            (!name.starts_with('.')).then(|| (name, disk_usage(entry.path())))
        })
        .collect()
}

fn disk_usage(path: PathBuf) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let mut bytes = 0_u64;
    let mut paths = vec![path];
    while let Some(path) = paths.pop() {
        let Ok(meta) = path.symlink_metadata() else {
            continue;
        };
        bytes = bytes.saturating_add(meta.blocks().saturating_mul(512));
        if meta.is_dir() {
            paths.extend(
                fs::read_dir(path)
                    .into_iter()
                    .flatten()
                    .flatten()
                    .map(|e| e.path()),
            );
        }
    }
    bytes
}

fn overlays() -> Check {
    let name = "overlays";
    let folder = default_folder();
    let remedy = "set TMPDIR, or use --overlay-dir, to a writable folder on a disk";
    match writable(&folder).and_then(|()| Ok(rustix::fs::statvfs(&folder)?)) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize) >> 20;
            Check::ok(
                name,
                format!("throwaway ones in {}, {free} MiB free", folder.display()),
            )
        }
        Err(error) => Check::missing(name, format!("{}: {error}", folder.display()), remedy),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_listed_with_its_size() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("root-1/sub")).unwrap();
        fs::write(folder.path().join("root-1/sub/image"), vec![1; 1 << 20]).unwrap();
        fs::create_dir(folder.path().join(".locks")).unwrap();
        let found = entries(folder.path());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].0, "root-1");
        assert!(found[0].1 >= 1 << 20, "{found:?}");
        assert_eq!(entries(&folder.path().join("absent")), []);
    }

    #[test]
    fn a_folder_that_is_not_there_is_writable_if_it_can_be_made() {
        let folder = tempfile::tempdir().unwrap();
        writable(&folder.path().join("a/b")).unwrap();
        fs::write(folder.path().join("file"), "").unwrap();
        assert!(writable(&folder.path().join("file/a")).is_err());
    }

    #[test]
    fn missing_packages_come_with_the_command() {
        assert_eq!(
            install(&["bc", "xz-utils"]),
            "sudo apt-get install --no-install-recommends bc xz-utils"
        );
    }
}
