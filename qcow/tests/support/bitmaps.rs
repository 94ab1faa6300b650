//! Images with bitmaps, in memory.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{CreateOptions, Format, Image, MemoryStorage, OpenOptions, create};

use super::check::check;

pub fn in_memory(size: u64, cluster_size: u32) -> (Arc<MemoryStorage>, Image) {
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions {
        cluster_size,
        ..CreateOptions::new(size)
    };
    create(Path::new("disk"), storage.clone(), &options).unwrap();
    let image = reopen(&storage);
    (storage, image)
}

pub fn reopen(storage: &Arc<MemoryStorage>) -> Image {
    let options = OpenOptions::new(Format::Qcow2);
    Image::open_over(Path::new("disk"), storage.clone(), &options, None).unwrap()
}

pub fn assert_clean(bytes: &[u8]) {
    let report = check(bytes);
    let clean = report.corruptions.is_empty() && report.leaks.is_empty();
    assert!(clean, "{report:?}");
}

pub fn all(image: &Image, name: &str) -> Vec<Range<u64>> {
    image.dirty_ranges(name, 0..image.size()).unwrap()
}
