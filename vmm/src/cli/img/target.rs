//! New images, which get their names when they are whole.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cowshed_qcow::{
    DataFile, FileStorage, Format, Image, OpenOptions, ResizeOptions, Storage, create,
};

use super::interrupt::remove_when_ended;
use super::options::{self, Wanted};
use super::secrets::SecretObject;
use super::{Failure, open};
use crate::disk::files::storage;
use crate::disk::lock::{Use, lock};
use crate::disk::new_file::NewFile;

/// A new image. Dropped before it is published it leaves nothing behind.
pub(super) struct Target {
    path: PathBuf,
    new: NewFile,
    /// The file for its data, if that is another, and where that is to be.
    data: Option<(PathBuf, NewFile)>,
    durable: bool,
}

impl Target {
    /// Makes a file that is to be `path`, if what is there can be replaced. With `durable` it is on
    /// the disk when it is published.
    pub(super) fn begin(path: &Path, wanted: &Wanted, durable: bool) -> Result<Self, Failure> {
        if path.exists() {
            for name in wanted.files()? {
                let itself = path.canonicalize().ok();
                if options::beside(path, &name).canonicalize().ok() == itself {
                    let text = format!("{name} would be replaced by the image that needs it");
                    return Err(Failure::Usage(text));
                }
            }
        }
        let new = new_file(path)?;
        let mut temporary = new.temporary_names(path);
        let data = match wanted.data_file()? {
            None => None,
            Some((name, _)) => {
                let place = options::beside(path, &name);
                let data = new_file(&place)?;
                temporary.extend(data.temporary_names(&place));
                Some((place, data))
            }
        };
        if !temporary.is_empty() {
            remove_when_ended(temporary).map_err(failed(path))?;
        }
        Ok(Self {
            path: path.to_owned(),
            new,
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
        let path = &self.path;
        let file = self.new.try_clone().map_err(failed(path))?;
        let storage = locked(path, file, self.durable)?;
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
        let Some((place, data)) = &self.data else {
            return Ok(None);
        };
        let file = data.try_clone().map_err(failed(place))?;
        locked(place, file, self.durable).map(Some)
    }

    /// Gives the image its name.
    pub(super) fn publish(self) -> Result<(), Failure> {
        if let Some((place, data)) = self.data {
            data.replace(&place, self.durable).map_err(failed(&place))?;
        }
        self.new
            .replace(&self.path, self.durable)
            .map_err(failed(&self.path))
    }
}

/// A file that is to be `path`, where nobody uses what is there: nobody's image is replaced then.
fn new_file(path: &Path) -> Result<NewFile, Failure> {
    open::must_be_a_file(path)?;
    if path.exists() {
        storage(path, Use::Write).map_err(|error| open::failed(path, error))?;
    }
    NewFile::beside(path).map_err(failed(path))
}

fn locked(path: &Path, file: File, durable: bool) -> Result<Arc<dyn Storage>, Failure> {
    lock(&file, Use::Write).map_err(|error| failed(path)(io::Error::other(error)))?;
    let storage = if durable {
        FileStorage::new(file)
    } else {
        FileStorage::without_sync(file)
    };
    Ok(Arc::new(storage.from_nothing()))
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Failure {
    move |source| Failure::Create {
        path: path.to_owned(),
        source,
    }
}
