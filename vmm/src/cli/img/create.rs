//! `cowshed img create`.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use cowshed_qcow::{DataFile, FileStorage, Format, OpenOptions, Preallocation, Storage, create};

use super::open::{self, Access, Named};
use super::options::{self, Wanted};
use super::secrets::SecretObject;
use super::{Failure, common};
use crate::cli::value;
use crate::disk::files::storage;
use crate::disk::lock::{Use, lock};
use crate::disk::new_file::NewFile;

/// Create an image.
///
/// Without -f the format is raw, as with qemu-img. With a backing file its size is the default.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cowshed img create -f qcow2 disk.qcow2 20G
  cowshed img create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
  cowshed img create -f qcow2 -o help")]
pub(super) struct CreateArgs {
    /// Format of the new image
    #[arg(short, value_name = "FORMAT", value_parser = common::format, default_value = "raw")]
    format: Format,

    /// Backing file: what the image does not have is read from there, and never written. The name
    /// is recorded; it is seen from the folder of the new image
    #[arg(short, value_name = "BACKING")]
    backing: Option<String>,

    /// Format of the backing file
    #[arg(short = 'F', value_name = "FORMAT", value_parser = common::format)]
    backing_format: Option<Format>,

    /// Do not open the backing file
    #[arg(short)]
    unsafe_backing: bool,

    /// Options of the format, such as cluster_size=4k,compat=1.1; `-o help` lists them
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,

    /// Say nothing
    #[arg(short)]
    quiet: bool,

    #[command(flatten)]
    access: Access,

    /// The new image. A file that is there is replaced
    #[arg(required_unless_present = "options")]
    image: Option<PathBuf>,

    /// Size of the disk, with an optional k, M, G, T, P or E
    #[arg(value_parser = value::image_size)]
    size: Option<u64>,
}

pub(super) fn run(args: &CreateArgs) -> Result<u8, Failure> {
    let help = args
        .options
        .iter()
        .any(|list| list == "help" || list == "?");
    if help {
        std::io::stdout().write_all(options::HELP.as_bytes())?;
        return Ok(0);
    }
    let usage = |text: &str| Err(Failure::Usage(text.to_owned()));
    let Some(path) = &args.image else {
        return usage("which file is to be created?");
    };
    let mut wanted = Wanted::parse(&args.options)?;
    wanted.backing_file = args.backing.clone().or(wanted.backing_file);
    wanted.backing_format = args.backing_format.or(wanted.backing_format);
    if wanted.backing_file.is_some() && wanted.backing_format.is_none() {
        return usage("name the backing file's format, with -F: it is never guessed");
    }
    let size = match (args.size.or(wanted.size), &wanted.backing_file) {
        (Some(size), backing) => {
            if let Some(backing) = backing.as_deref().filter(|_| !args.unsafe_backing) {
                size_of(args, path, backing, wanted.backing_format)?;
            }
            size
        }
        (None, Some(backing)) if !args.unsafe_backing => {
            size_of(args, path, backing, wanted.backing_format)?
        }
        (None, _) => {
            return usage("how large is the disk to be? Give a size after the file's name");
        }
    };
    let size = size.checked_next_multiple_of(512).ok_or_else(too_large)?;
    // Nobody's image is replaced while it is used.
    if path.exists() {
        storage(path, Use::Write).map_err(|error| open::failed(path, error))?;
    }
    let failed = |source| Failure::Create {
        path: path.clone(),
        source,
    };
    let new = NewFile::beside(path).map_err(failed)?;
    make(path, &new, args.format, &wanted, size, &args.access.object)?;
    new.replace(path).map_err(failed)?;
    if !args.quiet {
        let (path, format, size) = (path.display(), args.format.name(), common::human(size));
        writeln!(std::io::stdout(), "{path}: {format}, {size}")?;
    }
    Ok(0)
}

fn too_large() -> Failure {
    Failure::Usage("the size is too large".into())
}

/// The size of a backing file, which is opened to see that it can be.
fn size_of(
    args: &CreateArgs,
    image: &Path,
    backing: &str,
    format: Option<Format>,
) -> Result<u64, Failure> {
    let named = Named::path(&options::beside(image, backing), format);
    let (file, format) = args.access.file(&named, args.access.reading())?;
    let options = OpenOptions {
        stay_locked: true,
        ..args.access.options(&named, format, true)
    };
    Ok(args.access.open_file(&named.path, file, &options)?.size())
}

/// Makes an image of a file that has no name yet.
pub(super) fn make(
    path: &Path,
    new: &NewFile,
    format: Format,
    wanted: &Wanted,
    size: u64,
    objects: &[SecretObject],
) -> Result<Arc<dyn Storage>, Failure> {
    let failed = |source| Failure::Create {
        path: path.to_owned(),
        source,
    };
    let file = new.try_clone().map_err(failed)?;
    lock(&file, Use::Write).map_err(|error| failed(std::io::Error::other(error)))?;
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::new(file));
    match format {
        Format::Qcow2 => {
            let mut options = wanted.qcow2(size, objects)?;
            options.data_file = match wanted.data_file()? {
                None => None,
                Some((name, raw)) => Some(data_file(path, name, raw)?),
            };
            options.backing = wanted.backing_file.clone().zip(wanted.backing_format);
            create(path, storage.clone(), &options)?;
        }
        Format::Raw => {
            let mode = wanted.raw()?;
            storage.set_len(size).map_err(failed)?;
            if mode != Preallocation::Off {
                storage.allocate(0, size).map_err(failed)?;
            }
        }
    }
    Ok(storage)
}

/// The file for the data of the image at `path`: made, or emptied.
fn data_file(path: &Path, name: String, raw: bool) -> Result<DataFile, Failure> {
    let place = options::beside(path, &name);
    let failed = |source| Failure::Create {
        path: place.clone(),
        source,
    };
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false) // Only when it is locked.
        .open(&place)
        .map_err(failed)?;
    lock(&file, Use::Write).map_err(|error| failed(std::io::Error::other(error)))?;
    let storage = Arc::new(FileStorage::new(file));
    Ok(DataFile { name, raw, storage })
}
