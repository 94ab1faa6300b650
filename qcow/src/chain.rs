//! Backing chains: what is opened, by whom, and in which order.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::crypt::Keys;
use crate::error::{Error, Reference, Result};
use crate::host::Host;
use crate::image::Backing;
use crate::layer::{Layer, Raw};
use crate::options::OpenOptions;
use crate::qcow2::Qcow2;
use crate::reference::Link;
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

/// Which backing and data files an image may name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReferencePolicy {
    /// None: an image with a backing or a data file is refused.
    None,
    /// Those in the folder of the image that names them, or below it, symbolic links resolved.
    #[default]
    OwnFolder,
    /// Any.
    Any,
}

/// Opens the image at `path` and, as the policy allows, what lies `beneath` it: top first.
pub(crate) fn open(
    path: &Path,
    options: &OpenOptions,
    opener: &dyn Opener,
    beneath: bool,
) -> Result<(Vec<Layer>, Option<Backing>)> {
    let mut layers = Vec::new();
    let mut seen = Seen::default();
    let mut budget = Budget::new(options);
    let mut recorded = None;
    let mut named_by: Option<Link> = None;
    let (mut path, mut format, mut writable) =
        (path.to_owned(), options.format, !options.read_only);
    loop {
        let host = open_file(&path, writable, opener)?;
        if let (false, Some(link)) = (seen.is_new(&host)?, &named_by) {
            return Err(link.refuse("the chain comes back to a file that it has passed: a loop"));
        }
        let (mut layer, backing) = open_layer(
            &path,
            host.storage,
            format,
            writable,
            options.max_file_size,
            options.snapshot.as_ref().filter(|_| layers.is_empty()),
            &mut budget,
        )?;
        if let Some(name) = layer.missing_data() {
            let link = Link::new(&path, Reference::DataFile, name);
            let supplied = options.data_file.clone().filter(|_| layers.is_empty());
            let data = match supplied {
                Some(storage) => link.supplied(storage),
                None => open_file(&link.locate(options.references, opener)?, writable, opener)?,
            };
            if !seen.is_new(&data)? {
                return Err(link.refuse("it is one of the chain's other files"));
            }
            layer.attach_data(data, &link)?;
        }
        layers.push(layer);
        if layers.len() == 1 {
            recorded.clone_from(&backing);
        }
        let Some(backing) = backing.filter(|_| beneath) else {
            budget.finish(&layers)?;
            return Ok((layers, recorded));
        };
        let link = Link::new(&path, Reference::BackingFile, &backing.name);
        if layers.len() >= MAX_DEPTH {
            return Err(link.refuse(&format!(
                "the chain has more than {MAX_DEPTH} files: join some of them"
            )));
        }
        let Some(next_format) = backing.format.or(options.backing_format) else {
            return Err(link.refuse(
                "its format is not recorded and is never guessed: name it, or record it with \
                 `cowshed img rebase -u -b NAME -F FORMAT`",
            ));
        };
        path = link.locate(options.references, opener)?;
        (format, writable) = (next_format, false);
        named_by = Some(link);
    }
}

fn open_file(path: &Path, writable: bool, opener: &dyn Opener) -> Result<Host> {
    let storage = opener
        .open(path, writable)
        .map_err(Error::io(path, || "open".into()))?;
    let path = path.to_owned();
    Ok(Host { path, storage })
}

/// The files of a chain so far.
#[derive(Default)]
struct Seen(Vec<Identity>);

impl Seen {
    /// Whether a file is not among them yet; it is from now on.
    fn is_new(&mut self, host: &Host) -> Result<bool> {
        let identity = host
            .storage
            .identity()
            .map_err(Error::io(&host.path, || "get the inode of".into()))?;
        let new = identity.is_none_or(|identity| !self.0.contains(&identity));
        self.0.extend(identity);
        Ok(new)
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
