//! Any bytes as a compressed cluster, zlib and zstd.

use std::path::Path;
use std::sync::{Arc, LazyLock};

use arbitrary::{Arbitrary, Unstructured};
use cowshed_qcow::{CreateOptions, Format, Image, MemoryStorage, OpenOptions, create};

use crate::image::number;

const CLUSTER_BITS: [u32; 4] = [9, 12, 16, 21];
const INCOMPATIBLE: usize = 72;
const COMPRESSION_TYPE: usize = 104;

/// Empty images with an L2 table, one a cluster size.
static EMPTY: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| CLUSTER_BITS.map(empty).into());

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    cluster: u8,
    zstd: bool,
    /// Where the stream begins in its sector.
    within: u8,
    /// Sectors that the descriptor claims beyond those of the stream.
    more: u8,
    stream: &'a [u8],
}

fn empty(bits: u32) -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions {
        cluster_size: 1 << bits,
        ..CreateOptions::new(4 << bits)
    };
    create(Path::new("empty"), storage.clone(), &options).unwrap();
    let open = OpenOptions::new(Format::Qcow2);
    let image = Image::open_over(Path::new("empty"), storage.clone(), &open, None).unwrap();
    image.write(3 << bits, &[1; 512]).unwrap();
    drop(image);
    storage.to_vec()
}

/// Reads the cluster: its content or an error, the same each time.
pub fn run(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else {
        return;
    };
    let which = usize::from(input.cluster) % CLUSTER_BITS.len();
    let bits = CLUSTER_BITS[which];
    let mut bytes = EMPTY[which].clone();
    if input.zstd {
        bytes[INCOMPATIBLE + 7] |= 1 << 3;
        bytes[COMPRESSION_TYPE] = 1;
    }
    bytes.resize(
        bytes.len().next_multiple_of(512) + usize::from(input.within),
        0,
    );
    let (start, x) = (bytes.len() as u64, 62 - (bits - 8));
    bytes.extend(input.stream);
    let sectors = (u64::from(input.within) % 512 + input.stream.len() as u64).div_ceil(512);
    let claimed = (sectors.max(1) - 1 + u64::from(input.more)) & ((1 << (62 - x)) - 1);
    let entry = 1 << 62 | claimed << x | start;
    let l1 = number(&bytes, 40, 8) as usize;
    let l2 = (number(&bytes, l1, 8) & 0x00ff_ffff_ffff_fe00) as usize;
    bytes[l2..l2 + 8].copy_from_slice(&entry.to_be_bytes());

    let mut options = OpenOptions::new(Format::Qcow2);
    options.read_only = true;
    let storage = Arc::new(MemoryStorage::new(bytes));
    let read = || {
        let image = Image::open_over(Path::new("fuzzed"), storage.clone(), &options, None).unwrap();
        let mut cluster = vec![0xee; 1 << bits];
        let whole = image.read(0, &mut cluster).is_ok().then_some(cluster);
        let mut byte = [0];
        let last = image
            .read((1 << bits) - 1, &mut byte)
            .is_ok()
            .then_some(byte[0]);
        assert_eq!(
            whole.as_ref().and_then(|cluster| cluster.last()),
            last.as_ref()
        );
        whole
    };
    assert!(read() == read(), "the same stream, another content");
}
