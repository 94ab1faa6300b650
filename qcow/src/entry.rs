//! L1 and L2 entries, checked as they are decoded.

use std::ops::Range;

use crate::addr::{Geometry, be64};

/// Bit 63: the refcount of what the entry names is exactly one, so that it may be written in place.
pub(crate) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of an L2 entry, version 3 without extended entries: reads as zeros.
pub(crate) const ZERO: u64 = 1;
/// The bits of an entry that are an offset.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bytes in the unit of a compressed cluster's length.
const SECTOR: u64 = 512;

/// Where a compressed cluster's bytes are. They are as many as the sectors they end in hold:
/// the stream itself says where it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Compressed {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Compressed {
    /// What a descriptor says of `len` bytes at `offset`: they end with a sector.
    pub(crate) fn new(offset: u64, len: u64) -> Self {
        let end = (offset + len).next_multiple_of(SECTOR);
        let len = end - offset;
        Compressed { offset, len }
    }

    /// A descriptor has no room for offsets from here on.
    pub(crate) fn limit(geometry: Geometry) -> u64 {
        1 << split(geometry).min(56)
    }

    fn encode(self, geometry: Geometry) -> Entry {
        let sectors = (self.offset % SECTOR + self.len).div_ceil(SECTOR);
        Entry {
            descriptor: COMPRESSED | (sectors - 1) << split(geometry) | self.offset,
            bitmap: 0,
        }
    }
}

/// The bit of a compressed cluster's descriptor where the offset ends and the length begins.
fn split(geometry: Geometry) -> u32 {
    62 - (geometry.cluster_bits() - 8)
}

/// An L2 entry as it is in the file: 8 bytes, and with extended entries 8 more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) descriptor: u64,
    pub(crate) bitmap: u64,
}

impl Entry {
    /// Takes the bytes of one entry.
    pub(crate) fn read(bytes: &[u8]) -> Self {
        Entry {
            descriptor: be64(bytes, 0),
            bitmap: be64(bytes, 8),
        }
    }

    /// Stores it: only the descriptor where there is room for no more.
    pub(crate) fn write(self, bytes: &mut [u8]) {
        let all = [self.descriptor.to_be_bytes(), self.bitmap.to_be_bytes()];
        let from = all.as_flattened().iter();
        bytes
            .iter_mut()
            .zip(from)
            .for_each(|(to, from)| *to = *from);
    }
}

impl std::fmt::Display for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#018x}", self.descriptor)?;
        match self.bitmap {
            0 => Ok(()),
            bitmap => write!(f, " with the subclusters {bitmap:#018x}"),
        }
    }
}

/// What an L2 entry says of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// Compressed bytes somewhere in the file.
    Compressed(Compressed),
    Standard(Standard),
}

/// A cluster that is not compressed: where it has a place, and what of that counts. Subclusters
/// have a bit each, the first the lowest; without extended entries all bits are the same. What is
/// neither allocated nor zero is in the backing file, or reads as zeros too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Standard {
    /// The host cluster. It may be kept though nothing is allocated in it.
    pub(crate) host: Option<u64>,
    /// Nothing else refers to the host cluster.
    pub(crate) copied: bool,
    /// Subclusters whose bytes are in the host cluster.
    pub(crate) alloc: u32,
    /// Subclusters that read as zeros; none of them is allocated.
    pub(crate) zero: u32,
}

/// What a subcluster's bits say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Below,
    Zero,
    Data,
}

impl Mapping {
    /// Nothing is here.
    pub(crate) const NONE: Mapping = Mapping::Standard(Standard {
        host: None,
        copied: false,
        alloc: 0,
        zero: 0,
    });

    /// Decodes an L2 entry, or says what it should have been.
    pub(crate) fn decode(entry: Entry, version: u32, geometry: Geometry) -> Result<Self, String> {
        if entry.descriptor & COMPRESSED != 0 {
            return compressed(entry.descriptor, geometry).map(Mapping::Compressed);
        }
        let has_flag = version >= 3 && !geometry.is_extended();
        let host = offset(entry.descriptor, if has_flag { ZERO } else { 0 }, geometry)?;
        Standard::decode(entry, host, geometry).map(Mapping::Standard)
    }

    /// The same with a data file, in which a cluster's only place is the guest's own offset.
    pub(crate) fn decode_external(
        entry: Entry,
        guest: u64,
        geometry: Geometry,
    ) -> Result<Self, String> {
        if entry.descriptor & COMPRESSED != 0 {
            return Err("no compressed cluster, because there is a data file".into());
        }
        let flag = if geometry.is_extended() { 0 } else { ZERO };
        // Offset 0 is a place there, and COPIED says that it is meant.
        let first = (entry.descriptor & COPIED != 0).then_some(0);
        let host = offset(entry.descriptor, flag, geometry)?.or(first);
        if host.is_some_and(|host| host != guest) {
            return Err(format!("the place {guest:#x} in the data file, or none"));
        }
        let standard = Standard {
            copied: host.is_some(),
            ..Standard::decode(entry, host, geometry)?
        };
        Ok(Mapping::Standard(standard))
    }

