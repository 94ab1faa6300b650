//! The bitmap directory: which bitmaps there are, and where their tables lie.

use crate::addr::{Geometry, be32, be64};
use crate::error::{Result, Violation};
use crate::extension::BITMAPS;
use crate::header::Header;
use crate::host::Host;

/// Bit 0 of the autoclear features: the bitmaps are as the last writer of the image left them.
pub(crate) const BITMAPS_VALID: u64 = 1;

/// Bit 0 of a bitmap's flags: somebody changes the disk, or did when it crashed.
pub(crate) const IN_USE: u32 = 1 << 0;
/// Bit 1: changes of the disk are to be marked.
pub(crate) const AUTO: u32 = 1 << 1;
/// Bit 2: who does not know the extra data may use the bitmap all the same.
const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
const DIRTY_TRACKING: u8 = 1;

/// QEMU's limits: bitmaps, bytes of one, bytes of a name, bytes of the disk to a bit as powers of
/// two.
const MAX_BITMAPS: usize = 65535;
const MAX_BITMAP_BYTES: u64 = 512 << 20;
pub(crate) const MAX_NAME: usize = 1023;
pub(crate) const GRANULARITY_BITS: std::ops::RangeInclusive<u32> = 9..=31;

/// What is in memory whole: bytes of the directory, where QEMU would have four times as many, and
/// of the tables of all bitmaps in an image that is written.
const MAX_DIRECTORY_BYTES: u64 = 16 << 20;
const MAX_TABLES_BYTES: u64 = 4 << 20;

/// Bytes of an entry before its extra data and its name.
const FIXED: usize = 24;
/// Where in an entry its flags are.
pub(crate) const FLAGS_AT: u64 = 12;

/// A bitmap's entry in the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) table: u64,
    /// Entries of the table, each for a cluster of bits.
    pub(crate) parts: u32,
    pub(crate) flags: u32,
    kind: u8,
    pub(crate) granularity_bits: u32,
    extra: Vec<u8>,
    name: Vec<u8>,
    /// Where the file has this entry.
    pub(crate) at: u64,
}

