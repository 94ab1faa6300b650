//! Images made to harm: each is refused by field, offset, value and expectation, or marked
//! corrupt; nothing panics, and no number of an image sizes anything unchecked.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use cowshed_qcow::{
    CreateOptions, Error, Format, Image, MemoryStorage, OpenOptions, Storage, create, is_qcow2,
};
use support::model::{Ops, perform};
use support::{Random, have_qemu, qemu_img, qemu_io};

fn open(bytes: &[u8], read_only: bool) -> cowshed_qcow::Result<(Image, Arc<MemoryStorage>)> {
    let storage = Arc::new(MemoryStorage::new(bytes.to_vec()));
    let options = OpenOptions {
        read_only,
        ..OpenOptions::new(Format::Qcow2)
    };
    let image = Image::open_over(Path::new("hostile.qcow2"), storage.clone(), &options, None)?;
    Ok((image, storage))
}

/// The whole chain of an error's messages.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}

/// An image of QEMU's with some data in it.
fn golden(options: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let args = ["create", "-q", "-f", "qcow2", "-o", options, "disk", "4M"];
    qemu_img(folder.path(), &args);
    qemu_io(
        folder.path(),
        "disk",
        &["write -P 1 0 100k".into(), "write -P 2 2M 64k".into()],
    );
    std::fs::read(folder.path().join("disk")).unwrap()
}

fn poke(image: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut image = image.to_vec();
    image[at..at + bytes.len()].copy_from_slice(bytes);
    image
}

fn number(image: &[u8], at: usize) -> usize {
    u64::from_be_bytes(image[at..at + 8].try_into().unwrap()) as usize
}

fn offset(entry: usize) -> usize {
    entry & 0x00ff_ffff_ffff_fe00
}

