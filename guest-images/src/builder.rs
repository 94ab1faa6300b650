//! What this crate makes, by name.

use std::path::{Path, PathBuf};

use crate::cache::Cache;
use crate::{Error, Kernel, KernelFiles, Progress, kernel, programs, root_image};

/// Makes guest kernels, images and programs, or finds them in the cache.
#[derive(Debug)]
pub struct Builder {
    cache: Cache,
}

impl Builder {
    /// A builder over `$XDG_CACHE_HOME/cowshed`, else `~/.cache/cowshed`.
    ///
    /// # Errors
    /// When neither variable is set.
    pub fn new(progress: Progress) -> Result<Self, Error> {
        let absolute = |name| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|p| p.is_absolute())
        };
        let base = absolute("XDG_CACHE_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
            .ok_or(Error::NoCacheFolder)?;
        Ok(Self::at(base.join("cowshed"), progress))
    }

    /// A builder over another cache folder, made when something is put there.
    pub fn at(folder: PathBuf, progress: Progress) -> Self {
        Self {
            cache: Cache::new(folder, progress),
        }
    }

    /// The cache folder. It need not be there yet.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.cache.folder()
    }

    /// A guest kernel.
    ///
    /// # Errors
    /// When it is not in the cache and cannot be made, such as for a Debian package that is not
    /// installed.
    pub fn kernel(&self, kernel: Kernel) -> Result<KernelFiles, Error> {
        kernel::kernel(&self.cache, kernel)
    }

    /// The default root file system: a qcow2 image with one ext4 file system on the whole disk.
    ///
    /// # Errors
    /// As for [`kernel`](Self::kernel).
    pub fn root_image(&self) -> Result<PathBuf, Error> {
        root_image::root_image(&self.cache)
    }

    /// The guest's PID 1, a static ELF program, for [`initramfs`](crate::initramfs).
    ///
    /// # Errors
    /// As for [`kernel`](Self::kernel); it needs this source tree and `cargo`.
    pub fn init(&self) -> Result<PathBuf, Error> {
        programs::init(&self.cache)
    }

    /// A bare-metal test guest: the program `name` of the package `guest-images/metal`.
    ///
    /// # Errors
    /// As for [`init`](Self::init).
    pub fn metal(&self, name: &str) -> Result<PathBuf, Error> {
        programs::metal(&self.cache, name)
    }
}