/// The directory as the file has it.
#[derive(Debug, Default)]
pub(crate) struct Directory {
    pub(crate) entries: Vec<Entry>,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Directory {
    /// Reads the directory; it is empty if the image has no bitmaps, or none that are valid.
    pub(crate) fn load(host: &Host, header: &Header, file_len: u64) -> Result<Self> {
        let extension = header.extensions.get(BITMAPS);
        let Some(extension) = extension.filter(|_| header.autoclear & BITMAPS_VALID != 0) else {
            return Ok(Directory::default());
        };
        let count = be32(extension, 0) as usize;
        let (len, offset) = (be64(extension, 8), be64(extension, 16));
        let wrong = |field: &str, value: String, expected: String| {
            host.invalid(Violation::new(field, offset, value, expected))
        };
        let reserved = be32(extension, 4);
        if count == 0 || count > MAX_BITMAPS || reserved != 0 {
            let value = format!("{count} with {reserved} in the reserved field");
            let expected = format!("1 to {MAX_BITMAPS} with 0");
            return Err(wrong("number of bitmaps", value, expected));
        }
        if len > MAX_DIRECTORY_BYTES || !placed(offset, len, header.geometry, file_len) {
            let value = format!("{len} bytes at {offset:#x}");
            let expected = format!(
                "at most {MAX_DIRECTORY_BYTES} bytes at a cluster, before the file's end at \
                 {file_len:#x}"
            );
            return Err(wrong("bitmap directory", value, expected));
        }
        let mut bytes = vec![0; len as usize];
        host.read(offset, &mut bytes)?;
        let (mut entries, mut at) = (Vec::new(), 0);
        for _ in 0..count {
            let entry = Entry::parse(&bytes, at, offset, header.geometry, file_len)
                .map_err(|violation| host.invalid(violation))?;
            at += entry.len();
            entries.push(entry);
        }
        if at as u64 != len {
            let expected = format!("{at}, where its {count} entries end");
            return Err(wrong(
                "bitmap directory's length",
                len.to_string(),
                expected,
            ));
        }
        let mut names: Vec<&[u8]> = entries.iter().map(|entry| &*entry.name).collect();
        names.sort_unstable();
        if let Some([name, _]) = names.array_windows().find(|[a, b]| a == b) {
            let name = format!("{:?} twice", String::from_utf8_lossy(name));
            return Err(wrong("bitmap names", name, "each once".into()));
        }
        Ok(Directory {
            entries,
            offset,
            len,
        })
    }
}

/// The bytes of a directory with these entries.
pub(crate) fn encode(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in entries {
        bytes.extend(entry.table.to_be_bytes());
        bytes.extend(entry.parts.to_be_bytes());
        bytes.extend(entry.flags.to_be_bytes());
        bytes.extend([entry.kind, entry.granularity_bits as u8]);
        bytes.extend((entry.name.len() as u16).to_be_bytes());
        bytes.extend((entry.extra.len() as u32).to_be_bytes());
        bytes.extend(&entry.extra);
        bytes.extend(&entry.name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes
}

/// Why an image may not have these bitmaps, whose directory has `len` bytes.
pub(crate) fn too_much(entries: &[Entry], len: usize) -> Option<String> {
    let tables: u64 = entries.iter().map(|entry| u64::from(entry.parts) * 8).sum();
    let limits = [
        ("bitmaps", entries.len() as u64, MAX_BITMAPS as u64),
        ("bytes of bitmap directory", len as u64, MAX_DIRECTORY_BYTES),
        ("bytes of bitmap tables", tables, MAX_TABLES_BYTES),
    ];
    let over = limits.iter().find(|(_, value, most)| value > most);
    over.map(|(what, value, most)| {
        format!("the image would have {value} {what}, it can have {most}: remove some bitmaps")
    })
}

/// The extension that names a directory.
pub(crate) fn extension(count: usize, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend((count as u32).to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(len.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes
}

/// Entries that the table of a bitmap has; more than a table may have if the bits are too many.
pub(crate) fn parts(size: u64, granularity_bits: u32, geometry: Geometry) -> Option<u32> {
    let bytes = size.div_ceil(1 << granularity_bits).div_ceil(8);
    (bytes <= MAX_BITMAP_BYTES).then(|| geometry.clusters(bytes) as u32)
}

impl Entry {
    pub(crate) fn new(name: &str, granularity_bits: u32, flags: u32) -> Self {
        Entry {
            table: 0,
            parts: 0,
            flags,
            kind: DIRTY_TRACKING,
            granularity_bits,
            extra: Vec::new(),
            name: name.into(),
            at: 0,
        }
    }

    fn parse(
        directory: &[u8],
        at: usize,
        offset: u64,
        geometry: Geometry,
        file_len: u64,
    ) -> Result<Self, Violation> {
        let place = offset + at as u64;
        let rest = directory.get(at..).unwrap_or_default();
        let name_len = (be32(rest, 16) & 0xffff) as usize;
        let extra_len = be32(rest, 20) as usize;
        if rest.len() < FIXED || rest.len() - FIXED < extra_len.saturating_add(name_len) {
            let value = format!("{FIXED} + {extra_len} + {name_len} bytes");
            let expected = format!("at most {}, where the directory ends", rest.len());
            return Err(Violation::new("bitmap's entry", place, value, expected));
        }
        if name_len == 0 || name_len > MAX_NAME {
            let expected = format!("1 to {MAX_NAME}");
            return Err(Violation::new(
                "length of a bitmap's name",
                place + 18,
                name_len,
                expected,
            ));
        }
        let (extra, rest_of_it) = rest[FIXED..].split_at(extra_len);
        let entry = Entry {
            table: be64(rest, 0),
            parts: be32(rest, 8),
            flags: be32(rest, FLAGS_AT as usize),
            kind: rest[16],
            granularity_bits: u32::from(rest[17]),
            extra: extra.to_vec(),
            name: rest_of_it[..name_len].to_vec(),
            at: place,
        };
        let most = MAX_BITMAP_BYTES.div_ceil(geometry.cluster());
        let len = u64::from(entry.parts) * 8;
        if u64::from(entry.parts) > most || !placed(entry.table, len, geometry, file_len) {
            let value = format!("{} entries at {:#x}", entry.parts, entry.table);
            let expected =
                format!("1 to {most} entries at a cluster, before the file's end at {file_len:#x}");
            return Err(Violation::new("bitmap's table", place, value, expected));
        }
        Ok(entry)
    }

    /// Bytes that it takes, the last entry's padding too.
    fn len(&self) -> usize {
        (FIXED + self.extra.len() + self.name.len()).next_multiple_of(8)
    }

    /// The name; what is no UTF-8 is replaced.
    pub(crate) fn name(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// Why it cannot be used for a disk of `size` bytes; `None` if it can.
    pub(crate) fn trouble(&self, size: u64, geometry: Geometry) -> Option<String> {
        if let Some(reason) = self.unknown() {
            return Some(reason);
        }
        if self.flags & IN_USE != 0 {
            let reason = "it was in use when the image was last closed, so that marks are missing";
            return Some(reason.into());
        }
        self.misfit(size, geometry)
    }

    /// Why its table is not what a disk of `size` bytes needs; `None` if it is, or it is in use, when
    /// it need not be.
    fn misfit(&self, size: u64, geometry: Geometry) -> Option<String> {
        let expected = parts(size, self.granularity_bits, geometry);
        (self.flags & IN_USE == 0 && expected != Some(self.parts)).then(|| {
            format!(
                "its table has {} entries, which does not fit a disk of {size} bytes",
                self.parts
            )
        })
    }

    /// Why QEMU does not open an image with it. Extra data is for others to know.
    pub(crate) fn fault(&self, size: u64, geometry: Geometry) -> Option<String> {
        self.outside().or_else(|| self.misfit(size, geometry))
    }

    /// What of it this crate does not know.
    fn unknown(&self) -> Option<String> {
        let extra = !self.extra.is_empty() && self.flags & EXTRA_DATA_COMPATIBLE == 0;
        let extra = extra.then(|| "it has extra data that is not known".into());
        self.outside().or(extra)
    }

    /// What of it is none of the values that the format has, or QEMU takes.
    fn outside(&self) -> Option<String> {
        if self.kind != DIRTY_TRACKING {
            return Some(format!("its type is {}, only 1 is known", self.kind));
        }
        let flags = self.flags & !(IN_USE | AUTO | EXTRA_DATA_COMPATIBLE);
        if flags != 0 {
            return Some(format!("its flags {flags:#x} are not known"));
        }
        if !GRANULARITY_BITS.contains(&self.granularity_bits) {
            return Some(format!(
                "its granularity is 2 to the {}, it can be 512 bytes to 2 GiB",
                self.granularity_bits
            ));
        }
        None
    }
}

/// Whether something that is not empty lies at a cluster past the header and inside the file.
fn placed(offset: u64, len: u64, geometry: Geometry, file_len: u64) -> bool {
    let end = offset.checked_add(len);
    let fits = end.is_some_and(|end| end <= file_len.saturating_add(geometry.cluster() - 1));
    len > 0 && offset > 0 && geometry.within(offset) == 0 && fits
}