/// ARCHITECTURE.md's "refuse, never guess".
#[test]
fn refuse_never_guess() {
    if !have_qemu() {
        return;
    }
    let image = golden("cluster_size=64k");
    assert!(open(&image, false).is_ok());
    let small = |value: u32| value.to_be_bytes().to_vec();
    let large = |value: u64| value.to_be_bytes().to_vec();
    let cases: &[(usize, Vec<u8>, &str)] = &[
        (
            0,
            small(0x5146_4900),
            "magic number at offset 0x0 is 0x51464900",
        ),
        (4, small(1), "version at offset 0x4 is 1, expected 2 or 3"),
        (4, small(4), "version"),
        (8, large(1), "backing_file_offset"),
        (8, large(65537), "backing_file_offset"),
        (
            8,
            [large(65000), small(1023)].concat(),
            "backing_file_size at offset 0x10 is 1023",
        ),
        (
            8,
            [large(112), small(u32::MAX)].concat(),
            "backing_file_size",
        ),
        (
            20,
            small(0),
            "cluster_bits at offset 0x14 is 0, expected 9 to 21",
        ),
        (20, small(8), "cluster_bits"),
        (20, small(22), "cluster_bits"),
        (20, small(63), "cluster_bits"),
        (20, small(64), "cluster_bits"),
        (20, small(u32::MAX), "cluster_bits"),
        (24, large(u64::MAX), "size at offset 0x18"),
        (
            24,
            large(1 << 40),
            "l1_size at offset 0x24 is 1, expected 2048",
        ),
        (32, small(1), "it is encrypted, and no password was given"),
        (
            32,
            small(2),
            "crypt_method at offset 0x20 is 2, expected 2 with",
        ),
        (32, small(3), "crypt_method"),
        (36, small(0), "l1_size"),
        (36, small(u32::MAX), "l1_size"),
        (36, small((32 << 20) / 8 + 1), "l1_size"),
        (36, small((32 << 20) / 8), "l1_table_offset"),
        (40, large(0), "l1_table_offset"),
        (40, large(512), "l1_table_offset"),
        (40, large(1 << 40), "l1_table_offset"),
        (40, large(u64::MAX - 65535), "l1_table_offset"),
        (48, large(65537), "refcount_table_offset"),
        (48, large(1 << 62), "refcount_table_offset"),
        (
            56,
            small(0),
            "refcount_table_clusters at offset 0x38 is 0, expected 1 to 128",
        ),
        (56, small(u32::MAX), "refcount_table_clusters"),
        (60, small(65537), "nb_snapshots"),
        (60, [small(1), large(77)].concat(), "snapshots_offset"),
        (72, large(1 << 2), "no data file (bit 2) without a name"),
        (72, large(1 << 5), "bit 5"),
        (72, large(1 << 63), "bit 63 (a feature without a name)"),
        (72, large(1 << 3), "compression_type"),
        (
            96,
            small(7),
            "refcount_order at offset 0x60 is 7, expected 0 to 6",
        ),
        (100, small(103), "header_length"),
        (100, small(108), "header_length at offset 0x64 is 108"),
        (100, small(u32::MAX), "header_length"),
        (104, vec![1], "compression_type"),
        (104, vec![2], "compression type 2"),
        (
            112,
            [small(0x1234), small(u32::MAX)].concat(),
            "header extension 0x00001234's length",
        ),
        (
            112,
            [small(0x2385_2875), small(23)].concat(),
            "bitmaps extension's length",
        ),
    ];
    for (at, bytes, expected) in cases {
        let error = open(&poke(&image, *at, bytes), true).err();
        let text = describe(&error.unwrap_or_else(|| panic!("{at}: {bytes:?} opens")));
        assert!(text.contains(expected), "{at}: {bytes:?}: {text}");
        assert!(text.contains("hostile.qcow2"), "{text}");
    }

    // A corrupt image can be read; a dirty one is written once its refcounts are rebuilt.
    let bad = poke(&image, 72, &large(1 << 1));
    assert!(open(&bad, true).is_ok());
    assert!(describe(&open(&bad, false).err().unwrap()).contains("corrupt"));
    let bad = poke(&image, 72, &large(1 << 0));
    let (_, storage) = open(&bad, true).unwrap();
    assert_eq!(storage.to_vec(), bad);
    let (_, storage) = open(&bad, false).unwrap();
    assert_eq!(storage.to_vec(), image);
    // Unknown compatible and autoclear bits are fine, and the latter are cleared by a write only.
    let odd = poke(&image, 80, &[large(1 << 40), large(1 << 41)].concat());
    let (disk, storage) = open(&odd, false).unwrap();
    disk.flush().unwrap();
    assert_eq!(storage.to_vec()[80..96], odd[80..96]);
    disk.write(0, &[5; 512]).unwrap();
    assert_eq!(
        storage.to_vec()[80..96],
        [large(1 << 40), large(0)].concat()
    );
}

#[test]
fn a_feature_is_refused_by_the_name_the_image_gives_it() {
    if !have_qemu() {
        return;
    }
    let image = golden("cluster_size=64k");
    let table = image
        .windows(4)
        .position(|w| w == [0x68, 0x03, 0xf8, 0x57])
        .unwrap();
    let mut entry = [0; 48];
    entry[1] = 9;
    entry[2..10].copy_from_slice(b"hologram");
    let named = poke(
        &poke(&image, table + 8, &entry),
        72,
        &(1_u64 << 9).to_be_bytes(),
    );
    let text = describe(&open(&named, true).err().unwrap());
    assert!(
        text.contains("the incompatible feature bit 9 (hologram)"),
        "{text}"
    );
}

