//! Clusters to compressed bytes and back: zlib (raw deflate) and zstd.

use std::cell::RefCell;
use std::io;

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

/// Largest zstd window, as a power of two: what QEMU's decoder takes, 128 MiB.
const WINDOW_LOG_MAX: u32 = 27;
/// The deflate window that is written, as a power of two: QEMU's decoder asks for no more.
const DEFLATE_WINDOW: u8 = 12;
/// Up to its level 8 the deflater passes over matches of three bytes, which is most of what makes it
/// fast, and all but nothing for text. Clusters of other content show it: they shrink by less than
/// this part, and are worth a second look.
const HARD: f64 = 0.5;

/// How an image's compressed clusters are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate, which every reader of the format knows.
    #[default]
    Zlib,
    /// Zstandard: version 3 only.
    Zstd,
}

/// Compresses clusters for one image: any thread may, while others place what is done. See
/// [`Image::compressor`](crate::Image::compressor).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compressor {
    pub(crate) compression: Compression,
    pub(crate) cluster: usize,
    /// As the method counts levels.
    level: i32,
}

/// A cluster's content, compressed: [`Compressor::compress`] makes it, and
/// [`Image::place_compressed`](crate::Image::place_compressed) writes it.
#[derive(Clone, Debug)]
pub struct CompressedCluster {
    pub(crate) by: Compressor,
    pub(crate) stream: Vec<u8>,
}

impl Compressor {
    /// `level` goes from 1, fast, to 9 (zlib) or 22 (zstd), small; what lies outside is taken as
    /// the nearest. Without it there is the method's default, 6 or 3.
    pub(crate) fn new(compression: Compression, cluster: usize, level: Option<u32>) -> Self {
        let (usual, most) = match compression {
            Compression::Zlib => (6, 9),
            Compression::Zstd => (3, 22),
        };
        Compressor {
            compression,
            cluster,
            level: level.unwrap_or(usual).clamp(1, most) as i32,
        }
    }

    /// Bytes in a cluster.
    pub fn cluster_size(&self) -> usize {
        self.cluster
    }

    /// Compresses the content of one cluster; what is missing at its end are zeros. `None` if it
    /// would not become smaller, so that it is better written as it is.
    ///
    /// # Panics
    ///
    /// If `content` is longer than a cluster.
    pub fn compress(&self, content: &[u8]) -> Option<CompressedCluster> {
        assert!(content.len() <= self.cluster, "more than a cluster");
        let mut padded = Vec::new();
        let content = if content.len() < self.cluster {
            padded.extend_from_slice(content);
            padded.resize(self.cluster, 0);
            &padded
        } else {
            content
        };
        let stream = ENCODER.with_borrow_mut(|encoder| {
            if encoder.as_ref().is_none_or(|encoder| encoder.by != *self) {
                *encoder = Encoder::new(*self);
            }
            encoder.as_mut()?.encode(content)
        })?;
        Some(CompressedCluster { by: *self, stream })
    }
}

thread_local! {
    /// What this thread used last: to make one takes as long as to compress a cluster.
    static ENCODER: RefCell<Option<Encoder>> = const { RefCell::new(None) };
}

/// What compresses, and memory for the outcome.
struct Encoder {
    by: Compressor,
    method: Method,
    /// One byte less than a cluster: more is no gain.
    out: Vec<u8>,
}

enum Method {
    Deflate(Box<Deflater>),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Encoder {
    /// `None` without memory for it.
    fn new(by: Compressor) -> Option<Self> {
        let method = match by.compression {
            Compression::Zlib => Method::Deflate(Box::new(Deflater::new(by.level as u32))),
            Compression::Zstd => Method::Zstd(zstd::bulk::Compressor::new(by.level).ok()?),
        };
        let out = vec![0; by.cluster.saturating_sub(1)];
        Some(Encoder { by, method, out })
    }

    /// Compresses a cluster, if that makes it smaller.
    fn encode(&mut self, content: &[u8]) -> Option<Vec<u8>> {
        let out = &mut self.out[..];
        match &mut self.method {
            Method::Deflate(deflater) => deflater.deflate(content, out),
            Method::Zstd(compressor) => {
                let len = compressor.compress_to_buffer(content, out).ok()?;
                out.get(..len).map(<[u8]>::to_vec)
            }
        }
    }
}

/// What makes raw deflate.
struct Deflater {
    usual: Level,
    /// For clusters that are hard to compress.
    thorough: Option<Level>,
}

/// A compressor for one stream after the other.
struct Level {
    level: u32,
    compress: Compress,
}

impl Deflater {
    fn new(level: u32) -> Self {
        Deflater {
            usual: Level::new(level),
            thorough: (6..9).contains(&level).then(|| Level::new(9)),
        }
    }

    /// The stream of some content, if `out` has room for it.
    fn deflate(&mut self, content: &[u8], out: &mut [u8]) -> Option<Vec<u8>> {
        let stream = self.usual.deflate(content, out)?;
        let hard = stream.len() as f64 > content.len() as f64 * (1.0 - HARD);
        let by = self.thorough.as_mut().filter(|_| hard);
        let second = by.and_then(|by| by.deflate(content, out));
        second
            .filter(|second| second.len() < stream.len())
            .or(Some(stream))
    }
}

impl Level {
    fn new(level: u32) -> Self {
        let by = flate2::Compression::new(level);
        Level {
            level,
            compress: Compress::new_with_window_bits(by, false, DEFLATE_WINDOW),
        }
    }

    /// The stream of some content, if `out` has room for it.
    fn deflate(&mut self, content: &[u8], out: &mut [u8]) -> Option<Vec<u8>> {
        match self.compress.compress(content, out, FlushCompress::Finish) {
            Ok(Status::StreamEnd) => {
                let len = self.compress.total_out() as usize;
                self.compress.reset();
                out.get(..len).map(<[u8]>::to_vec)
            }
            // A stream that has not ended leaves output behind, which a reset does not take away.
            _ => {
                *self = Self::new(self.level);
                None
            }
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 7_u64;
        std::iter::repeat_with(|| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
        .take(len)
        .collect()
    }

    /// Noise is only compressed by pointing back to where it was.
    #[test]
    fn deflate_points_back_no_further_than_its_window() {
        for (distance, reached) in [(3000, true), (5000, false), (30000, false)] {
            let content = noise(distance).repeat(65536 / distance);
            for level in [1, 6, 9] {
                let compressor = Compressor::new(Compression::Zlib, content.len(), Some(level));
                let compressed = compressor.compress(&content);
                assert_eq!(compressed.is_some(), reached, "{distance} at level {level}");
            }
        }
    }

    #[test]
    fn noise_stays_as_it_is() {
        for compression in [Compression::Zlib, Compression::Zstd] {
            for len in (9..=16).map(|bits| 1 << bits) {
                let compressor = Compressor::new(compression, len, None);
                // What does not fit leaves nothing for the next one to trip over.
                for content in noise(64 * len).chunks(len) {
                    assert!(compressor.compress(content).is_none());
                }
                let short = compressor.compress(b"moo").unwrap();
                let mut cluster = vec![0xee; len];
                decompress(compression, &short.stream, &mut cluster).unwrap();
                assert_eq!(cluster[..3], *b"moo");
                assert!(cluster[3..].iter().all(|&byte| byte == 0));
            }
        }
    }
}
