//! Reading the header: version, limits, features, in the order in which they depend on each other.

use super::{
    COMPRESSION_TYPE, CORRUPT, DATA_FILE, DIRTY, EXTENDED_L2, Encryption, Header, MAX_BACKING_NAME,
    MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, MAX_SNAPSHOTS, RAW_DATA, V2_LENGTH, V3_LENGTH,
    backing_format,
};
use crate::addr::{CLUSTER_BITS, Geometry, be32, be64};
use crate::compress::Compression;
use crate::error::{Result, Violation};
use crate::extension::{DATA_FILE_NAME, Extensions};
use crate::host::Host;
use crate::image::Backing;

/// Bytes that are read first: nearly every header ends there, long before its cluster does.
const FIRST_READ: usize = 4096;

/// Why a header is not one that this crate opens.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Invalid(Violation),
    Unsupported {
        feature: String,
        advice: &'static str,
    },
}

impl From<Violation> for Refusal {
    fn from(violation: Violation) -> Self {
        Refusal::Invalid(violation)
    }
}

/// Reads and checks a file's header.
pub(crate) fn read(host: &Host) -> Result<Header> {
    let header = read_unplaced(host)?;
    let placed = header.check_refcount_table(host.len()?);
    placed.map_err(|violation| host.invalid(violation))?;
    Ok(header)
}

/// The same, but for where the refcount table is: a repair makes a new one.
pub(crate) fn read_unplaced(host: &Host) -> Result<Header> {
    let refuse = |refusal| host.refuse(refusal);
    let len = host.len()?;
    let mut bytes = vec![0; FIRST_READ];
    host.read(0, &mut bytes)?;
    let geometry = identify(&bytes).map_err(refuse)?;
    let cluster = geometry.cluster() as usize;
    if cluster < FIRST_READ {
        bytes.truncate(cluster);
    } else if !ends_within(&bytes) {
        bytes.resize(cluster, 0);
        host.read(0, &mut bytes)?;
    }
    parse(&bytes, geometry, len).map_err(refuse)
}

/// Whether all of a header is in these bytes: its fields, its extensions, the backing file's name.
fn ends_within(bytes: &[u8]) -> bool {
    let name_end = be64(bytes, 8).checked_add(be32(bytes, 16).into());
    let area = bytes.get(length(bytes)..).unwrap_or_default();
    name_end.is_some_and(|end| end <= bytes.len() as u64) && Extensions::end_within(area)
}

/// Bytes of the fields, as the header says.
fn length(bytes: &[u8]) -> usize {
    match be32(bytes, 4) {
        2 => V2_LENGTH,
        _ => be32(bytes, 100) as usize,
    }
}

/// Checks what tells how long the header is: magic, version, cluster size.
fn identify(bytes: &[u8]) -> Result<Geometry, Refusal> {
    let magic = be32(bytes, 0);
    if magic != u32::from_be_bytes(*b"QFI\xfb") {
        let found = format!("{magic:#010x}");
        return Err(Violation::new("magic number", 0, found, "0x514649fb").into());
    }
    let version = be32(bytes, 4);
    if !(2..=3).contains(&version) {
        return Err(Violation::new("version", 4, version, "2 or 3").into());
    }
    let cluster_bits = be32(bytes, 20);
    Geometry::new(cluster_bits).ok_or_else(|| {
        let (least, most) = (CLUSTER_BITS.start(), CLUSTER_BITS.end());
        Violation::new(
            "cluster_bits",
            20,
            cluster_bits,
            format!("{least} to {most}"),
        )
        .into()
    })
}

