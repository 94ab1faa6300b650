//! Guest kernels, programs and images from their builder, which makes them on first use.

use std::path::{Path, PathBuf};
use std::{fs, iter};

use cowshed_guest_images::{Builder, Kernel, KernelFiles, Progress};

/// The builder over the cache that `cowshed` itself uses.
///
/// # Panics
/// When there is no place for a cache.
pub fn builder() -> Builder {
    Builder::new(Progress::to_stderr()).unwrap_or_else(|error| panic!("{}", chain(&error)))
}

/// The files of `kernel`.
///
/// # Panics
/// When it cannot be made; the message says what is missing.
pub fn kernel(kernel: Kernel) -> KernelFiles {
    builder()
        .kernel(kernel)
        .unwrap_or_else(|error| panic!("{}", chain(&error)))
}

/// The file of the module `name` (without its suffix) of `kernel`.
///
/// # Panics
/// When the builder kept no such module.
pub fn module(kernel: &KernelFiles, name: &str) -> PathBuf {
    let folder = kernel.modules.as_deref().expect("a kernel with modules");
    let file = format!("{name}.ko");
    find(folder, &file).unwrap_or_else(|| panic!("{} has no {file}", folder.display()))
}

fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(folder)
        .expect("read a folder")
        .map(|e| e.expect("an entry").path());
    entries.into_iter().find_map(|path| match path.is_dir() {
        true => find(&path, name),
        false => path.ends_with(name).then_some(path),
    })
}

fn chain(error: &dyn std::error::Error) -> String {
    let messages = iter::successors(Some(error), |error| error.source()).map(ToString::to_string);
    messages.collect::<Vec<_>>().join(": ")
}
