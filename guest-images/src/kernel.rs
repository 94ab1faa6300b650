//! The default guests' kernels.

mod debian;
mod small;

use std::path::PathBuf;

use crate::Error;
use crate::cache::Cache;

/// A guest kernel that can be made here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Debian's `linux-source`, unmodified, with the small configuration kept in
    /// `guest-images/kernel`: boots in seconds even where the guest's kernel is emulated. Compiled
    /// here, in minutes.
    Small,
    /// Debian's packaged cloud kernel, unmodified: a download, no compiler.
    DebianCloud,
}

/// Where the files of a guest kernel are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFiles {
    /// What to boot: an ELF `vmlinux` with a PVH note if there is one, else the bzImage.
    pub kernel: PathBuf,
    /// The same kernel as a bzImage.
    pub bzimage: PathBuf,
    /// An uncompressed initramfs of the modules that [`init`](crate::Builder::init) loads, if the
    /// kernel has any. It has no `/init`: append [`initramfs`](crate::initramfs).
    pub initrd: Option<PathBuf>,
    /// The folder that has `lib/modules/RELEASE` with the modules kept, if the kernel has any:
    /// those of the initrd and, for nested guests, KVM's.
    pub modules: Option<PathBuf>,
}

pub(crate) fn kernel(cache: &Cache, kernel: Kernel) -> Result<KernelFiles, Error> {
    match kernel {
        Kernel::Small => small::kernel(cache),
        Kernel::DebianCloud => debian::kernel(cache),
    }
}
