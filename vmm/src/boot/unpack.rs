//! Unpacks a bzImage's payload in the formats that Linux's build can pack it with
//! (`scripts/Makefile.lib`, `lib/decompress.c`).
//!
//! All formats but gzip are followed by the unpacked size in 4 bytes, which are not part of the
//! stream; gzip has them in its own trailer.

use std::io::{self, Read};

use super::Error;

/// Most bytes that a kernel may unpack to, whatever the guest's memory.
const MAX_UNPACKED: u64 = 1 << 30;

/// Unpacks `payload`, to at most `ram` bytes.
pub(super) fn unpack(payload: &[u8], ram: u64) -> Result<Vec<u8>, Error> {
    let limit = ram.min(MAX_UNPACKED);
    let Some((stream, size)) = payload.split_last_chunk::<4>() else {
        return Err(Error::BzImage("its payload is empty".to_owned()));
    };
    let size = u32::from_le_bytes(*size);
    if u64::from(size) > limit {
        return Err(Error::UnpackedSize { limit });
    }
    let (format, result) = match payload {
        [0x1f, 0x8b, ..] => (
            "gzip",
            read_all(flate2::bufread::GzDecoder::new(payload), size),
        ),
        [0x7f, b'E', b'L', b'F', ..] => return Ok(payload.to_vec()),
        _ => {
            return Err(Error::BzImage(
                "its payload is packed in an unknown format".to_owned(),
            ));
        }
    };
    let _ = stream;
    result.map_err(|source| Error::Unpack { format, source })
}

/// Reads exactly `size` bytes: what the kernel's build says there are.
fn read_all(reader: impl Read, size: u32) -> io::Result<Vec<u8>> {
    let mut unpacked = Vec::with_capacity(size as usize);
    reader
        .take(u64::from(size) + 1)
        .read_to_end(&mut unpacked)?;
    if unpacked.len() != size as usize {
        return Err(io::Error::other(
            "unpacked size differs from the recorded one",
        ));
    }
    Ok(unpacked)
}