#[test]
fn corrupt_tables_are_errors_when_they_are_met() {
    if !have_qemu() {
        return;
    }
    let image = golden("cluster_size=64k");
    let l1 = number(&image, 40);
    let l2 = offset(number(&image, l1));
    let read = |bytes: &[u8]| {
        let (disk, _) = open(bytes, true).unwrap();
        // The rest of the disk does not suffer, unless the L1 table is hit.
        describe(&disk.read(0, &mut [0; 512]).unwrap_err())
    };
    let entry = |value: u64| value.to_be_bytes();
    let cases = [
        (l1, entry(1 << 63 | 0x1_0200), "L1 entry"),
        (l1, entry(1 << 63 | 1 << 57 | 0x1_0000), "no reserved bit"),
        (
            l1,
            entry(1 << 63 | 1 << 50),
            "an L2 table before the file's end",
        ),
        (l2, entry(1 << 63 | 0x5_0200), "a multiple of 65536"),
        (l2, entry(1 << 63 | 0x5_0002), "no reserved bit"),
        (
            l2,
            entry(1 << 63 | 1 << 50),
            "a cluster before the file's end",
        ),
        (
            l2,
            entry(1 << 62 | 1 << 50),
            "a cluster before the file's end",
        ),
        (l2, entry(1 << 62 | 3), "compressed cluster"),
    ];
    for (at, bytes, expected) in cases {
        let text = read(&poke(&image, at, &bytes));
        assert!(text.contains(expected), "{bytes:x?}: {text}");
    }
    // Version 2 knows no zero flag: it is an error there, and no zeros.
    let old = golden("cluster_size=64k,compat=0.10");
    let l2 = offset(number(&old, offset(number(&old, 40))));
    assert!(read(&poke(&old, l2, &entry(1))).contains("no reserved bit"));
}

/// Writes never land on metadata: the corrupt bit is set, and nothing else is written.
#[test]
fn guest_writes_never_reach_metadata() {
    if !have_qemu() {
        return;
    }
    let image = golden("cluster_size=64k");
    let (l1, table) = (number(&image, 40), number(&image, 48));
    let block = number(&image, table);
    let l2 = offset(number(&image, l1));
    for target in [l1, table, block, l2] {
        let entry = (1_u64 << 63 | target as u64).to_be_bytes();
        let bad = poke(&image, l2, &entry);
        let (disk, storage) = open(&bad, false).unwrap();
        let error = disk.write(0, &[0xff; 4096]).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error:?}");
        assert!(
            disk.write(3 << 20, &[0xff; 512]).is_err(),
            "writing has stopped"
        );
        assert_eq!(
            storage.to_vec(),
            poke(&bad, 72, &2_u64.to_be_bytes()),
            "only the bit is set"
        );
        // What is marked so is read, and no more written.
        let marked = storage.to_vec();
        drop(disk);
        assert!(matches!(open(&marked, false), Err(Error::Corrupt { .. })));
        let (disk, storage) = open(&marked, true).unwrap();
        disk.read(3 << 20, &mut [0; 512]).unwrap();
        assert!(disk.write(3 << 20, &[0xff; 512]).is_err());
        assert_eq!(storage.to_vec(), marked);
    }
    // Refcounts that call metadata free.
    for cluster in [l1, table, block, l2].map(|at| at >> 16) {
        let bad = poke(&image, block + cluster * 2, &[0, 0]);
        let (disk, storage) = open(&bad, false).unwrap();
        let error = disk.write(3 << 20, &[0xff; 65536]).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error:?}");
        assert_eq!(storage.to_vec(), poke(&bad, 72, &2_u64.to_be_bytes()));
    }
    // Two L1 entries that claim the same L2 table for themselves.
    let mut twins = golden("cluster_size=512");
    let l1 = number(&twins, 40);
    let first: Vec<u8> = twins[l1..l1 + 8].to_vec();
    twins[l1 + 8..l1 + 16].copy_from_slice(&first);
    let (disk, _) = open(&twins, false).unwrap();
    assert!(matches!(
        disk.write(0, &[1; 512]),
        Err(Error::Corrupt { .. })
    ));
}

/// What is past the file's end would be taken for zeros, and the file grown to there.
#[test]
fn refcount_blocks_past_the_end_are_refused() {
    if !have_qemu() {
        return;
    }
    let image = golden("cluster_size=64k");
    let bad = poke(&image, number(&image, 48) + 8, &(1_u64 << 40).to_be_bytes());
    let (disk, storage) = open(&bad, false).unwrap();
    let text = describe(&disk.write(0, &[1; 512]).unwrap_err());
    assert!(
        text.contains("refcount table entry at offset 0x10008 is 0x0000010000000000"),
        "{text}"
    );
    assert_eq!(storage.to_vec(), bad, "nothing was written");
}

