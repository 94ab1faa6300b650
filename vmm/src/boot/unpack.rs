//! Unpacks a bzImage's payload in the formats that Linux's build can pack it with
//! (`scripts/Makefile.lib`, `lib/decompress.c`).
//!
//! All formats but gzip are followed by the unpacked size in 4 bytes, which are not part of the
//! stream; gzip has them in its own trailer. Either way they are the payload's last 4 bytes.

use std::io::{self, Read};

use liblzma::stream::Stream;

use super::Error;

/// Most bytes that a kernel may unpack to, whatever the guest's memory.
const MAX_UNPACKED: u64 = 1 << 30;
/// Most memory for the xz decoder: its dictionary is 32 MiB in kernels so far.
const XZ_MEMORY: u64 = 256 << 20;
/// Largest zstd window, as a power of two: `zstd --ultra -22` uses 128 MiB.
const ZSTD_WINDOW_LOG: u32 = 27;
/// First bytes of an lz4 legacy frame, which may come again between its blocks.
const LZ4_MAGIC: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
/// What one block of an lz4 legacy frame unpacks to, save the last.
const LZ4_BLOCK: usize = 8 << 20;

#[derive(Clone, Copy)]
enum Format {
    Gzip,
    Xz,
    Lz4,
    Zstd,
}

impl Format {
    /// Recognizes what `lib/decompress.c` does, by the same bytes.
    fn of(payload: &[u8]) -> Result<Self, Error> {
        match payload {
            [0x1f, 0x8b, ..] => Ok(Self::Gzip),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Ok(Self::Xz),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(Self::Zstd),
            _ if payload.starts_with(&LZ4_MAGIC) => Ok(Self::Lz4),
            [b'B', b'Z', b'h', ..] => Err(Error::Compression("bzip2")),
            [0x5d, 0, 0, ..] => Err(Error::Compression("lzma")),
            [0x89, b'L', b'Z', b'O', ..] => Err(Error::Compression("lzo")),
            _ => Err(Error::Compression("an unknown format")),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

/// Unpacks `payload`, to at most `ram` bytes.
pub(super) fn unpack(payload: &[u8], ram: u64) -> Result<Vec<u8>, Error> {
    let format = Format::of(payload)?;
    let Some((stream, size)) = payload.split_last_chunk::<4>() else {
        return Err(Error::Compression("an unknown format"));
    };
    let size = u32::from_le_bytes(*size);
    let limit = ram.min(MAX_UNPACKED);
    if u64::from(size) > limit {
        return Err(Error::UnpackedSize { limit });
    }
    match format {
        Format::Gzip => read_all(flate2::bufread::GzDecoder::new(payload), size),
        Format::Xz => Stream::new_stream_decoder(XZ_MEMORY, 0)
            .map_err(io::Error::from)
            .and_then(|xz| read_all(liblzma::bufread::XzDecoder::new_stream(stream, xz), size)),
        Format::Lz4 => unpack_lz4(stream, size),
        Format::Zstd => zstd::Decoder::with_buffer(stream).and_then(|mut zstd| {
            zstd.window_log_max(ZSTD_WINDOW_LOG)?;
            read_all(zstd, size)
        }),
    }
    .map_err(|source| Error::Unpack {
        format: format.name(),
        source,
    })
}

/// Reads exactly `size` bytes: what the kernel's build says there are.
fn read_all(reader: impl Read, size: u32) -> io::Result<Vec<u8>> {
    let mut unpacked = Vec::with_capacity(size as usize);
    reader
        .take(u64::from(size) + 1)
        .read_to_end(&mut unpacked)?;
    if unpacked.len() != size as usize {
        return Err(wrong_size());
    }
    Ok(unpacked)
}

/// Unpacks an lz4 legacy frame: the magic, then blocks that each follow their packed size.
fn unpack_lz4(stream: &[u8], size: u32) -> io::Result<Vec<u8>> {
    let mut unpacked = vec![0; size as usize];
    let mut free = unpacked.as_mut_slice();
    let mut rest = stream;
    while let Some((word, tail)) = rest.split_first_chunk::<4>() {
        rest = tail;
        if *word == LZ4_MAGIC {
            continue;
        }
        let (block, tail) = rest
            .split_at_checked(u32::from_le_bytes(*word) as usize)
            .ok_or_else(cut_short)?;
        rest = tail;
        let room = free.len().min(LZ4_BLOCK);
        let len = free
            .get_mut(..room)
            .ok_or_else(wrong_size)
            .and_then(|to| lz4_flex::block::decompress_into(block, to).map_err(io::Error::other))?;
        free = free.get_mut(len..).ok_or_else(wrong_size)?;
    }
    if !rest.is_empty() {
        return Err(cut_short());
    }
    if !free.is_empty() {
        return Err(wrong_size());
    }
    Ok(unpacked)
}

fn wrong_size() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "it unpacks to another size than it records",
    )
}

fn cut_short() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "it is cut short")
}
