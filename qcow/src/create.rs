//! Making a new image.

use std::path::Path;
use std::sync::Arc;

use crate::addr::Geometry;
use crate::chain::Format;
use crate::error::{Error, Result};
use crate::extension;
use crate::header::{MAX_BACKING_NAME, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, V3_FULL_LENGTH};
use crate::host::Host;
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
    let header = header(geometry, order, options, l1_entries).map_err(wrong)?;
    let layout = layout(geometry, order, l1_entries)
        .ok_or_else(|| wrong("the refcount table would be too large".into()))?;

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
    let mut header = header;
    let l1_offset = (1 + layout.table + layout.blocks) * cluster;
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(field) = header.get_mut(at..at + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    };
    put(40, &l1_offset.to_be_bytes());
    put(48, &cluster.to_be_bytes());
    put(56, &(layout.table as u32).to_be_bytes());
    host.write(0, &header)?;
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
        let table = blocks.div_ceil(geometry.l2_entries());
        if table * geometry.cluster() > MAX_REFCOUNT_TABLE_BYTES {
            return None;
        }
        if blocks <= layout.blocks && table <= layout.table {
            return Some(layout);
        }
        (layout.blocks, layout.table) = (blocks.max(layout.blocks), table.max(layout.table));
    }
}

/// The header's bytes but for where tables are, with the extensions and the backing file's name.
fn header(
    geometry: Geometry,
    order: u32,
    options: &CreateOptions,
    l1_entries: u64,
) -> Result<Vec<u8>, String> {
    let (name, format) = match &options.backing {
        None => ("", None),
        Some((name, format)) => (name.as_str(), Some(format.name())),
    };
    let extensions = extension::for_new_image(format);
    let name_at = V3_FULL_LENGTH as usize + extensions.len();
    if options.backing.is_some() && name.is_empty() {
        return Err("the backing file has no name".into());
    }
    let most = (geometry.cluster() as usize - name_at).min(MAX_BACKING_NAME as usize);
    if name.len() > most {
        let len = name.len();
        return Err(format!(
            "the backing file's name has {len} bytes, it can have {most}"
        ));
    }
    let mut bytes = b"QFI\xfb".to_vec();
    bytes.extend(3_u32.to_be_bytes());
    bytes.extend((if name.is_empty() { 0 } else { name_at as u64 }).to_be_bytes());
    bytes.extend((name.len() as u32).to_be_bytes());
    bytes.extend(geometry.cluster_bits().to_be_bytes());
    bytes.extend(options.size.to_be_bytes());
    bytes.extend(0_u32.to_be_bytes()); // no encryption
    bytes.extend((l1_entries as u32).to_be_bytes());
    // Tables' places, snapshots and features: zeros, for now or for good.
    bytes.resize(96, 0);
    bytes.extend(order.to_be_bytes());
    bytes.extend(V3_FULL_LENGTH.to_be_bytes());
    bytes.resize(V3_FULL_LENGTH as usize, 0); // compression type zlib
    bytes.extend(extensions);
    bytes.extend(name.as_bytes());
    Ok(bytes)
}
