//! Reading compressed clusters: zlib (raw deflate) and zstd.

use std::io;

use flate2::{Decompress, FlushDecompress, Status};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

/// Largest zstd window, as a power of two: what QEMU's decoder takes, 128 MiB.
const WINDOW_LOG_MAX: u32 = 27;

/// How an image's compressed clusters are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate, which every reader of the format knows.
    #[default]
    Zlib,
    /// Zstandard: version 3 only.
    Zstd,
}

/// Fills `cluster` from `stream`, which may go on after the cluster's end.
pub(crate) fn decompress(method: Compression, stream: &[u8], cluster: &mut [u8]) -> io::Result<()> {
    match method {
        Compression::Zlib => inflate(stream, cluster),
        Compression::Zstd => unzstd(stream, cluster),
    }
}

fn too_short() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "compressed data ends before its cluster does",
    )
}

fn overlong() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "a zstd frame does not end where its cluster does",
    )
}

fn inflate(stream: &[u8], cluster: &mut [u8]) -> io::Result<()> {
    let mut inflater = Decompress::new(false);
    loop {
        let (read, written) = (inflater.total_in() as usize, inflater.total_out() as usize);
        let rest = stream.get(read..).unwrap_or_default();
        let room = cluster.get_mut(written..).unwrap_or_default();
        if room.is_empty() {
            return Ok(());
        }
        let status = inflater.decompress(rest, room, FlushDecompress::None)?;
        let progress =
            inflater.total_out() as usize > written || inflater.total_in() as usize > read;
        match status {
            _ if inflater.total_out() as usize >= cluster.len() => return Ok(()),
            Status::Ok if progress => {}
            _ => return Err(too_short()),
        }
    }
}

fn unzstd(stream: &[u8], cluster: &mut [u8]) -> io::Result<()> {
    let mut decoder = Decoder::new()?;
    decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX))?;
    let mut input = InBuffer::around(stream);
    let mut output = OutBuffer::around(cluster);
    loop {
        let before = (input.pos(), output.pos());
        // Zero when a frame has ended and all of it has been given out.
        let wanted = decoder.run(&mut input, &mut output)?;
        let full = output.pos() == output.capacity();
        if full && wanted == 0 {
            return Ok(());
        }
        if (input.pos(), output.pos()) == before {
            return Err(if full { overlong() } else { too_short() });
        }
        if wanted == 0 {
            decoder.reinit()?;
        }
    }
}
