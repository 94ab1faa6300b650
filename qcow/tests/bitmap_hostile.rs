//! Bitmaps made to harm: refused by field, offset and value, or named as inconsistent. The disk
//! can be read all the same, and is not written where nobody knows what is where.

#![allow(clippy::unwrap_used)] // A test fails by panicking.
#![allow(clippy::single_range_in_vec_init)] // A list of ranges may have one.

mod support;

use std::error::Error as _;
use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{Error, Format, Image, MemoryStorage, OpenOptions, ResizeOptions};
use support::Random;
use support::bitmaps::{all, assert_clean, in_memory, reopen};
use support::check::check;
use support::model::{Ops, perform};

const CLUSTER: u64 = 4096;
const SIZE: u64 = 4 << 20;

/// An image with two bitmaps, whose bits are in the file, and where the extension's data is.
fn image() -> (Vec<u8>, usize) {
    let (storage, image) = in_memory(SIZE, CLUSTER as u32);
    for name in ["one", "two"] {
        image.add_bitmap(name, Some(512), true).unwrap();
    }
    image.write(0, &[7; 65536]).unwrap();
    image.close().unwrap();
    let bytes = storage.to_vec();
    let magic = [0x23, 0x85, 0x28, 0x75];
    let at = bytes.windows(4).position(|window| window == magic);
    (bytes, at.unwrap() + 8)
}

fn open(bytes: &[u8]) -> Image {
    let storage = Arc::new(MemoryStorage::new(bytes.to_vec()));
    let options = OpenOptions::new(Format::Qcow2);
    Image::open_over(Path::new("hostile"), storage, &options, None).unwrap()
}

fn number(bytes: &[u8], at: usize) -> usize {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

fn poke(bytes: &[u8], at: usize, new: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + new.len()].copy_from_slice(new);
    bytes
}

/// The disk can be read, whatever the bitmaps are.
fn assert_readable(image: &Image) {
    let mut bytes = vec![0; 1024];
    image.read(65536 - 512, &mut bytes).unwrap();
    assert!(bytes == [[7; 512], [0; 512]].concat());
}

#[test]
fn a_broken_directory_is_refused() {
    let (bytes, extension) = image();
    let directory = number(&bytes, extension + 16);
    let second = directory + 32; // 24, a name of 3, padding
    assert_eq!(&bytes[second + 24..second + 27], b"two");
    let far = (1_u64 << 40).to_be_bytes();
    let cases: [(usize, &[u8], &str); 18] = [
        (extension, &[0; 4], "number of bitmaps"),
        (extension, &[0xff; 4], "number of bitmaps"),
        (extension + 3, &[1], "bitmap directory's length"),
        (extension + 7, &[1], "number of bitmaps"),
        (extension + 8, &[0; 8], "bitmap directory"),
        (extension + 8, &far, "bitmap directory"),
        (extension + 8, &[0xff; 8], "bitmap directory"),
        (extension + 16, &[0; 8], "bitmap directory"),
        (extension + 16, &far, "bitmap directory"),
        (extension + 16, &[0xff; 8], "bitmap directory"),
        (extension + 23, &[8], "bitmap directory"),
        (extension + 15, &[40], "bitmap's entry"),
        (second, &far, "bitmap's table"),
        (second + 7, &[1], "bitmap's table"),
        (second + 8, &[0xff; 4], "bitmap's table"),
        (second + 18, &[0, 0], "length of a bitmap's name"),
        (second + 20, &[0xff; 4], "bitmap's entry"),
        (second + 24, b"one", "bitmap names"),
    ];
    for (at, new, field) in cases {
        let bad = poke(&bytes, at, new);
        let image = open(&bad);
        assert_readable(&image);
        let named = |error: Error| {
            let source = error.source().map(ToString::to_string).unwrap_or_default();
            assert!(source.contains(field), "{field}: {error}: {source}");
            assert!(source.contains("at offset 0x"), "{source}");
        };
        named(image.bitmaps().unwrap_err());
        named(image.dirty_bytes("one").unwrap_err());
        named(image.remove_bitmap("one").unwrap_err());
        // Who knows what the bitmaps' clusters are may write, and nobody does.
        named(image.write(0, &[1; 512]).unwrap_err());
    }
}

#[test]
fn what_is_not_known_is_named_and_left_alone() {
    let (bytes, extension) = image();
    let first = number(&bytes, extension + 16);
    let cases: [(usize, &[u8], &str); 6] = [
        (first + 8, &[0, 0, 0, 2], "does not fit"),
        (first + 12, &[0, 1, 0, 2], "flags 0x10000"),
        (first + 16, &[2], "type is 2"),
        (first + 17, &[8], "granularity is 2 to the 8"),
        (first + 17, &[32], "granularity is 2 to the 32"),
        (first + 17, &[255], "granularity is 2 to the 255"),
    ];
    for (at, new, reason) in cases {
        let bad = poke(&bytes, at, new);
        let storage = Arc::new(MemoryStorage::new(bad));
        let options = OpenOptions::new(Format::Qcow2);
        let open = || Image::open_over(Path::new("odd"), storage.clone(), &options, None).unwrap();
        let image = open();
        let found = image.bitmaps().unwrap();
        let said = found[0].inconsistent.as_deref().unwrap_or_default();
        assert!(said.contains(reason), "{reason}: {said}");
        assert_eq!(found[1].inconsistent, None);
        let error = image.dirty_bytes("one").unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert!(image.clear_bitmap("one").is_err());
        // Nobody marks in it, so that it must not pretend.
        image.write(1 << 20, &[1; 512]).unwrap();
        image.close().unwrap();
        let image = open();
        assert!(image.bitmaps().unwrap()[0].in_use, "{reason}");
        assert_eq!(image.dirty_bytes("two").unwrap(), 65536 + 512);
        image.resize(SIZE * 2, &ResizeOptions::default()).unwrap();
        assert_eq!(image.dirty_bytes("two").unwrap(), 65536 + 512);
        image.remove_bitmap("one").unwrap();
        image.close().unwrap();
        assert_clean(&storage.to_vec());
    }
}

