//! The small kernel, from Debian's unmodified source.

use std::os::unix::fs::MetadataExt;

use super::KernelFiles;
use crate::Error;
use crate::cache::{Cache, Key};
use crate::packages::{self, Needed, SOURCE};
use crate::recipe::Recipe;

const RECIPE: &str = include_str!("../../kernel/small.sh");
const FRAGMENTS: [(&str, &str); 4] = [
    ("base.cfg", include_str!("../../kernel/base.cfg")),
    ("machine.cfg", include_str!("../../kernel/machine.cfg")),
    ("devices.cfg", include_str!("../../kernel/devices.cfg")),
    ("lean.cfg", include_str!("../../kernel/lean.cfg")),
];
const WHAT: &str = "building the small guest kernel, which takes minutes";

pub(super) fn kernel(cache: &Cache) -> Result<KernelFiles, Error> {
    let key = Key::default().with(RECIPE.as_bytes());
    let key = FRAGMENTS
        .iter()
        .fold(key, |key, (_, text)| key.with(text.as_bytes()))
        .finish();
    let prefix = format!("kernel-small-{key}-");
    let folder = match (version(), cache.newest(&prefix)) {
        (Some(version), _) => cache.entry(&format!("{prefix}{version}"), WHAT, make)?,
        // One of an earlier source does when the source is not here.
        (None, Some(folder)) => folder,
        (None, None) => cache.entry(&prefix, WHAT, make)?,
    };
    Ok(KernelFiles {
        kernel: folder.join("vmlinux"),
        bzimage: folder.join("bzImage"),
        initrd: None,
        modules: None,
    })
}

/// What tells one version of the source package from another, without asking `dpkg`, which would
/// cost each start of a guest more than all else that is looked up here: the size and date that
/// the package gives the tarball.
fn version() -> Option<String> {
    let data = std::fs::metadata(SOURCE).ok()?;
    Some(format!("{:x}-{:x}", data.len(), data.mtime()))
}

fn make(recipe: &Recipe) -> Result<(), Error> {
    packages::require(Needed::SmallKernel, "the small guest kernel")?;
    for (name, text) in FRAGMENTS {
        let path = recipe.work.join(name);
        std::fs::write(&path, text).map_err(Error::io(path))?;
    }
    let mut command = recipe.shell(RECIPE);
    command.env("SOURCE", SOURCE);
    recipe.run(command).map(drop)
}
