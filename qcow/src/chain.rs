//! Backing chains: which names are followed, and who opens them.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::crypt::Keys;
use crate::error::{Error, Result};
use crate::image::Backing;
use crate::layer::{Layer, Raw};
use crate::options::OpenOptions;
use crate::qcow2::Qcow2;
use crate::snapshot::Selector;
use crate::storage::{Identity, Storage};

/// Files in a chain, at most.
const MAX_DEPTH: usize = 512;
/// What a file's cache gets in any case.
const LEAST_CACHE_BYTES: usize = 64 << 10;

/// A format that was named, never guessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// qcow2, version 2 or 3.
    Qcow2,
    /// The bytes of the disk as they are.
    Raw,
}

impl Format {
    /// The name that image headers and command lines use.
    pub fn name(self) -> &'static str {
        match self {
            Format::Qcow2 => "qcow2",
            Format::Raw => "raw",
        }
    }

    /// The format of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Format::Qcow2, Format::Raw]
            .into_iter()
            .find(|format| format.name() == name)
    }
}

/// Opens files for a chain: the only way in which this crate reaches the file system by name.
pub trait Opener {
    /// Opens `path`, and locks it as its use asks. Backing files are never opened `writable`.
    fn open(&self, path: &Path, writable: bool) -> io::Result<Arc<dyn Storage>>;

    /// The absolute path without symbolic links, by which the policy judges where a file is.
    fn canonicalize(&self, path: &Path) -> io::Result<PathBuf> {
        std::fs::canonicalize(path)
    }
}

/// Which backing files an image may name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReferencePolicy {
    /// None: an image with a backing file is refused.
    None,
    /// Those in the folder of the image that names them, or below it, symbolic links resolved.
    #[default]
    OwnFolder,
    /// Any.
    Any,
}

/// Opens the image at `path` and, as the policy allows, what lies beneath it: top first.
pub(crate) fn open(
    path: &Path,
    options: &OpenOptions,
    opener: &dyn Opener,
) -> Result<(Vec<Layer>, Option<Backing>)> {
    let mut layers = Vec::new();
    let mut identities: Vec<Identity> = Vec::new();
    let mut budget = Budget::new(options);
    let mut recorded = None;
    let (mut path, mut format, mut writable) =
        (path.to_owned(), options.format, !options.read_only);
    loop {
        let storage = opener
            .open(&path, writable)
            .map_err(Error::io(&path, || "open".into()))?;
        let identity = storage
            .identity()
            .map_err(Error::io(&path, || "get the inode of".into()))?;
        let looped = identity.is_some_and(|identity| identities.contains(&identity));
        identities.extend(identity);
        let (layer, backing) = open_layer(
            &path,
            storage,
            format,
            writable,
            options.max_file_size,
            options.snapshot.as_ref().filter(|_| layers.is_empty()),
            &mut budget,
        )?;
        layers.push(layer);
        if layers.len() == 1 {
            recorded.clone_from(&backing);
        }
        let Some(backing) = backing else {
            budget.finish(&layers)?;
            return Ok((layers, recorded));
        };
        let refuse = |reason: String| {
            Err(Error::Reference {
                file: path.clone(),
                name: backing.name.clone(),
                reason,
            })
        };
        if looped {
            return refuse("the chain comes back to a file that it has passed: a loop".into());
        }
        if layers.len() >= MAX_DEPTH {
            return refuse(format!(
                "the chain has more than {MAX_DEPTH} files: join some of them"
            ));
        }
        let Some(next_format) = backing.format.or(options.backing_format) else {
            return refuse(
                "its format is not recorded and is never guessed: name it, or record it with \
                 `qemu-img rebase -u -b NAME -F FORMAT`"
                    .into(),
            );
        };
        path = match locate(&path, &backing.name, options.references, opener) {
            Ok(path) => path,
            Err(Refused::Outside(folder)) => {
                let name = backing.name;
                return Err(Error::Outside {
                    file: path,
                    name,
                    folder,
                });
            }
            Err(Refused::Because(reason)) => return refuse(reason),
        };
        (format, writable) = (next_format, false);
    }
}

/// What the files of a chain share: memory, and what opens them.
pub(crate) struct Budget {
    cache: usize,
    /// Bytes that are left for L1 tables, which are in memory whole.
    pub(crate) l1: u64,
    pub(crate) keys: Keys,
}

impl Budget {
    /// What the L1 tables of a chain may take together.
    pub(crate) const L1_BYTES: u64 = 256 << 20;

    pub(crate) fn new(options: &OpenOptions) -> Self {
        Budget {
            cache: options.cache_bytes,
            l1: Self::L1_BYTES,
            keys: Keys::new(options),
        }
    }

    /// Refuses secrets that no layer took.
    pub(crate) fn finish(self, layers: &[Layer]) -> Result<()> {
        layers
            .first()
            .map_or(Ok(()), |top| self.keys.finish(top.host()))
    }

    /// Half of what is left, so that the top image has the most.
    pub(crate) fn next_cache(&mut self) -> usize {
        self.cache /= 2;
        self.cache.max(LEAST_CACHE_BYTES)
    }
}

/// Makes a layer of an open file.
pub(crate) fn open_layer(
    path: &Path,
    storage: Arc<dyn Storage>,
    format: Format,
    writable: bool,
    max_file_size: Option<u64>,
    snapshot: Option<&Selector>,
    budget: &mut Budget,
) -> Result<(Layer, Option<Backing>)> {
    let refuse = |feature: &str, advice| {
        Err(Error::Unsupported {
            file: path.to_owned(),
            feature: feature.into(),
            advice,
        })
    };
    if snapshot.is_some() && writable {
        let advice = "open it read-only, or apply the snapshot first";
        return refuse("a snapshot, which is to be written", advice);
    }
    match format {
        Format::Raw if snapshot.is_some() => {
            let advice = "only qcow2 has snapshots";
            refuse("the raw format, of which a snapshot is asked for", advice)
        }
        Format::Raw => Ok((Layer::Raw(Raw::open(path, storage, writable)?), None)),
        Format::Qcow2 => {
            let qcow2 = Qcow2::open(path, storage, writable, max_file_size, snapshot, budget)?;
            let backing = qcow2.state().tables.header.backing.clone();
            Ok((Layer::Qcow2(Box::new(qcow2)), backing))
        }
    }
}

/// Why a name is not followed.
enum Refused {
    /// It leads out of this folder.
    Outside(PathBuf),
    Because(String),
}

/// The path that `name` means in the image at `referrer`, or why it is not followed.
fn locate(
    referrer: &Path,
    name: &str,
    policy: ReferencePolicy,
    opener: &dyn Opener,
) -> Result<PathBuf, Refused> {
    if policy == ReferencePolicy::None {
        let reason = "images with a backing file are not allowed here";
        return Err(Refused::Because(reason.into()));
    }
    if name
        .split('/')
        .next()
        .is_some_and(|first| first.contains(':'))
    {
        let reason = "only files are followed, no `protocol:...` (a file whose name has a colon is \
                      recorded as `./NAME`)";
        return Err(Refused::Because(reason.into()));
    }
    let folder = match referrer.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let path = folder.join(name);
    if policy == ReferencePolicy::Any {
        return Ok(path);
    }
    let real = |path: &Path| {
        opener
            .canonicalize(path)
            .map_err(|error| Refused::Because(format!("cannot find {path:?}: {error}")))
    };
    let (real_path, real_folder) = (real(&path)?, real(folder)?);
    if real_path.starts_with(&real_folder) {
        Ok(real_path)
    } else {
        Err(Refused::Outside(real_folder))
    }
}
