//! The Debian packages that making things here takes.

use std::path::Path;

use crate::Error;

/// A Debian package and what it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Package {
    /// Its name for `apt-get install`.
    pub name: &'static str,
    /// A file that is there when it is installed: a program's name, or an absolute path.
    pub provides: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// For what it is needed.
    pub needed: Needed,
}

/// What takes a package.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needed {
    /// The small kernel, compiled here.
    SmallKernel,
    /// Debian's cloud kernel, which any Debian can download and unpack.
    DebianKernel,
    /// The default root file system.
    RootImage,
}

const fn package(
    needed: Needed,
    name: &'static str,
    provides: &'static str,
    purpose: &'static str,
) -> Package {
    Package {
        name,
        provides,
        purpose,
        needed,
    }
}

/// Every package that something here takes.
pub const PACKAGES: &[Package] = &[
    package(
        Needed::RootImage,
        "busybox-static",
        "/bin/busybox",
        "what the default guest runs",
    ),
    package(
        Needed::RootImage,
        "e2fsprogs",
        "mkfs.ext4",
        "makes its file system",
    ),
    package(
        Needed::RootImage,
        "qemu-utils",
        "qemu-img",
        "makes the qcow2 image of it",
    ),
    package(
        Needed::DebianKernel,
        "apt",
        "apt-get",
        "downloads and verifies Debian's cloud kernel",
    ),
    package(Needed::DebianKernel, "dpkg", "dpkg-deb", "unpacks it"),
    package(
        Needed::DebianKernel,
        "kmod",
        "depmod",
        "finds what its modules depend on",
    ),
    package(
        Needed::SmallKernel,
        "linux-source-6.1",
        SOURCE,
        "the small kernel's source",
    ),
    package(Needed::SmallKernel, "xz-utils", "xz", "unpacks it"),
    package(Needed::SmallKernel, "make", "make", "builds it"),
    package(Needed::SmallKernel, "gcc", "gcc", "compiles it"),
    package(
        Needed::SmallKernel,
        "libc6-dev",
        "/usr/include/stdio.h",
        "for its build tools",
    ),
    package(
        Needed::SmallKernel,
        "binutils",
        "objcopy",
        "links and strips it",
    ),
    package(Needed::SmallKernel, "flex", "flex", "for its build tools"),
    package(Needed::SmallKernel, "bison", "bison", "for its build tools"),
    package(Needed::SmallKernel, "bc", "bc", "for its build"),
    package(
        Needed::SmallKernel,
        "libelf-dev",
        "/usr/include/libelf.h",
        "for its objtool",
    ),
];

/// The tarball in `linux-source-6.1`.
pub(crate) const SOURCE: &str = "/usr/src/linux-source-6.1.tar.xz";

/// The packages of `needed` that are not installed.
pub fn missing(needed: Needed) -> Vec<&'static str> {
    let of_it = PACKAGES.iter().filter(|package| package.needed == needed);
    of_it
        .filter(|package| !is_there(package.provides))
        .map(|package| package.name)
        .collect()
}

pub(crate) fn require(needed: Needed, what: &str) -> Result<(), Error> {
    let packages = missing(needed);
    if packages.is_empty() {
        return Ok(());
    }
    Err(Error::MissingPackages {
        what: what.to_owned(),
        packages,
    })
}

/// Where the administrator's programs are, which the `PATH` of other people may lack.
pub(crate) const ADMIN_PATH: &str = "/usr/local/sbin:/usr/sbin:/sbin";

fn is_there(file: &str) -> bool {
    if file.starts_with('/') {
        return Path::new(file).exists();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders = std::env::split_paths(&path).chain(std::env::split_paths(ADMIN_PATH));
    folders.any(|folder| folder.join(file).is_file())
}
