//! Loading kernel modules from the initramfs, in the order that `modules.dep` gives.

use alloc::format;
use alloc::string::{String, ToString};

use cowshed_guest_protocol::{Failure, Reason};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::Stop;
use crate::kernel_args::read_file;

/// `MODULE_INIT_COMPRESSED_FILE` of `finit_module`.
const COMPRESSED: i32 = 4;

/// Modules that others ask for by a name that only `modprobe` would resolve.
const SOFT: &[(&str, &str)] = &[
    ("ext4", "crc32c_generic"),
    ("btrfs", "crc32c_generic"),
    ("xfs", "crc32c_generic"),
];

/// The modules of the running kernel.
pub(crate) struct Modules {
    folder: String,
    /// `modules.dep`; empty for a kernel that has none.
    dependencies: String,
}

impl Modules {
    pub(crate) fn of_this_kernel() -> Self {
        let name = rustix::system::uname();
        let folder = format!("/lib/modules/{}", name.release().to_string_lossy());
        let dependencies = read_file(&format!("{folder}/modules.dep")).unwrap_or_default();
        Self {
            folder,
            dependencies: String::from_utf8_lossy(&dependencies).into_owned(),
        }
    }

    /// Loads each of these modules and what it depends on. One that is not here is taken for
    /// built in.
    pub(crate) fn load(&self, names: &[&str]) -> Result<(), Stop> {
        for name in names {
            for (_, soft) in SOFT.iter().filter(|(module, _)| module == name) {
                self.load(&[soft])?;
            }
            let line = self
                .dependencies
                .lines()
                .find(|line| name_of(line) == *name);
            let Some((path, dependencies)) = line.and_then(|line| line.split_once(':')) else {
                continue;
            };
            // The last is needed by those before it.
            for path in dependencies.split_ascii_whitespace().rev().chain([path]) {
                self.insert(path)?;
            }
        }
        Ok(())
    }

    fn insert(&self, path: &str) -> Result<(), Stop> {
        let flags = if path.ends_with(".ko") { 0 } else { COMPRESSED };
        let path = if path.starts_with('/') {
            path.to_string()
        } else {
            format!("{}/{path}", self.folder)
        };
        let loaded = rustix::fs::open(&*path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .and_then(|file| rustix::system::finit_module(file, c"", flags));
        match loaded {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(Stop {
                failure: Failure::Boot,
                message: format!("cannot load the kernel module {path}: {}", Reason(errno)),
            }),
        }
    }
}

/// The module that a line is about, with `-` taken for `_`.
fn name_of(line: &str) -> String {
    let path = line.split(':').next().unwrap_or_default();
    let file = path.rsplit('/').next().unwrap_or_default();
    file.split('.').next().unwrap_or_default().replace('-', "_")
}