    /// The entry that says so.
    pub(crate) fn encode(self, geometry: Geometry) -> Entry {
        match self {
            Mapping::Compressed(compressed) => compressed.encode(geometry),
            Mapping::Standard(standard) => standard.encode(geometry),
        }
    }

    /// The host clusters that it refers to, once each.
    pub(crate) fn clusters(self, geometry: Geometry) -> Range<u64> {
        match self {
            Mapping::Compressed(Compressed { offset, len }) => geometry.span(offset, len),
            Mapping::Standard(Standard { host, .. }) => {
                host.map_or(0..0, |host| geometry.span(host, 1))
            }
        }
    }
}

impl Standard {
    /// A cluster that reads as zeros and has no place.
    pub(crate) const ZERO: Standard = Standard {
        host: None,
        copied: false,
        alloc: 0,
        zero: u32::MAX,
    };

    /// Decodes the flags of an entry whose offset is known.
    fn decode(entry: Entry, host: Option<u64>, geometry: Geometry) -> Result<Self, String> {
        let Entry { descriptor, bitmap } = entry;
        let all_if = |condition| if condition { u32::MAX } else { 0 };
        let (alloc, zero) = if geometry.is_extended() {
            (bitmap as u32, (bitmap >> 32) as u32)
        } else {
            let zero = descriptor & ZERO != 0;
            (all_if(host.is_some() && !zero), all_if(zero))
        };
        if alloc & zero != 0 {
            return Err("no subcluster that is both allocated and zero".into());
        }
        if alloc != 0 && host.is_none() {
            return Err("a cluster, because subclusters are allocated in it".into());
        }
        Ok(Standard {
            host,
            copied: descriptor & COPIED != 0,
            alloc,
            zero,
        })
    }

    fn encode(self, geometry: Geometry) -> Entry {
        let copied = if self.copied { COPIED } else { 0 };
        let place = self.host.map_or(0, |host| host | copied);
        if geometry.is_extended() {
            return Entry {
                descriptor: place,
                bitmap: u64::from(self.zero) << 32 | u64::from(self.alloc),
            };
        }
        Entry {
            descriptor: place | if self.zero != 0 { ZERO } else { 0 },
            bitmap: 0,
        }
    }

    /// What holds for a byte of the cluster, and from there to where the subcluster ends.
    pub(crate) fn content(self, within: u64, geometry: Geometry) -> (Content, u64) {
        let unit = geometry.subcluster();
        let bit = 1 << (within / unit);
        let content = match (self.alloc & bit != 0, self.zero & bit != 0) {
            (true, _) => Content::Data,
            (_, true) => Content::Zero,
            _ => Content::Below,
        };
        (content, unit - within % unit)
    }
}

/// The L1 entry of an L2 table that nothing else refers to.
pub(crate) fn own_table(host: u64) -> u64 {
    host | COPIED
}

/// Decodes an L1 entry: the L2 table's offset, and whether it may be written in place.
pub(crate) fn l1(entry: u64, geometry: Geometry) -> Result<Option<(u64, bool)>, String> {
    Ok(offset(entry, 0, geometry)?.map(|table| (table, entry & COPIED != 0)))
}

/// Decodes a refcount table entry: the refcount block's offset.
pub(crate) fn refcount_block(entry: u64, geometry: Geometry) -> Result<Option<u64>, String> {
    if entry == 0 {
        return Ok(None);
    }
    if geometry.within(entry) != 0 || entry > i64::MAX as u64 {
        return Err(format!("0 or a multiple of {}", geometry.cluster()));
    }
    Ok(Some(entry))
}

/// The host cluster of an L2 entry that says no more than that, perhaps with COPIED: what almost all
/// entries of a large image are, told without the way through a [`Mapping`].
pub(crate) fn plain_place(descriptor: u64, geometry: Geometry) -> Option<u64> {
    let place = descriptor & !COPIED;
    (place & !OFFSET == 0 && place != 0 && geometry.within(place) == 0).then_some(place)
}

fn offset(entry: u64, flags: u64, geometry: Geometry) -> Result<Option<u64>, String> {
    let offset = entry & OFFSET;
    if entry & !(OFFSET | COPIED | flags) != 0 {
        return Err("no reserved bit".into());
    }
    if geometry.within(offset) != 0 {
        return Err(format!(
            "an offset that is a multiple of {}",
            geometry.cluster()
        ));
    }
    Ok((offset != 0).then_some(offset))
}

