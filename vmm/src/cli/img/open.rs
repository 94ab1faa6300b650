//! Opening what the command line names: a path, or `--image-opts`, with passwords.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use cowshed_qcow::{Format, Image, OpenOptions, ReferencePolicy, Secret, Selector, Storage};

use super::secrets::{SecretObject, find};
use super::{Failure, common, options};
use crate::disk::files::{Files, recognise, storage};
use crate::disk::lock::{LockError, Use};

/// What qemu-img takes a name for that begins so.
const PROTOCOLS: [&str; 16] = [
    "blkdebug:",
    "blkverify:",
    "fat:",
    "ftp:",
    "ftps:",
    "host_device:",
    "http:",
    "https:",
    "iscsi:",
    "json:",
    "nbd:",
    "nfs:",
    "null-co:",
    "rbd:",
    "ssh:",
    "vvfat:",
];

/// Which files may be opened because an image names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum References {
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

    /// A password for an encrypted image: secret,id=NAME,file=FILE, or data=TEXT for tests
    #[arg(long, value_name = "OBJECT", value_parser = SecretObject::parse)]
    pub(super) object: Vec<SecretObject>,

    /// Images are named by options: driver=qcow2,file.filename=FILE,encrypt.key-secret=NAME, and
    /// backing.encrypt.key-secret=NAME for the file beneath
    #[arg(long)]
    image_opts: bool,
}

/// An image that the command line names.
#[derive(Clone, Debug)]
pub(super) struct Named {
    pub(super) path: PathBuf,
    pub(super) format: Option<Format>,
    /// Passwords of the encrypted files of its chain, from the top down, with how deep they are.
    pub(super) secrets: Vec<(usize, Secret)>,
    /// The snapshot of it that is meant.
    pub(super) snapshot: Option<Selector>,
}

impl Named {
    /// An image without passwords.
    pub(super) fn path(path: &Path, format: Option<Format>) -> Self {
        Self {
            path: path.to_owned(),
            format,
            secrets: Vec::new(),
            snapshot: None,
        }
    }

    /// The passwords that are left for a file so deep in the chain and those beneath it.
    pub(super) fn secrets_from(&self, depth: usize) -> Vec<(usize, Secret)> {
        let mut secrets = self.secrets.clone();
        secrets.retain(|(at, _)| *at >= depth);
        secrets
    }

    /// The password of the file itself.
    fn secrets_at_top(&self) -> Vec<(usize, Secret)> {
        let mut secrets = self.secrets.clone();
        secrets.retain(|(at, _)| *at == 0);
        secrets
    }
}

impl Access {
    /// What the command line means by `image`.
    pub(super) fn name(&self, image: &Path, format: Option<Format>) -> Result<Named, Failure> {
        if self.image_opts {
            self.name_by_options(image, format)
        } else {
            Ok(Named::path(image, format))
        }
    }

    /// What is meant by options in the place of a path.
    pub(super) fn name_by_options(
        &self,
        image: &Path,
        format: Option<Format>,
    ) -> Result<Named, Failure> {
        let text = image
            .to_str()
            .ok_or_else(|| usage("its options are not UTF-8"))?;
        let mut named = Named::path(Path::new(""), format);
        for (key, value) in options::split(text) {
            match key.as_str() {
                "driver" => named.format = Some(common::format(&value).map_err(usage)?),
                "file.filename" | "filename" => named.path = value.into(),
                "file.driver" if value == "file" => {}
                key if key.ends_with("encrypt.format") => {}
                key => {
                    let depth = key.strip_suffix("encrypt.key-secret").and_then(|prefix| {
                        let parts: Vec<_> = prefix.split_terminator('.').collect();
                        let beneath = parts.iter().all(|part| *part == "backing");
                        beneath.then_some(parts.len())
                    });
                    let depth =
                        depth.ok_or_else(|| usage(format!("--image-opts has no {key:?}")))?;
                    named.secrets.push((depth, find(&self.object, &value)?));
                }
            }
        }
        if named.path.as_os_str().is_empty() {
            return Err(usage("--image-opts needs file.filename=FILE"));
        }
        named.secrets.sort_by_key(|(depth, _)| *depth);
        Ok(named)
    }