#[test]
fn a_broken_table_is_refused_and_an_overlap_is_corrupt() {
    let (bytes, extension) = image();
    let first = number(&bytes, extension + 16);
    let (table, second_table) = (number(&bytes, first), number(&bytes, first + 32));
    for entry in [2_u64, 3, 0x1001, 0x1200, 1 << 40, 1 << 56, u64::MAX] {
        let bad = poke(&bytes, table, &entry.to_be_bytes());
        let image = open(&bad);
        assert_readable(&image);
        for error in [
            image.dirty_bytes("one").unwrap_err(),
            image.write(0, &[1; 512]).unwrap_err(),
        ] {
            let source = error.source().map(ToString::to_string).unwrap_or_default();
            assert!(source.contains("bitmap table entry"), "{error}: {source}");
        }
    }
    let refcount_table = number(&bytes, 48) as u64;
    let l1 = number(&bytes, 40) as u64;
    let bits = number(&bytes, second_table) as u64;
    let l2 = number(&bytes, l1 as usize) as u64 & 0xff_ffff_ff00;
    let block = number(&bytes, refcount_table as usize) as u64;
    let others = [
        refcount_table,
        block,
        l1,
        l2,
        bits,
        first as u64,
        table as u64,
        second_table as u64,
    ];
    for other in others {
        for (what, at) in [("bits", table), ("table", first)] {
            if (what, other) == ("table", table as u64) {
                continue;
            }
            let bad = poke(&bytes, at, &other.to_be_bytes());
            let image = open(&bad);
            assert_readable(&image);
            let error = image.write(0, &[1; 512]).unwrap_err();
            let refused = matches!(error, Error::Corrupt { .. } | Error::Invalid { .. });
            assert!(refused, "{what} at {other:#x}: {error}");
            assert_readable(&image);
        }
    }
}

/// A bitmap so fine that its marks would take more memory than there is for them.
#[test]
fn marks_are_bounded() {
    let (storage, image) = in_memory(4 << 40, 65536);
    image.add_bitmap("fine", Some(1024), true).unwrap();
    image.add_bitmap("coarse", Some(65536), true).unwrap();
    image.write(1 << 40, &[1; 512]).unwrap();
    image.close().unwrap();
    let image = reopen(&storage);
    let bitmaps = image.bitmaps().unwrap();
    assert!(bitmaps[0].in_use && bitmaps[0].inconsistent.is_some());
    assert_eq!(bitmaps[1].inconsistent, None);
    assert_eq!(all(&image, "coarse"), [1 << 40..(1 << 40) + 65536]);
    image.remove_bitmap("fine").unwrap();
    image.close().unwrap();
    assert_clean(&storage.to_vec());
}

/// Damage anywhere in the bitmaps: no panic, and what is written all the same is no worse.
#[test]
fn random_damage() {
    let (bytes, extension) = image();
    let first = number(&bytes, extension + 16);
    let (table, second_table) = (number(&bytes, first), number(&bytes, first + 32));
    let mut random = Random(23);
    let (mut listed, mut sound) = (0, 0);
    for _ in 0..600 {
        let mut bad = bytes.clone();
        for _ in 0..1 + random.below(3) {
            let (start, len) = [
                (extension - 8, 32),
                (first, 64),
                (table, 16),
                (second_table, 16),
            ][random.below(4) as usize];
            let at = start + random.below(len) as usize;
            bad[at] = match random.below(3) {
                0 => random.next() as u8,
                1 => bad[at] ^ (1 << random.below(8)),
                _ => bad[at].wrapping_add(1),
            };
        }
        let storage = Arc::new(MemoryStorage::new(bad.clone()));
        let options = OpenOptions::new(Format::Qcow2);
        let opened = Image::open_over(Path::new("bad"), storage.clone(), &options, None);
        let Ok(image) = opened else { continue };
        let found = image.bitmaps();
        listed += usize::from(found.is_ok());
        for bitmap in found.unwrap_or_default() {
            let _ = image.dirty_ranges(&bitmap.name, 0..SIZE);
            let _ = image.merge_bitmap("two", &bitmap.name);
        }
        let mut ops = Ops::new(random.next(), SIZE, CLUSTER);
        let done = (0..5).try_for_each(|_| perform(&image, &ops.next()));
        let _ = image.clear_bitmap("one");
        let _ = image.add_bitmap("three", None, true);
        let _ = image.resize(SIZE + 65536, &ResizeOptions::default());
        let _ = image.remove_bitmap("two");
        let _ = image.close();
        // Then the crate has checked the numbers by which the suites' checker counts.
        if done.is_ok() && check(&bad).corruptions.is_empty() {
            let report = check(&storage.to_vec());
            assert!(report.corruptions.is_empty(), "{:?}", report.corruptions);
            sound += 1;
        }
    }
    assert!(listed > 100 && sound > 100, "{listed}, {sound}");
}
