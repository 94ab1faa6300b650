//! A descriptor chain becomes a request here, and everything that a driver can get wrong is
//! checked here and nowhere else.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::disk::Geometry;
use super::transfer::Direction;
use crate::virtio::Memory;
use crate::virtio::buffers::Buffers;
use crate::virtio::queue::Chain;

/// Bytes of a sector, the unit of every address in requests.
pub(super) const SECTOR: u64 = 512;
/// Most ranges in one discard or write-zeroes request.
pub(super) const MAX_RANGES: usize = 16;
/// Most sectors in one such range: 1 GiB.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 21;

const HEADER: usize = 16;
const RANGE: usize = 16;

/// Bytes of the disk, inside its capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    /// In bytes, a multiple of 512.
    pub(super) offset: u64,
    /// In bytes, a multiple of 512.
    pub(super) len: u64,
    /// The storage may be given back.
    pub(super) unmap: bool,
}

/// What the driver wants. Buffers lie in guest memory and have the range's length.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read {
        offset: u64,
        data: Buffers,
    },
    Write {
        offset: u64,
        data: Buffers,
    },
    Flush,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
    /// The serial number, into a buffer of any length.
    GetId {
        data: Buffers,
    },
}

impl Operation {
    /// The bytes that it moves: where to, their place on the disk, and the guest memory.
    pub(super) fn bytes(&self) -> Option<(Direction, u64, &Buffers)> {
        match self {
            Self::Read { offset, data } => Some((Direction::Read, *offset, data)),
            Self::Write { offset, data } => Some((Direction::Write, *offset, data)),
            _ => None,
        }
    }
}

/// A chain that is well-formed as far as an answer can be given.
#[derive(Debug)]
pub(super) struct Request {
    /// What to do, or the status that refuses it.
    pub(super) operation: Result<Operation, Refusal>,
    /// Where the status byte goes.
    pub(super) status: Buffers,
}

/// Why a request is answered with an error.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum Refusal {
    #[error("unknown request type {0}")]
    Type(u32),
    #[error("unknown flags {0:#x}")]
    Flags(u32),
    #[error("write to a read-only disk")]
    ReadOnly,
    #[error("{len} bytes at sector {sector} are not inside the disk")]
    Capacity { sector: u64, len: u64 },
    #[error("length of {0} bytes is not a number of sectors")]
    Length(u64),
    #[error("{0} ranges in one request")]
    Ranges(u64),
    #[error("buffer is not in guest memory")]
    Buffer,
}

impl Refusal {
    /// The status byte.
    pub(super) fn status(self) -> u8 {
        match self {
            Self::Type(_) | Self::Flags(_) => VIRTIO_BLK_S_UNSUPP as u8,
            _ => VIRTIO_BLK_S_IOERR as u8,
        }
    }
}

/// A chain to which no answer can be given.
#[derive(Debug, thiserror::Error)]
#[error("block request without a readable header and a writable status")]
pub(super) struct Malformed;

/// Parses `chain` for a disk of that geometry.
pub(super) fn parse(
    chain: &Chain,
    memory: &Memory,
    geometry: &Geometry,
) -> Result<Request, Malformed> {
    let mut header = [0; HEADER];
    let read = chain.readable.read(memory, 0, &mut header);
    if !read.is_ok_and(|len| len == HEADER) {
        return Err(Malformed);
    }
    let room = chain.writable.len().checked_sub(1).ok_or(Malformed)?;
    let status = chain.writable.part(room, 1);
    if !status.exist(memory) {
        return Err(Malformed);
    }
    let [kind @ .., _, _, _, _, _, _, _, _, _, _, _, _] = header;
    let [_, _, _, _, _, _, _, _, sector @ ..] = header;
    let parser = Parser {
        memory,
        geometry,
        sector: u64::from_le_bytes(sector),
        input: chain.readable.part(HEADER as u64, u64::MAX),
        output: chain.writable.part(0, room),
    };
    Ok(Request {
        operation: parser.operation(u32::from_le_bytes(kind)),
        status,
    })
}

