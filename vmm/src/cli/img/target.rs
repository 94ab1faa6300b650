//! New images, which get their names when they are whole.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cowshed_qcow::storage::Identity;
use cowshed_qcow::{
    DataFile, FileStorage, Format, Image, OpenOptions, ResizeOptions, Storage, create,
};

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};

use super::interrupt::remove_when_ended;
use super::options::{self, Wanted};
use super::secrets::SecretObject;
use super::{Failure, open};
use crate::disk::files::{identity, storage};
use crate::disk::lock::{Use, lock};
use crate::disk::new_file::{NewFile, folder_of};

/// A new image. Dropped before it is published it leaves nothing behind.
pub(super) struct Target {
    image: Part,
    /// The file for its data, if that is another.
    data: Option<Part>,
    durable: bool,
}

impl Target {
    /// Makes a file that is to be `path`, if what is there can be replaced: nobody uses it, and none
    /// of the `needed` images is made of it. With `durable` it is on the disk when it is published.
    pub(super) fn begin(
        path: &Path,
        wanted: &Wanted,
        durable: bool,
        needed: &[&Image],
    ) -> Result<Self, Failure> {
        let backing = wanted.backing_file.iter();
        let mut others: Vec<_> = backing.map(|name| options::beside(path, name)).collect();
        let data = match wanted.data_file()? {
            None => None,
            Some((name, _)) => {
                let place = options::beside(path, &name);
                let data = Part::begin(&place, &others, needed)?;
                others.push(place);
                Some(data)
            }
        };
        let image = Part::begin(path, &others, needed)?;
        let parts = data.iter().chain([&image]);
        let temporary: Vec<_> = parts
            .flat_map(|part| part.new.temporary_names(&part.path))
            .collect();
        if !temporary.is_empty() {
            remove_when_ended(temporary).map_err(failed(path))?;
        }
        Ok(Self {
            image,
            data,
            durable,
        })
    }

    /// Makes an image of the file.
    pub(super) fn make(
        &self,
        format: Format,
        wanted: &Wanted,
        size: u64,
        objects: &[SecretObject],
    ) -> Result<Arc<dyn Storage>, Failure> {
        let path = &self.image.path;
        let storage = self.image.storage(self.durable)?;
        match format {
            Format::Qcow2 => {
                let mut options = wanted.qcow2(size, objects)?;
                let data = wanted.data_file()?.zip(self.data()?);
                options.data_file =
                    data.map(|((name, raw), storage)| DataFile { name, raw, storage });
                options.backing = wanted.backing_file.clone().zip(wanted.backing_format);
                create(path, storage.clone(), &options)?;
            }
            Format::Raw => {
                let options = ResizeOptions {
                    shrink: false,
                    preallocation: wanted.raw()?,
                };
                let raw = OpenOptions::new(Format::Raw);
                Image::open_over(path, storage.clone(), &raw, None)?.resize(size, &options)?;
            }
        }
        Ok(storage)
    }

    /// The file for the image's data, if that is another.
    pub(super) fn data(&self) -> Result<Option<Arc<dyn Storage>>, Failure> {
        let data = self.data.as_ref();
        data.map(|data| data.storage(self.durable)).transpose()
    }

    /// Gives the image its name.
    pub(super) fn publish(self) -> Result<(), Failure> {
        if let Some(data) = self.data {
            data.publish(self.durable)?;
        }
        self.image.publish(self.durable)
    }
}

/// A file of a new image.
struct Part {
    path: PathBuf,
    new: NewFile,
    /// What is there now. Until it is replaced it is locked: what somebody wrote to it would be lost.
    old: Option<(Identity, Arc<dyn Storage>)>,
}

impl Part {
    fn begin(path: &Path, others: &[PathBuf], needed: &[&Image]) -> Result<Self, Failure> {
        open::must_be_a_file(path)?;
        let found = identity(path);
        let is_one = |image: &&Image| found.is_some_and(|file| image.has_file(file));
        if needed.iter().any(is_one) || others.iter().any(|other| is_same(path, other)) {
            let text = format!(
                "{} would be replaced by an image that needs it: choose another name",
                path.display()
            );
            return Err(Failure::Usage(text));
        }
        if is_mount_point(path) {
            let text = format!(
                "{} is a mount point, which no new file can replace: choose another name, and copy the \
                 image to it afterwards",
                path.display()
            );
            return Err(Failure::Usage(text));
        }
        let old = match found {
            None => None,
            Some(found) => {
                let file = storage(path, Use::Write).map_err(|error| open::failed(path, error))?;
                let locked = file.identity().ok().flatten();
                Some((locked.unwrap_or(found), file))
            }
        };
        Ok(Self {
            path: path.to_owned(),
            new: NewFile::beside(path).map_err(failed(path))?,
            old,
        })
    }

    fn storage(&self, durable: bool) -> Result<Arc<dyn Storage>, Failure> {
        let failed = || failed(&self.path);
        let file = self.new.try_clone().map_err(failed())?;
        lock(&file, Use::Write).map_err(|error| failed()(io::Error::other(error)))?;
        let storage = if durable {
            FileStorage::new(file)
        } else {
            FileStorage::without_sync(file)
        };
        Ok(Arc::new(storage.from_nothing()))
    }

    fn publish(self, durable: bool) -> Result<(), Failure> {
        let path = &self.path;
        let published = match self.old {
            Some((old, _locked)) => self.new.replace(path, old),
            None if durable => self.new.publish(path),
            None => self.new.name(path),
        };
        published.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Failure::Usage(format!(
                "another file has come to {} meanwhile, and is not replaced: run this again if it is to \
                 be",
                path.display()
            )),
            _ => failed(path)(error),
        })
    }
}

/// Whether a file is mounted there, as containers have it. Old kernels do not say.
fn is_mount_point(path: &Path) -> bool {
    let found = statx(CWD, path, AtFlags::empty(), StatxFlags::empty());
    found.is_ok_and(|file| file.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Whether two paths lead to one file, or would if there were one.
pub(super) fn is_same(one: &Path, other: &Path) -> bool {
    let place = |path: &Path| {
        Some((
            folder_of(path).canonicalize().ok()?,
            path.file_name()?.to_owned(),
        ))
    };
    match (identity(one), identity(other)) {
        (None, None) => place(one).is_some() && place(one) == place(other),
        (one, other) => one == other,
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Failure {
    move |source| Failure::Create {
        path: path.to_owned(),
        source,
    }
}
