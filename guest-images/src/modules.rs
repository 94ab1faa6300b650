//! A kernel's modules and what they depend on, by `depmod`'s `modules.dep`.

use std::collections::BTreeSet;
use std::path::Path;

use crate::Error;
use crate::cpio::Archive;

/// The one folder in `lib/modules`.
pub(crate) fn release(modules: &Path) -> Result<String, Error> {
    let mut entries = std::fs::read_dir(modules)
        .map_err(Error::io(modules))?
        .flatten();
    let name = entries
        .next()
        .and_then(|entry| entry.file_name().into_string().ok());
    name.ok_or_else(|| Error::Incomplete {
        what: "Debian's cloud kernel".to_owned(),
        missing: "folder of modules".to_owned(),
    })
}

/// Copies the modules `names` of `from`, and what they depend on, to `to`, and their part of
/// `modules.dep`.
pub(crate) fn keep(from: &Path, to: &Path, names: &[&str]) -> Result<(), Error> {
    let selection = Selection::read(from, names)?;
    for path in &selection.paths {
        let target = to.join(path);
        let folder = target.parent().unwrap_or(to);
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let source = from.join(path);
        std::fs::copy(&source, &target).map_err(Error::io(source))?;
    }
    let path = to.join("modules.dep");
    std::fs::write(&path, selection.dependencies).map_err(Error::io(path))
}

/// An initramfs with the modules `names` of `from`, and what they depend on, and their part of
/// `modules.dep`, as `/lib/modules/RELEASE`.
pub(crate) fn archive(from: &Path, release: &str, names: &[&str]) -> Result<Vec<u8>, Error> {
    let selection = Selection::read(from, names)?;
    let base = format!("lib/modules/{release}");
    let mut archive = Archive::default();
    let mut folders = BTreeSet::new();
    for path in &selection.paths {
        let path = format!("{base}/{path}");
        let ends = path.match_indices('/').map(|(end, _)| end);
        folders.extend(ends.filter_map(|end| path.get(..end)).map(str::to_owned));
    }
    folders.iter().for_each(|folder| archive.directory(folder));
    for path in &selection.paths {
        let source = from.join(path);
        let content = std::fs::read(&source).map_err(Error::io(source))?;
        archive.file(&format!("{base}/{path}"), 0o644, &content);
    }
    let dependencies = selection.dependencies.as_bytes();
    archive.file(&format!("{base}/modules.dep"), 0o644, dependencies);
    Ok(archive.finish())
}

/// Some modules and all that they depend on, without what is built into the kernel.
struct Selection {
    /// Their files, relative to the folder of `modules.dep`.
    paths: BTreeSet<String>,
    /// Their lines of `modules.dep`.
    dependencies: String,
}

impl Selection {
    fn read(folder: &Path, names: &[&str]) -> Result<Self, Error> {
        let path = folder.join("modules.dep");
        let text = std::fs::read_to_string(&path).map_err(Error::io(path))?;
        let path = folder.join("modules.builtin");
        let builtin = std::fs::read_to_string(&path).map_err(Error::io(path))?;
        let mut paths = BTreeSet::new();
        for name in names {
            if builtin.lines().any(|line| name_of(line) == *name) {
                continue;
            }
            let line = text.lines().find(|line| name_of(line) == *name);
            let line = line.ok_or_else(|| Error::Incomplete {
                what: "Debian's cloud kernel".to_owned(),
                missing: format!("module {name}"),
            })?;
            // A line names a module's dependencies' dependencies too.
            paths.extend(
                line.split([':', ' '])
                    .filter(|path| !path.is_empty())
                    .map(str::to_owned),
            );
        }
        let lines = text.lines().filter(|line| {
            line.split_once(':')
                .is_some_and(|(path, _)| paths.contains(path))
        });
        let dependencies = lines.map(|line| format!("{line}\n")).collect();
        Ok(Self {
            paths,
            dependencies,
        })
    }
}

/// The module that a line of `modules.dep` is about: `virtio_blk` of
/// `kernel/drivers/block/virtio_blk.ko: ...`, with `-` taken for `_`.
fn name_of(line: &str) -> String {
    let path = line.split(':').next().unwrap_or_default();
    let file = path.rsplit('/').next().unwrap_or_default();
    file.split('.').next().unwrap_or_default().replace('-', "_")
}