/// Whatever bytes tables and header have: no panic, no endless loop, bounded memory.
#[test]
fn random_damage_never_panics() {
    if !have_qemu() {
        return;
    }
    for (seed, options) in [
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=64k,compat=0.10",
    ]
    .into_iter()
    .enumerate()
    {
        let image = golden(options);
        let mut random = Random(seed as u64);
        let hot = image.len().min(12 << 10) as u64;
        for _ in 0..150 {
            let mut bad = image.clone();
            for _ in 0..1 + random.below(12) {
                let at = match random.below(3) {
                    0 => random.below(112),
                    1 => number(&image, 40) as u64 + random.below(64),
                    _ => random.below(hot),
                };
                bad[at as usize] = random.next() as u8;
            }
            let Ok((disk, _)) = open(&bad, false) else {
                continue;
            };
            if disk.size() == 0 || disk.size() > 64 << 20 {
                continue;
            }
            let mut ops = Ops::new(random.next(), disk.size(), disk.cluster_size().into());
            for _ in 0..20 {
                let _ = perform(&disk, &ops.next());
                let _ = disk.read(random.below(disk.size() / 512) * 512, &mut [0; 512]);
            }
        }
    }
}

/// Storage that counts the bytes that are asked of it at once.
#[derive(Default)]
struct Huge {
    header: Vec<u8>,
    largest: Mutex<usize>,
}

impl Storage for Huge {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut largest = self.largest.lock().unwrap();
        *largest = buf.len().max(*largest);
        buf.fill(0);
        for (i, byte) in self
            .header
            .iter()
            .enumerate()
            .skip(offset as usize)
            .take(buf.len())
        {
            buf[i - offset as usize] = *byte;
        }
        Ok(())
    }
    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn zero(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn punch(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        Ok(i64::MAX as u64)
    }
    fn set_len(&self, _: u64) -> io::Result<()> {
        Ok(())
    }
}

/// ARCHITECTURE.md's "bounded": the largest disk and tables that the format allows, in a file as long
/// as a file can be, and no buffer is larger than the largest L1 table.
#[test]
fn bounded() {
    let small = MemoryStorage::default();
    let small = Arc::new(small);
    create(
        Path::new("small"),
        small.clone(),
        &CreateOptions::new(1 << 20),
    )
    .unwrap();
    let mut header = small.to_vec()[..65536].to_vec();
    header[24..32].copy_from_slice(&(2_u64 << 50).to_be_bytes());
    header[36..40].copy_from_slice(&((32_u32 << 20) / 8).to_be_bytes());
    header[40..48].copy_from_slice(&(1_u64 << 60).to_be_bytes());
    let storage = Arc::new(Huge {
        header,
        ..Huge::default()
    });
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::new(Format::Qcow2)
    };
    let image = Image::open_over(Path::new("huge"), storage.clone(), &options, None).unwrap();
    assert_eq!(image.size(), 2 << 50);
    image.read(image.size() - 512, &mut [1; 512]).unwrap();
    assert!(
        matches!(image.plan_read(0, 1 << 50), Ok(cowshed_qcow::Plan::Fast { extents, .. })
        if extents.len() == 1)
    );
    assert!(*storage.largest.lock().unwrap() <= 32 << 20);
    assert!(image.read(image.size(), &mut [1; 512]).is_err());
    drop(image);
    let options = OpenOptions::new(Format::Qcow2);
    let image = Image::open_over(Path::new("huge"), storage, &options, None).unwrap();
    // As many steps as there are L2 tables, not as there are clusters.
    image.discard(0, image.size()).unwrap();
    assert!(image.plan_read(u64::MAX, 2).is_err());
}

#[test]
fn raw_is_raw_whatever_it_holds() {
    let inner = Arc::new(MemoryStorage::default());
    create(
        Path::new("inner"),
        inner.clone(),
        &CreateOptions::new(1 << 20),
    )
    .unwrap();
    assert!(is_qcow2(&*inner).unwrap());
    let bytes = inner.to_vec();
    let raw = OpenOptions::new(Format::Raw);
    let image = Image::open_over(Path::new("raw"), inner, &raw, None).unwrap();
    assert_eq!(image.size(), bytes.len() as u64);
    let mut content = vec![0; bytes.len()];
    image.read(0, &mut content).unwrap();
    assert_eq!(content, bytes);
}