struct Parser<'a> {
    memory: &'a Memory,
    geometry: &'a Geometry,
    sector: u64,
    input: Buffers,
    output: Buffers,
}

impl Parser<'_> {
    fn operation(self, kind: u32) -> Result<Operation, Refusal> {
        Ok(match kind {
            VIRTIO_BLK_T_IN => {
                let offset = self.place(&self.output)?;
                Operation::Read {
                    offset,
                    data: self.output,
                }
            }
            VIRTIO_BLK_T_OUT => {
                self.writable()?;
                let offset = self.place(&self.input)?;
                Operation::Write {
                    offset,
                    data: self.input,
                }
            }
            VIRTIO_BLK_T_FLUSH => Operation::Flush,
            VIRTIO_BLK_T_DISCARD => Operation::Discard(self.ranges(0)?),
            VIRTIO_BLK_T_WRITE_ZEROES => {
                Operation::WriteZeroes(self.ranges(VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)?)
            }
            VIRTIO_BLK_T_GET_ID => {
                let data = self.output.part(0, u64::from(VIRTIO_BLK_ID_BYTES));
                self.exist(&data)?;
                Operation::GetId { data }
            }
            kind => return Err(Refusal::Type(kind)),
        })
    }

    fn writable(&self) -> Result<(), Refusal> {
        if self.geometry.read_only {
            Err(Refusal::ReadOnly)
        } else {
            Ok(())
        }
    }

    fn exist(&self, data: &Buffers) -> Result<(), Refusal> {
        if data.exist(self.memory) {
            Ok(())
        } else {
            Err(Refusal::Buffer)
        }
    }

    /// The byte offset of `data`'s place on the disk.
    fn place(&self, data: &Buffers) -> Result<u64, Refusal> {
        let len = data.len();
        if !len.is_multiple_of(SECTOR) {
            return Err(Refusal::Length(len));
        }
        self.exist(data)?;
        self.inside(self.sector, len)
    }

    /// The byte offset of `sector`, if `len` bytes from there are inside the disk.
    fn inside(&self, sector: u64, len: u64) -> Result<u64, Refusal> {
        let offset = sector.checked_mul(SECTOR);
        offset
            .filter(|offset| {
                offset
                    .checked_add(len)
                    .is_some_and(|end| end <= self.geometry.size)
            })
            .ok_or(Refusal::Capacity { sector, len })
    }

    /// The ranges of a discard or write-zeroes request (section 5.2.6).
    fn ranges(&self, known_flags: u32) -> Result<Vec<Range>, Refusal> {
        self.writable()?;
        let len = self.input.len();
        if !len.is_multiple_of(RANGE as u64) {
            return Err(Refusal::Length(len));
        }
        let count = len / RANGE as u64;
        if count == 0 || count > MAX_RANGES as u64 {
            return Err(Refusal::Ranges(count));
        }
        let mut bytes = [0; MAX_RANGES * RANGE];
        let bytes = &mut bytes[..len as usize];
        self.input
            .read(self.memory, 0, bytes)
            .map_err(|_| Refusal::Buffer)?;
        bytes
            .as_chunks::<4>()
            .0
            .as_chunks::<4>()
            .0
            .iter()
            .map(|words| {
                let [low, high, sectors, flags] = words.map(u32::from_le_bytes);
                if flags & !known_flags != 0 {
                    return Err(Refusal::Flags(flags));
                }
                let len = u64::from(sectors) * SECTOR;
                if sectors > MAX_RANGE_SECTORS {
                    return Err(Refusal::Length(len));
                }
                let offset = self.inside(u64::from(high) << 32 | u64::from(low), len)?;
                let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
                Ok(Range { offset, len, unmap })
            })
            .collect()
    }
}
