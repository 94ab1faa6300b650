//! Debian's cloud kernel, as packaged.

use std::path::Path;

use super::KernelFiles;
use crate::cache::{Cache, Key};
use crate::packages::{self, Needed};
use crate::recipe::Recipe;
use crate::{Error, modules};

const RECIPE: &str = include_str!("../../kernel/debian.sh");
const WHAT: &str = "downloading Debian's cloud kernel";

/// What `init` may need before the root file system is there. `crc32c_generic` is what ext4 and
/// others ask for by an alias.
const INITRD_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "crc32c_generic",
    "ext4",
    "xfs",
    "btrfs",
    "squashfs",
];
/// What a guest needs that runs guests itself.
const NESTED_MODULES: &[&str] = &["kvm", "kvm_amd", "kvm_intel"];

pub(super) fn kernel(cache: &Cache) -> Result<KernelFiles, Error> {
    let key = Key::default().with(RECIPE.as_bytes());
    let modules = INITRD_MODULES.iter().chain(NESTED_MODULES);
    let key = modules
        .fold(key, |key, name| key.with(name.as_bytes()))
        .finish();
    let folder = cache.entry(&format!("kernel-debian-{key}"), WHAT, make)?;
    Ok(KernelFiles {
        kernel: folder.join("vmlinuz"),
        bzimage: folder.join("vmlinuz"),
        initrd: Some(folder.join("initrd")),
        modules: Some(folder),
    })
}

fn make(recipe: &Recipe) -> Result<(), Error> {
    packages::require(Needed::DebianKernel, "Debian's cloud kernel")?;
    recipe.run(recipe.shell(RECIPE))?;
    let tree = recipe.work.join("tree/lib/modules");
    let release = modules::release(&tree)?;
    modules::keep(
        &tree.join(&release),
        &recipe.out.join("lib/modules").join(&release),
        &[INITRD_MODULES, NESTED_MODULES].concat(),
    )?;
    let initrd = modules::archive(&tree.join(&release), &release, INITRD_MODULES)?;
    let path: &Path = &recipe.out.join("initrd");
    std::fs::write(path, initrd).map_err(Error::io(path))
}
