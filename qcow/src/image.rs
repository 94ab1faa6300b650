//! One disk: an image and what lies beneath it.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use crate::chain::{self, Budget, Format, Opener};
use crate::decompressed::Decompressed;
use crate::error::{Error, Reference, Result};
use crate::layer::{Layer, walk, walk_with};
use crate::options::OpenOptions;
use crate::pin::Pin;
use crate::plan::{self, Extent, Plan};
use crate::qcow2::{Load, Place};
use crate::reference::Link;
use crate::storage::{Identity, Storage};

/// The backing file that an image's header records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The name as recorded, relative to the image's folder.
    pub name: String,
    /// The recorded format, if there is one.
    pub format: Option<Format>,
}

/// One disk: an image and what lies beneath it.
///
/// Methods take `&self` and may be called from several threads. Requests that overlap in time
/// and place may be ordered either way.
pub struct Image {
    /// Top first, never empty.
    pub(crate) layers: Vec<Layer>,
    backing: Option<Backing>,
    pub(crate) decompressed: Decompressed,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let files: Vec<_> = self.layers.iter().map(|layer| &layer.host().path).collect();
        f.debug_struct("Image")
            .field("files", &files)
            .field("size", &self.size())
            .finish()
    }
}

impl Image {
    /// Opens the image at `path` and the chain beneath it.
    pub fn open(path: &Path, options: &OpenOptions, opener: &dyn Opener) -> Result<Self> {
        Self::open_with(path, options, opener, true)
    }

    /// Opens the image at `path` with its data file, and not what is beneath it. If that is
    /// something, the disk can be neither read nor written, but all else can be changed.
    pub fn open_alone(path: &Path, options: &OpenOptions, opener: &dyn Opener) -> Result<Self> {
        Self::open_with(path, options, opener, false)
    }

    fn open_with(
        path: &Path,
        options: &OpenOptions,
        opener: &dyn Opener,
        beneath: bool,
    ) -> Result<Self> {
        let (layers, backing) = chain::open(path, options, opener, beneath)?;
        Ok(Image {
            layers,
            backing,
            decompressed: Decompressed::default(),
        })
    }

    /// Opens `storage`, known as `path` in messages, over `base`, which is only read, however it was
    /// opened. The names that the header records are not followed: a data file is in `options`. An
    /// image that records a base and gets none can be looked at, but neither read nor written; one
    /// that records none takes no base.
    pub fn open_over(
        path: &Path,
        storage: Arc<dyn Storage>,
        options: &OpenOptions,
        base: Option<Image>,
    ) -> Result<Self> {
        let mut budget = Budget::new(options);
        let (mut top, backing) = chain::open_layer(
            path,
            storage,
            options.format,
            !options.read_only,
            options.max_file_size,
            options.snapshot.as_ref(),
            &mut budget,
        )?;
        budget.finish(std::slice::from_ref(&top))?;
        if backing.is_none() && base.is_some() {
            return Err(Link::new(path, Reference::BackingFile, "").refuse("it names none"));
        }
        if let Some(name) = top.missing_data() {
            let link = Link::new(path, Reference::DataFile, name);
            match &options.data_file {
                Some(storage) => top.attach_data(link.supplied(Arc::clone(storage)), &link)?,
                None if options.read_only => {}
                None => return Err(link.refuse("it was opened without, to be written")),
            }
        }
        let mut layers = vec![top];
        layers.extend(base.into_iter().flat_map(|base| base.layers));
        Ok(Image {
            layers,
            backing,
            decompressed: Decompressed::default(),
        })
    }

    /// The top image, for messages.
    pub(crate) fn path(&self) -> &Path {
        self.layers
            .first()
            .map_or(Path::new(""), |layer| &layer.host().path)
    }

    /// The disk's size in bytes, a multiple of 512.
    pub fn size(&self) -> u64 {
        self.layers.first().map_or(0, Layer::size)
    }

    /// Bytes in a cluster of the top image; 512 for a raw file.
    pub fn cluster_size(&self) -> u32 {
        match self.layers.first() {
            Some(Layer::Qcow2(qcow2)) => qcow2.geometry.cluster() as u32,
            _ => 512,
        }
    }

    /// Bytes that the top image allocates and gives back at a time: a subcluster, or a cluster
    /// where there are none; 512 for a raw file.
    pub fn subcluster_size(&self) -> u32 {
        match self.layers.first() {
            Some(Layer::Qcow2(qcow2)) => qcow2.geometry.subcluster() as u32,
            _ => 512,
        }
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        !self.layers.first().is_some_and(Layer::writable)
    }