fn compressed(entry: u64, geometry: Geometry) -> Result<Compressed, String> {
    let split = split(geometry);
    let offset = entry & ((1 << split) - 1);
    let sectors = ((entry & (COMPRESSED - 1)) >> split) + 1;
    if offset > OFFSET | (SECTOR - 1) {
        return Err("a compressed cluster's offset of at most 56 bits".into());
    }
    Ok(Compressed {
        offset,
        len: sectors * SECTOR - offset % SECTOR,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(descriptor: u64, bitmap: u64, geometry: Geometry) -> Result<Mapping, String> {
        Mapping::decode(Entry { descriptor, bitmap }, 3, geometry)
    }

    #[test]
    fn a_compressed_descriptor_splits_where_the_cluster_size_says() {
        for (bits, split) in [(9, 61), (16, 54), (21, 49)] {
            let geometry = Geometry::new(bits).unwrap();
            let entry = COMPRESSED | 1 << split | 0x12345;
            let expected = Compressed {
                offset: 0x12345,
                len: 1024 - 0x145,
            };
            assert_eq!(
                decode(entry, 0, geometry),
                Ok(Mapping::Compressed(expected))
            );
            assert_eq!(Compressed::new(0x12345, 600), expected);
            assert_eq!(expected.encode(geometry).descriptor, entry);
        }
    }

    #[test]
    fn reserved_bits_and_unaligned_offsets_are_refused() {
        let geometry = Geometry::new(16).unwrap();
        for entry in [0x200, 1 << 56, 0x10002, COPIED | 0x10200] {
            assert!(decode(entry, 0, geometry).is_err(), "{entry:#x}");
            assert!(l1(entry, geometry).is_err(), "{entry:#x}");
        }
        let flag = Entry {
            descriptor: ZERO,
            bitmap: 0,
        };
        assert!(
            Mapping::decode(flag, 2, geometry).is_err(),
            "version 2 has no zero flag"
        );
        assert_eq!(
            Mapping::decode(flag, 3, geometry),
            Ok(Mapping::Standard(Standard::ZERO))
        );
        assert_eq!(l1(COPIED, geometry), Ok(None));
    }

    #[test]
    fn a_data_file_has_clusters_where_the_guest_has_them() {
        let geometry = Geometry::new(16).unwrap();
        let decode = |descriptor, guest| {
            let entry = Entry {
                descriptor,
                bitmap: 0,
            };
            Mapping::decode_external(entry, guest, geometry)
        };
        for (descriptor, guest) in [(COPIED, 0), (COPIED | 0x10000, 0x10000)] {
            let expected = Mapping::Standard(Standard {
                host: Some(guest),
                copied: true,
                alloc: u32::MAX,
                zero: 0,
            });
            assert_eq!(decode(descriptor, guest), Ok(expected));
            assert_eq!(expected.encode(geometry).descriptor, descriptor);
            assert!(decode(descriptor, 0x20000).is_err());
        }
        assert_eq!(decode(0, 0), Ok(Mapping::NONE));
        assert_eq!(decode(ZERO, 0), Ok(Mapping::Standard(Standard::ZERO)));
        assert!(decode(COMPRESSED, 0).is_err());
    }

    #[test]
    fn subclusters_are_checked_and_kept() {
        let geometry = Geometry::new(16).and_then(Geometry::extended).unwrap();
        assert!(decode(0x10000 | ZERO, 0, geometry).is_err(), "no zero flag");
        assert!(decode(0x10000, 1 << 32 | 1, geometry).is_err(), "both bits");
        assert!(decode(0, 1, geometry).is_err(), "allocated nowhere");
        let entry = Entry {
            descriptor: 0x10000 | COPIED,
            bitmap: 2 << 32 | 1,
        };
        let Ok(Mapping::Standard(standard)) = Mapping::decode(entry, 3, geometry) else {
            panic!("{entry}");
        };
        assert_eq!(standard.content(2047, geometry), (Content::Data, 1));
        assert_eq!(standard.content(2048, geometry), (Content::Zero, 2048));
        assert_eq!(standard.content(65535, geometry), (Content::Below, 1));
        assert_eq!(Mapping::Standard(standard).encode(geometry), entry);
        let mut bytes = [0; 16];
        entry.write(&mut bytes);
        assert_eq!(Entry::read(&bytes), entry);
    }

    #[test]
    fn a_range_touches_subclusters() {
        let geometry = Geometry::new(16).and_then(Geometry::extended).unwrap();
        assert_eq!(geometry.touched(&(65536..65537), 1), 1);
        assert_eq!(geometry.touched(&(2047..4097), 0), 0b111);
        assert_eq!(geometry.touched(&(0..1 << 20), 3), u32::MAX);
        assert_eq!(geometry.touched(&(63 << 10..66 << 10), 0), 1 << 31);
    }
}