fn parse(bytes: &[u8], geometry: Geometry, file_len: u64) -> Result<Header, Refusal> {
    let version = be32(bytes, 4);
    let v3 = version == 3;
    let on_v3 = |value: u64| if v3 { value } else { 0 };
    let cluster = geometry.cluster();

    let length = length(bytes);
    if v3 && (length < V3_LENGTH || length as u64 > cluster || !length.is_multiple_of(8)) {
        let expected = format!("a multiple of 8 from {V3_LENGTH} to {cluster}");
        return Err(Violation::new("header_length", 100, length, expected).into());
    }
    let name = backing_name(bytes, length, geometry)?;
    let area_end = name.as_ref().map_or(bytes.len(), |name| name.start);
    let area = bytes.get(length..area_end).unwrap_or_default();
    let extensions = Extensions::parse(area, length as u64)?;

    let incompatible = on_v3(be64(bytes, 72));
    let autoclear = on_v3(be64(bytes, 88));
    features(incompatible, &extensions)?;
    if incompatible & DATA_FILE != 0 {
        data_file(bytes, autoclear, &extensions)?;
    }
    let geometry = if incompatible & EXTENDED_L2 == 0 {
        geometry
    } else {
        geometry.extended().ok_or_else(|| {
            let (bits, expected) = (geometry.cluster_bits(), "14 to 21 with extended L2 entries");
            Violation::new("cluster_bits", 20, bits, expected)
        })?
    };
    let encryption = Encryption::parse(
        be32(bytes, 32),
        &extensions,
        length as u64,
        geometry,
        file_len,
    )?;
    let compression = compression(bytes, length, incompatible)?;
    let refcount_order = if v3 { be32(bytes, 96) } else { 4 };
    if refcount_order > 6 {
        return Err(Violation::new("refcount_order", 96, refcount_order, "0 to 6").into());
    }

    let size = be64(bytes, 24);
    if size > i64::MAX as u64 {
        return Err(Violation::new("size", 24, size, format!("at most {}", i64::MAX)).into());
    }
    let size = size - size % 512;
    let (l1_entries, l1_offset) = (be32(bytes, 36), be64(bytes, 40));
    let l1_bytes = u64::from(l1_entries) * 8;
    let needed = geometry.l1_entries(size);
    if l1_bytes > MAX_L1_BYTES || u64::from(l1_entries) < needed {
        let expected = format!("{needed} to {}", MAX_L1_BYTES / 8);
        return Err(Violation::new("l1_size", 36, l1_entries, expected).into());
    }
    placed(
        "l1_table_offset",
        40,
        l1_offset,
        l1_bytes,
        geometry,
        file_len,
    )?;

    let (table, table_clusters) = (be64(bytes, 48), u64::from(be32(bytes, 56)));

    let (snapshots, snapshots_offset) = (be32(bytes, 60), be64(bytes, 64));
    if snapshots > MAX_SNAPSHOTS {
        let expected = format!("at most {MAX_SNAPSHOTS}");
        return Err(Violation::new("nb_snapshots", 60, snapshots, expected).into());
    }
    if snapshots > 0 {
        placed(
            "snapshots_offset",
            64,
            snapshots_offset,
            40,
            geometry,
            file_len,
        )?;
    }

    let name_offset = name.as_ref().map_or(0, |name| name.start as u64);
    let backing = match name {
        None => None,
        Some(range) => {
            let start = range.start as u64;
            let name = String::from_utf8(bytes.get(range).unwrap_or_default().to_vec())
                .map_err(|_| Violation::new("backing file name", start, "no UTF-8", "UTF-8"))?;
            let format =
                backing_format(extensions.backing_format().as_deref()).map_err(|name| {
                    Refusal::Unsupported {
                        feature: format!("a backing file in the format {name:?}"),
                        advice: "convert it to qcow2 or raw with `qemu-img convert`",
                    }
                })?;
            Some(Backing { name, format })
        }
    };
    Ok(Header {
        version,
        geometry,
        size,
        l1_offset,
        l1_entries: l1_entries as usize,
        refcount_table_offset: table,
        refcount_table_clusters: table_clusters,
        refcount_order,
        snapshots,
        snapshots_offset,
        incompatible,
        compatible: on_v3(be64(bytes, 80)),
        autoclear,
        compression,
        encryption,
        backing,
        name_offset,
        tail: bytes.get(V3_LENGTH..length).unwrap_or_default().to_vec(),
        extensions,
    })
}

impl Header {
    /// Whether the refcount table has a size that it can have, and lies in a file of `file_len` bytes.
    pub(crate) fn check_refcount_table(&self, file_len: u64) -> Result<(), Violation> {
        let (cluster, clusters) = (self.geometry.cluster(), self.refcount_table_clusters);
        let most = MAX_REFCOUNT_TABLE_BYTES / cluster;
        if clusters == 0 || clusters > most {
            let expected = format!("1 to {most}");
            return Err(Violation::new(
                "refcount_table_clusters",
                56,
                clusters,
                expected,
            ));
        }
        let (offset, len) = (self.refcount_table_offset, clusters * cluster);
        placed(
            "refcount_table_offset",
            48,
            offset,
            len,
            self.geometry,
            file_len,
        )
    }
}