    /// What the top image's header records as its backing file.
    pub fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// The data file that the top image's header records, relative to the image's folder: it has
    /// the guest's bytes, and the image the tables.
    pub fn data_file(&self) -> Option<String> {
        match self.layers.first()? {
            Layer::Qcow2(qcow2) => qcow2.state().tables.header.data_file().map(str::to_owned),
            Layer::Raw(_) => None,
        }
    }

    /// Files in the chain.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    /// Which file a layer's bytes are in, if it can be told.
    pub(crate) fn identity(&self, depth: usize) -> Option<Identity> {
        let data = self.layers.get(depth)?.data();
        data.storage.identity().ok().flatten()
    }

    /// Whether this is one of the chain's files, data files among them.
    pub fn has_file(&self, file: Identity) -> bool {
        let hosts = self.layers.iter().flat_map(|l| [l.host(), l.data()]);
        hosts
            .filter_map(|host| host.storage.identity().ok().flatten())
            .any(|identity| identity == file)
    }

    /// The format of a file of the chain, 0 for the top.
    pub fn format(&self, depth: usize) -> Option<Format> {
        Some(match self.layers.get(depth)? {
            Layer::Qcow2(_) => Format::Qcow2,
            Layer::Raw(_) => Format::Raw,
        })
    }

    /// The paths of the chain's files, the top one first.
    pub fn paths(&self) -> Vec<&Path> {
        self.layers
            .iter()
            .map(|layer| &*layer.host().path)
            .collect()
    }

    /// Length of the top image's file in bytes.
    pub fn file_len(&self) -> Result<u64> {
        self.layers
            .first()
            .map_or(Ok(0), |layer| layer.host().len())
    }

    /// Bytes that the host keeps for the top image's file.
    pub fn allocated(&self) -> Result<u64> {
        self.layers
            .first()
            .map_or(Ok(0), |layer| layer.host().allocated())
    }

    /// The files that extents name by index: those that have the guest's bytes, the top image's
    /// first. Empty if one of them is no file.
    pub fn files(&self) -> Vec<BorrowedFd<'_>> {
        let files: Option<_> = self
            .layers
            .iter()
            .map(|layer| layer.data().storage.file())
            .collect();
        files.unwrap_or_default()
    }

    /// Where `len` bytes at `offset` are to be read from. Tables may be loaded from disk.
    pub fn plan_read(&self, offset: u64, len: u64) -> Result<Plan> {
        self.plan_read_with(offset, len, Load::Now)
    }

    /// The same, but [`Plan::Slow`] where a table would have to be loaded.
    pub fn plan_read_at_once(&self, offset: u64, len: u64) -> Result<Plan> {
        self.plan_read_with(offset, len, Load::Never)
    }

    fn plan_read_with(&self, offset: u64, len: u64, load: Load) -> Result<Plan> {
        self.check_range(offset, len)?;
        let pin = self.pin();
        let mut extents = Vec::new();
        let mut fast = true;
        let known = walk_with(&self.layers, offset, len, load, &mut |file, run| {
            let len = run.len;
            match run.place {
                Place::Data(offset) => {
                    fast &= self.layers.get(file).is_some_and(Layer::is_direct);
                    plan::push(&mut extents, Extent::File { file, offset, len });
                }
                Place::Zero | Place::Below => plan::push(&mut extents, Extent::Zero { len }),
                Place::Compressed(..) => fast = false,
            }
            Ok(())
        })?;
        Ok(if fast && known {
            Plan::Fast { extents, pin }
        } else {
            Plan::Slow
        })
    }

    /// Fills `buf` from `offset` of the disk.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        let _pin = self.pin();
        let (mut at, mut rest) = (offset, buf);
        walk(
            &self.layers,
            offset,
            rest.len() as u64,
            &mut |index, run| {
                let (part, after) = std::mem::take(&mut rest).split_at_mut(run.len as usize);
                rest = after;
                let guest = at;
                at += run.len;
                match (self.layers.get(index), run.place) {
                    (Some(layer), Place::Data(host)) => layer.read(guest, host, part),
                    (Some(Layer::Qcow2(qcow2)), Place::Compressed(place, within)) => {
                        self.decompressed.read(index, qcow2, place, within, part)
                    }
                    _ => {
                        part.fill(0);
                        Ok(())
                    }
                }
            },
        )
    }

    /// Keeps what the top image frees from being reused.
    pub(crate) fn pin(&self) -> Pin {
        match self.layers.first() {
            Some(Layer::Qcow2(qcow2)) => qcow2.pins.pin(),
            _ => Pin::none(),
        }
    }

    /// Whether there is such a range, and all that it takes to read and write it.
    pub(crate) fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        if let (Some(backing), [top]) = (&self.backing, &self.layers[..]) {
            let link = Link::new(&top.host().path, Reference::BackingFile, &backing.name);
            return Err(link.refuse("it was opened without"));
        }
        let size = self.size();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::OutOfRange { offset, len, size }),
        }
    }
}
