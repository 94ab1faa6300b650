//! L1 and L2 entries: 8 bytes each, checked as they are decoded.

use std::ops::Range;

use crate::addr::Geometry;

/// Bit 63: the refcount of what the entry names is exactly one, so that it may be written in place.
pub(crate) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of an L2 entry, version 3: reads as zeros.
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

/// What an L2 entry says of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// The backing file has it, or it is zeros.
    Unallocated,
    /// Reads as zeros; `host` may be kept for it.
    Zero { host: Option<u64>, copied: bool },
    /// A cluster of the file.
    Data { host: u64, copied: bool },
    /// Compressed bytes somewhere in the file.
    Compressed(Compressed),
}

impl Mapping {
    /// Decodes an L2 entry, or says what it should have been.
    pub(crate) fn decode(entry: u64, version: u32, geometry: Geometry) -> Result<Self, String> {
        if entry & COMPRESSED != 0 {
            return compressed(entry, geometry).map(Mapping::Compressed);
        }
        let flags = if version >= 3 { ZERO } else { 0 };
        let host = offset(entry, flags, geometry)?;
        let copied = entry & COPIED != 0;
        Ok(match (entry & ZERO != 0, host) {
            (true, host) => Mapping::Zero { host, copied },
            (false, Some(host)) => Mapping::Data { host, copied },
            (false, None) => Mapping::Unallocated,
        })
    }

    /// The host clusters that it refers to, once each.
    pub(crate) fn clusters(self, geometry: Geometry) -> Range<u64> {
        match self {
            Mapping::Data { host, .. }
            | Mapping::Zero {
                host: Some(host), ..
            } => geometry.span(host, 1),
            Mapping::Compressed(Compressed { offset, len }) => geometry.span(offset, len),
            Mapping::Unallocated | Mapping::Zero { host: None, .. } => 0..0,
        }
    }

    /// The entry of a standard cluster that nothing else refers to.
    pub(crate) fn data(host: u64) -> u64 {
        host | COPIED
    }
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
    let split = 62 - (geometry.cluster_bits() - 8);
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
                Mapping::decode(entry, 3, geometry),
                Ok(Mapping::Compressed(expected))
            );
        }
    }

    #[test]
    fn reserved_bits_and_unaligned_offsets_are_refused() {
        let geometry = Geometry::new(16).unwrap();
        for entry in [0x200, 1 << 56, 0x10002, COPIED | 0x10200] {
            assert!(Mapping::decode(entry, 3, geometry).is_err(), "{entry:#x}");
            assert!(l1(entry, geometry).is_err(), "{entry:#x}");
        }
        assert!(
            Mapping::decode(ZERO, 2, geometry).is_err(),
            "version 2 has no zero flag"
        );
        assert_eq!(
            Mapping::decode(ZERO, 3, geometry),
            Ok(Mapping::Zero {
                host: None,
                copied: false
            })
        );
        assert_eq!(l1(COPIED, geometry), Ok(None));
    }
}
