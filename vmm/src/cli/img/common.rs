//! What most commands ask for: formats, opening, output.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use cowshed_qcow::{Format, Image, OpenOptions, ReferencePolicy, Storage};

use super::Failure;
use crate::disk::files::{Files, recognise, storage};
use crate::disk::lock::Use;

/// How a command answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    /// For people
    Human,
    /// qemu-img's JSON
    Json,
}

/// A format by its name on the command line.
pub(super) fn format(name: &str) -> Result<Format, String> {
    Format::from_name(name).ok_or_else(|| {
        format!(
            "the format {name:?} is not supported: qcow2 and raw are (convert it with qemu-img)"
        )
    })
}

/// Which files may be opened because an image names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum References {
    /// None
    None,
    /// Those in the folder of the image that names them, or below it
    OwnFolder,
    /// Any
    Any,
}

/// How images are opened.
#[derive(Args, Clone, Debug)]
pub(super) struct Access {
    /// Open images although somebody may be writing to them: what is read may make no sense
    #[arg(short = 'U', long)]
    force_share: bool,

    /// Which backing and data files are opened that an image names. With images that others made,
    /// `any` lets them have any file of this host read
    #[arg(long, value_name = "WHICH", default_value = "any")]
    references: References,
}

impl Access {
    /// How an image is used that is only read.
    pub(super) fn reading(&self) -> Use {
        if self.force_share {
            Use::Look
        } else {
            Use::Read
        }
    }

    /// Opens and locks the file of an image, and says which format it has.
    pub(super) fn storage(
        &self,
        path: &Path,
        format: Option<Format>,
        how: Use,
    ) -> Result<(Arc<dyn Storage>, Format), Failure> {
        let storage = storage(path, how).map_err(|error| disk_error(path, error))?;
        let format = match format {
            Some(format) => format,
            None => recognise(path, &*storage)?,
        };
        Ok((storage, format))
    }

    /// Opens an image and what is beneath it.
    pub(super) fn open(
        &self,
        path: &Path,
        format: Option<Format>,
        how: Use,
    ) -> Result<Image, Failure> {
        let (storage, format) = self.storage(path, format, how)?;
        self.open_storage(path, storage, format, how == Use::Write)
    }

    /// The same of a file that is open already.
    pub(super) fn open_storage(
        &self,
        path: &Path,
        storage: Arc<dyn Storage>,
        format: Format,
        writable: bool,
    ) -> Result<Image, Failure> {
        let files = Files::under(storage, self.reading());
        Ok(Image::open(path, &self.options(format, !writable), &files)?)
    }

    /// How an image is opened.
    pub(super) fn options(&self, format: Format, read_only: bool) -> OpenOptions {
        OpenOptions {
            read_only,
            references: match self.references {
                References::None => ReferencePolicy::None,
                References::OwnFolder => ReferencePolicy::OwnFolder,
                References::Any => ReferencePolicy::Any,
            },
            ..OpenOptions::new(format)
        }
    }
}

/// A file that cannot be opened.
pub(super) fn disk_error(path: &Path, source: std::io::Error) -> Failure {
    let path = path.to_owned();
    crate::disk::Error::Open { path, source }.into()
}

/// How many threads work at a time.
pub(super) fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, |n| n.get().min(4))
}

/// A size for people: 1.5 GiB.
pub(super) fn human(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// Prints a document as JSON, for people to look at too.
pub(super) fn print_json(document: &impl serde::Serialize) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, document).map_err(std::io::Error::from)?;
    writeln!(out)?;
    Ok(())
}
