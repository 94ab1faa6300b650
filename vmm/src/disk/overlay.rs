//! The qcow2 files that a guest's writes go to.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cowshed_qcow::{CreateOptions, FileStorage, Format, Image, OpenOptions, Storage, create};

use super::Error;
use super::base::Base;
use super::files::{self, for_guest};
use super::lock::{Use, lock};
use super::new_file::{NewFile, folder_of};
use crate::config::Cache;

/// What an overlay is to be.
pub(super) struct Wanted {
    /// The disk's size in bytes; `None`: the base's.
    pub(super) size: Option<u64>,
    /// The file does not grow beyond this many bytes.
    pub(super) max_size: Option<u64>,
    /// What becomes of writes in the host's page cache.
    pub(super) cache: Cache,
    /// Bytes of tables to keep in memory, for the overlay and its base.
    pub(super) cache_size: Option<usize>,
}

impl Wanted {
    fn options(&self) -> OpenOptions {
        OpenOptions {
            max_file_size: self.max_size,
            // Of which half is for the top, as it should be.
            cache_bytes: self.cache_size.unwrap_or(OpenOptions::DEFAULT_CACHE_BYTES),
            ..OpenOptions::new(Format::Qcow2)
        }
    }
}

/// An overlay without a name in `folder`. If it may get the name `keep` one day, its backing
/// file is recorded as it must be there.
pub(super) fn throwaway(
    base: Base,
    folder: &Path,
    keep: Option<&Path>,
    wanted: &Wanted,
) -> Result<(Image, File), Error> {
    let failed = |source| Error::Folder {
        folder: folder.to_path_buf(),
        source,
    };
    let new = NewFile::nameless(folder).map_err(failed)?;
    let kept = new.try_clone().map_err(failed)?;
    // It dies with the run: nothing is gained by getting it to a disk.
    let storage = for_guest(new, Use::Write, Cache::Unsafe).map_err(failed)?;
    let storage = Arc::new(match keep {
        Some(_) => storage,
        None => storage.reserving(),
    });
    let name = match keep {
        Some(keep) => backing_name(&base.path, keep)?,
        // Nobody will ever look for it.
        None => base.path.to_string_lossy().into_owned(),
    };
    let options = CreateOptions {
        // Small writes at random places take a page each, and no copy: with clusters of 64 KiB that
        // have none, 15 bytes are copied for each that is written.
        cluster_size: 128 << 10,
        extended_l2: true,
        ..options(&base, name, wanted)?
    };
    create(&base.path, storage.clone(), &options)?;
    let label = PathBuf::from(format!("the throwaway overlay of {}", base.path.display()));
    let image = Image::open_over(&label, storage, &wanted.options(), Some(base.image))?;
    Ok((image, kept))
}

/// The overlay at `path`, which is made if nothing is there.
pub(super) fn at(base: Base, path: &Path, wanted: &Wanted) -> Result<Image, Error> {
    let storage = match files::guest_storage(path, Use::Write, wanted.cache) {
        Ok(storage) => {
            reuse(path, &storage, &base, wanted)?;
            storage
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => make(path, &base, wanted)?,
        Err(source) => return Err(Error::open(path, source)),
    };
    Ok(Image::open_over(
        path,
        storage,
        &wanted.options(),
        Some(base.image),
    )?)
}

/// Makes an overlay that gets its name when it is whole.
fn make(path: &Path, base: &Base, wanted: &Wanted) -> Result<Arc<dyn Storage>, Error> {
    let failed = |source| Error::Create {
        path: path.to_path_buf(),
        source,
    };
    let new = NewFile::beside(path).map_err(failed)?;
    // Locked before anyone else can see it.
    lock(new.file(), Use::Write).map_err(|error| failed(io::Error::other(error)))?;
    let file = new.try_clone().map_err(failed)?;
    let storage = Arc::new(for_guest(file, Use::Write, wanted.cache).map_err(failed)?);
    let options = options(base, backing_name(&base.path, path)?, wanted)?;
    create(path, storage.clone(), &options)?;
    new.publish(path).map_err(failed)?;
    Ok(storage)
}

/// How an overlay is made that records its base as `name`.
fn options(base: &Base, name: String, wanted: &Wanted) -> Result<CreateOptions, Error> {
    let of_base = base.image.size();
    let size = wanted.size.unwrap_or(of_base);
    if size < of_base {
        return Err(Error::Smaller {
            path: base.path.clone(),
            size,
            of_base,
        });
    }
    Ok(CreateOptions {
        backing: Some((name, base.format)),
        ..CreateOptions::new(size)
    })
}

/// Checks that the overlay at `path` is one of this base, before anything is written to it.
fn reuse(
    path: &Path,
    storage: &Arc<dyn Storage>,
    base: &Base,
    wanted: &Wanted,
) -> Result<(), Error> {
    let look = OpenOptions {
        read_only: true,
        ..OpenOptions::new(Format::Qcow2)
    };
    let overlay = Image::open_over(path, storage.clone(), &look, None)?;
    let backing = overlay
        .backing()
        .ok_or_else(|| Error::NoBacking(path.to_path_buf()))?;
    let other = |reason: String| Error::OtherBase {
        overlay: path.to_path_buf(),
        recorded: backing.name.clone(),
        base: base.path.clone(),
        reason,
    };
    let recorded = folder_of(path).join(&backing.name);
    let found = File::open(&recorded)
        .and_then(|file| FileStorage::new(file).identity())
        .map_err(|error| other(format!("cannot open that: {error}")))?;
    if found != base.identity {
        return Err(other("another file".to_owned()));
    }
    if let Some(format) = backing.format.filter(|format| *format != base.format) {
        return Err(other(format!("it records the format {}", format.name())));
    }
    match wanted.size {
        Some(size) if size != overlay.size() => Err(Error::OtherSize {
            path: path.to_path_buf(),
            size,
            of_overlay: overlay.size(),
        }),
        _ => Ok(()),
    }
}

/// How the overlay at `overlay` names its base: relative if they are, or will be, in one folder
/// or the base is below it, so that both can be moved together; else absolute.
fn backing_name(base: &Path, overlay: &Path) -> Result<String, Error> {
    let real = base
        .canonicalize()
        .map_err(|source| Error::open(base, source))?;
    let folder = folder_of(overlay);
    let folder = folder.canonicalize().map_err(|source| Error::Folder {
        folder: folder.to_path_buf(),
        source,
    })?;
    let name = real.strip_prefix(&folder).unwrap_or(&real);
    let name = name
        .to_str()
        .ok_or_else(|| Error::Name(base.to_path_buf()))?;
    // A colon in the first part would make it a protocol.
    let first = name
        .as_bytes()
        .split(|&b| b == b'/')
        .next()
        .unwrap_or_default();
    if first.contains(&b':') {
        Ok(format!("./{name}"))
    } else {
        Ok(name.to_owned())
    }
}
