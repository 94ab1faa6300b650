//! Debian's cloud kernel, as packaged.

use std::path::Path;

use super::KernelFiles;
use crate::cache::{Cache, Key};
use crate::packages::{self, Needed};
use crate::recipe::Recipe;
use crate::{Error, modules};

/// Depends on the current version's package.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
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
    "overlay",
];
/// What a guest needs that runs guests itself.
const NESTED_MODULES: &[&str] = &["kvm", "kvm_amd", "kvm_intel"];

const UNPACK: &str = "
package=$(apt-cache depends --important \"$META\" | sed -n 's/^ *Depends: \\(linux-image-[0-9].*\\)$/\\1/p')
if [ -z \"$package\" ]; then echo \"no dependency of $META is a kernel\"; exit 1; fi
apt-get download \"$package\"
dpkg-deb --extract \"$package\"_*.deb tree
release=${package#linux-image-}
cp tree/boot/vmlinuz-* \"$OUT/vmlinuz\"
mkdir -p tree/usr
/sbin/depmod --basedir tree \"$release\"
";

pub(super) fn kernel(cache: &Cache) -> Result<KernelFiles, Error> {
    let key = Key::default().with(UNPACK.as_bytes());
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
    let mut command = recipe.shell(UNPACK);
    command.env("META", META_PACKAGE);
    recipe.run(command)?;
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
