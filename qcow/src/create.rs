//! Making a new image.

use std::path::Path;
use std::sync::Arc;

use crate::addr::Geometry;
use crate::chain::Format;
use crate::compress::Method;
use crate::error::{Error, Result};
use crate::extension::{BACKING_FORMAT, Extensions};
use crate::header::{Header, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES};
use crate::host::Host;
use crate::image::Backing;
use crate::refcount;
use crate::storage::Storage;

/// What a new image is to be. It is always version 3.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Size of the disk in bytes, a multiple of 512. It may be larger than the backing file's:
    /// what lies past that reads as zeros.
    pub size: u64,
    /// Bytes in a cluster: a power of two from 512 to 2 MiB.
    pub cluster_size: u32,
    /// Width of a refcount: 1, 2, 4, 8, 16, 32 or 64.
    pub refcount_bits: u32,
    /// Name and format of the backing file, as they are to be recorded.
    pub backing: Option<(String, Format)>,
}

impl CreateOptions {
    /// 64 KiB clusters, 16-bit refcounts, no backing file.
    pub fn new(size: u64) -> Self {
        CreateOptions {
            size,
            cluster_size: 65536,
            refcount_bits: 16,
            backing: None,
        }
    }
}

/// Where things are in a new image, in clusters. The header is cluster 0.
struct Layout {
    table: u64,
    blocks: u64,
    l1: u64,
}

impl Layout {
    fn clusters(&self) -> u64 {
        1 + self.table + self.blocks + self.l1
    }
}

/// Writes an empty image to `storage`, known as `path` in messages, whose content is replaced, and
/// makes it durable. The header comes last: a crash leaves a file that is no image at all.
pub fn create(path: &Path, storage: Arc<dyn Storage>, options: &CreateOptions) -> Result<()> {
    let host = Host {
        path: path.to_owned(),
        storage,
    };
    let wrong = |reason: String| Error::Options {
        file: path.to_owned(),
        reason,
    };
    let geometry = options
        .cluster_size
        .is_power_of_two()
        .then(|| Geometry::new(options.cluster_size.trailing_zeros()))
        .flatten()
        .ok_or_else(|| {
            wrong(format!(
                "the cluster size is {}, it can be a power of two from 512 to 2 MiB",
                options.cluster_size
            ))
        })?;
    if !options.refcount_bits.is_power_of_two() || options.refcount_bits > 64 {
        let bits = options.refcount_bits;
        return Err(wrong(format!(
            "refcounts of {bits} bits: it can be 1, 2, 4, 8, 16, 32 or 64"
        )));
    }
    let order = options.refcount_bits.trailing_zeros();
    let cluster = geometry.cluster();
    if options.size > i64::MAX as u64 || !options.size.is_multiple_of(512) {
        return Err(wrong(format!(
            "the size {} is no multiple of 512",
            options.size
        )));
    }
    // A table without an entry would have no place.
    let l1_entries = geometry.l1_entries(options.size).max(1);
    if l1_entries * 8 > MAX_L1_BYTES {
        let most = MAX_L1_BYTES / 8 * geometry.l2_entries() * cluster;
        return Err(wrong(format!(
            "clusters of {cluster} bytes reach {most} bytes, no more"
        )));
    }
    let layout = layout(geometry, order, l1_entries)
        .ok_or_else(|| wrong("the refcount table would be too large".into()))?;
    if let Some((name, _)) = &options.backing
        && name.is_empty()
    {
        return Err(wrong("the backing file has no name".into()));
    }
    let mut header = header(geometry, order, options, l1_entries, &layout);
    let bytes = header.encode().map_err(wrong)?;

    host.set_len(0)?;
    host.set_len(layout.clusters() * cluster)?;
    let per_block = (cluster * 8) >> order;
    let mut table = Vec::new();
    for index in 0..layout.blocks {
        let at = (1 + layout.table + index) * cluster;
        let mut block = vec![0; cluster as usize];
        let used = layout
            .clusters()
            .saturating_sub(index * per_block)
            .min(per_block);
        for i in 0..used {
            refcount::set(&mut block, i, order, 1);
        }
        host.write(at, &block)?;
        table.extend(at.to_be_bytes());
    }
    host.write(cluster, &table)?;
    host.sync()?;
    host.write(0, &bytes)?;
    host.sync()
}

/// How many clusters the refcount table and blocks take that count everything, themselves too.
fn layout(geometry: Geometry, order: u32, l1_entries: u64) -> Option<Layout> {
    let per_block = (geometry.cluster() * 8) >> order;
    let l1 = geometry.clusters(l1_entries * 8);
    let mut layout = Layout {
        table: 1,
        blocks: 1,
        l1,
    };
    loop {
        let blocks = layout.clusters().div_ceil(per_block);
        let table = blocks.div_ceil(geometry.table_entries());
        if table * geometry.cluster() > MAX_REFCOUNT_TABLE_BYTES {
            return None;
        }
        if blocks <= layout.blocks && table <= layout.table {
            return Some(layout);
        }
        (layout.blocks, layout.table) = (blocks.max(layout.blocks), table.max(layout.table));
    }
}

/// The header of a new image.
fn header(
    geometry: Geometry,
    order: u32,
    options: &CreateOptions,
    l1_entries: u64,
    layout: &Layout,
) -> Header {
    let mut extensions = Extensions::default();
    let backing = options.backing.clone().map(|(name, format)| {
        extensions.set(BACKING_FORMAT, Some(format.name().into()));
        let format = Some(format);
        Backing { name, format }
    });
    let cluster = geometry.cluster();
    Header {
        version: 3,
        geometry,
        size: options.size,
        l1_offset: (1 + layout.table + layout.blocks) * cluster,
        l1_entries: l1_entries as usize,
        refcount_table_offset: cluster,
        refcount_table_clusters: layout.table,
        refcount_order: order,
        snapshots: 0,
        snapshots_offset: 0,
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        compression: Method::Zlib,
        backing,
        name_offset: 0,
        tail: vec![0; 8],
        extensions,
    }
}