    /// How an image is used that is only read.
    pub(super) fn reading(&self) -> Use {
        if self.force_share {
            Use::Look
        } else {
            Use::Read
        }
    }

    /// Opens and locks the file of an image, and says which format it has.
    pub(super) fn file(
        &self,
        named: &Named,
        how: Use,
    ) -> Result<(Arc<dyn Storage>, Format), Failure> {
        must_be_a_file(&named.path)?;
        let storage = storage(&named.path, how).map_err(|error| {
            let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
            match (how, cause) {
                (Use::Read, Some(LockError::Written(_))) => Failure::Busy {
                    path: named.path.clone(),
                    source: error,
                },
                _ => failed(&named.path, error),
            }
        })?;
        let format = match named.format {
            Some(format) => format,
            None => recognise(&named.path, &*storage)?,
        };
        Ok((storage, format))
    }

    /// Opens an image and what is beneath it.
    pub(super) fn open(&self, named: &Named, how: Use) -> Result<Image, Failure> {
        let (file, format) = self.file(named, how)?;
        let options = self.options(named, format, how != Use::Write);
        self.open_file(&named.path, file, &options)
    }

    /// Opens an image without what is beneath it. To be looked at it needs neither its password nor
    /// its data file.
    pub(super) fn open_alone(&self, named: &Named, how: Use) -> Result<Image, Failure> {
        let (file, format) = self.file(named, how)?;
        let named = Named {
            secrets: named.secrets_at_top(),
            ..named.clone()
        };
        if how == Use::Write {
            let files = Files::under(file, self.reading());
            let options = self.options(&named, format, false);
            return Ok(Image::open_alone(&named.path, &options, &files)?);
        }
        let options = OpenOptions {
            stay_locked: named.secrets.is_empty(),
            ..self.options(&named, format, true)
        };
        Ok(Image::open_over(&named.path, file, &options, None)?)
    }

    /// The same as [`open`](Self::open) of a file that is open already.
    pub(super) fn open_file(
        &self,
        path: &Path,
        file: Arc<dyn Storage>,
        options: &OpenOptions,
    ) -> Result<Image, Failure> {
        let files = Files::under(file, self.reading());
        Ok(Image::open(path, options, &files)?)
    }

    /// How an image is opened.
    pub(super) fn options(&self, named: &Named, format: Format, read_only: bool) -> OpenOptions {
        OpenOptions {
            read_only,
            references: match self.references {
                References::None => ReferencePolicy::None,
                References::OwnFolder => ReferencePolicy::OwnFolder,
                References::Any => ReferencePolicy::Any,
            },
            secrets: named
                .secrets
                .iter()
                .map(|(_, secret)| secret.clone())
                .collect(),
            snapshot: named.snapshot.clone(),
            ..OpenOptions::new(format)
        }
    }
}

/// Refuses what qemu-img opens and is no file.
pub(super) fn must_be_a_file(path: &Path) -> Result<(), Failure> {
    let name = path.to_string_lossy();
    if let Some(protocol) = PROTOCOLS
        .iter()
        .find(|protocol| name.starts_with(**protocol))
    {
        return Err(usage(format!(
            "{name}: images are files here, and {protocol} is none: qemu-img knows it; a file of such a \
             name is ./{name}"
        )));
    }
    if path
        .metadata()
        .is_ok_and(|file| file.file_type().is_block_device())
    {
        return Err(usage(format!(
            "{name} is a block device, and images are files here: copy it to one (cp --sparse=always), or \
             use qemu-img"
        )));
    }
    Ok(())
}

fn usage(text: impl Into<String>) -> Failure {
    Failure::Usage(text.into())
}

/// A file that cannot be opened.
pub(super) fn failed(path: &Path, source: std::io::Error) -> Failure {
    let path = path.to_owned();
    crate::disk::Error::Open { path, source }.into()
}