/// A table of `len` bytes must begin at a cluster, not at the header, and lie inside the file.
pub(super) fn placed(
    field: &str,
    at: u64,
    offset: u64,
    len: u64,
    geometry: Geometry,
    file_len: u64,
) -> Result<(), Violation> {
    if len == 0 {
        return Ok(());
    }
    let end = file_len
        .checked_next_multiple_of(geometry.cluster())
        .unwrap_or(u64::MAX);
    let fits = offset
        .checked_add(len)
        .is_some_and(|table_end| table_end <= end);
    if offset == 0 || geometry.within(offset) != 0 || !fits {
        let cluster = geometry.cluster();
        let expected = format!(
            "a multiple of {cluster} past the header with {len} bytes before the file's end at {file_len:#x}"
        );
        return Err(Violation::new(field, at, format!("{offset:#x}"), expected));
    }
    Ok(())
}

fn backing_name(
    bytes: &[u8],
    header_length: usize,
    geometry: Geometry,
) -> Result<Option<std::ops::Range<usize>>, Violation> {
    let (offset, len) = (be64(bytes, 8), be32(bytes, 16));
    if offset == 0 {
        return Ok(None);
    }
    let cluster = geometry.cluster();
    if offset < header_length as u64 || offset > cluster {
        let expected = format!("0, or {header_length} to {cluster}");
        return Err(Violation::new("backing_file_offset", 8, offset, expected));
    }
    let most = u64::from(MAX_BACKING_NAME).min(cluster - offset);
    if u64::from(len) > most {
        return Err(Violation::new(
            "backing_file_size",
            16,
            len,
            format!("at most {most}"),
        ));
    }
    Ok((len > 0).then_some(offset as usize..offset as usize + len as usize))
}

/// A data file must have a name, and excludes some of what images can have.
fn data_file(bytes: &[u8], autoclear: u64, extensions: &Extensions) -> Result<(), Violation> {
    let named = extensions
        .get(DATA_FILE_NAME)
        .is_some_and(|name| !name.is_empty() && str::from_utf8(name).is_ok());
    if !named {
        let (field, expected) = (
            "incompatible_features",
            "no data file (bit 2) without a name",
        );
        let value = format!("{:#x}", be64(bytes, 72));
        return Err(Violation::new(field, 72, value, expected));
    }
    let snapshots = be32(bytes, 60);
    if snapshots > 0 {
        let expected = "0 beside a data file";
        return Err(Violation::new("nb_snapshots", 60, snapshots, expected));
    }
    if autoclear & RAW_DATA != 0 && (be64(bytes, 8) != 0 || be32(bytes, 32) != 0) {
        let expected = "no raw data file (bit 1) beside a backing file or encryption";
        let value = format!("{autoclear:#x}");
        return Err(Violation::new("autoclear_features", 88, value, expected));
    }
    Ok(())
}

fn features(incompatible: u64, extensions: &Extensions) -> Result<(), Refusal> {
    let unsupported = |feature: String, advice| Err(Refusal::Unsupported { feature, advice });
    let known = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2;
    let unknown = incompatible & !known;
    if unknown != 0 {
        let bit = unknown.trailing_zeros();
        let name = extensions
            .incompatible_name(bit)
            .unwrap_or_else(|| "a feature without a name".into());
        return unsupported(
            format!("the incompatible feature bit {bit} ({name})"),
            "convert the image with a program that knows it",
        );
    }
    Ok(())
}

fn compression(bytes: &[u8], length: usize, incompatible: u64) -> Result<Compression, Refusal> {
    let kind = if length > V3_LENGTH {
        bytes.get(104).copied().unwrap_or(0)
    } else {
        0
    };
    match (kind, incompatible & COMPRESSION_TYPE != 0) {
        (0, false) => Ok(Compression::Zlib),
        (1, true) => Ok(Compression::Zstd),
        (0 | 1, _) => {
            let expected = "0 without and 1 with the incompatible feature bit 3";
            Err(Violation::new("compression_type", 104, kind, expected).into())
        }
        _ => Err(Refusal::Unsupported {
            feature: format!("compression type {kind}"),
            advice: "convert the image with `qemu-img convert -o compression_type=zlib`",
        }),
    }
}
