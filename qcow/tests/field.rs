//! What others got wrong, by name: each test is a bug that an implementation of qcow2 had.
//!
//! Elsewhere: a live L2 table handed out after an offline resize (`resize`), an image that doubles
//! because refcount blocks are never used again (`compact`), clusters freed while their I/O is in
//! flight (`concurrent`, `interleave`), `lazy_refcounts` dropped on open (`model`).

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, OnceLock, Weak};

use cowshed_qcow::{
    CreateOptions, Format, Image, MemoryStorage, OpenOptions, Plan, Storage, create,
};
use support::check::check;
use support::model::{SECTOR, content};
use support::{Files, Random, have_qemu, qemu_content, qemu_create, qemu_img, qemu_io};

const NAME: &str = "field.qcow2";

fn open_bytes(bytes: Vec<u8>) -> (Image, Arc<MemoryStorage>) {
    let storage = Arc::new(MemoryStorage::new(bytes));
    let options = OpenOptions::new(Format::Qcow2);
    let image = Image::open_over(Path::new(NAME), storage.clone(), &options, None).unwrap();
    (image, storage)
}

fn open(path: &Path) -> cowshed_qcow::Result<Image> {
    Image::open(path, &OpenOptions::new(Format::Qcow2), &Files::default())
}

fn number(image: &[u8], at: usize) -> usize {
    u64::from_be_bytes(image[at..at + 8].try_into().unwrap()) as usize
}

/// Where the first L2 table is.
fn first_l2(image: &[u8]) -> usize {
    number(image, number(image, 40)) & 0x00ff_ffff_ffff_fe00
}

/// A disk of QEMU's making with a megabyte of data.
fn golden(options: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    qemu_create(folder, options, NAME, "4M");
    qemu_io(folder, NAME, &["write -P 1 0 1M".into()]);
    std::fs::read(folder.join(NAME)).unwrap()
}

/// Cluster 0 is the header's, whatever its refcount says, and an L2 entry that names it names
/// nothing.
#[test]
fn the_allocator_hands_out_cluster_0() {
    if !have_qemu() {
        return;
    }
    let mut bytes = golden("cluster_size=4k");
    let block = number(&bytes, number(&bytes, 48));
    bytes[block..block + 2].fill(0);
    let l2 = first_l2(&bytes);
    bytes[l2..l2 + 8].copy_from_slice(&(1_u64 << 63).to_be_bytes());
    let header = bytes[..512].to_vec();
    let (image, storage) = open_bytes(bytes);
    image.write(0, &[9; 8192]).unwrap();
    for offset in (0..image.size()).step_by(64 << 10) {
        image.write(offset, &vec![9; 64 << 10]).unwrap();
        image.flush().unwrap();
        image.discard(offset, 32 << 10).unwrap();
    }
    drop(image);
    assert!(
        storage.to_vec()[..512] == header,
        "the header was overwritten"
    );
}

/// Writes to the image while one of its freed clusters is about to be punched.
#[derive(Default)]
struct Intruder {
    bytes: MemoryStorage,
    image: OnceLock<Weak<Image>>,
}

/// What is written meanwhile: more than was freed.
const MEANWHILE: u64 = 32 << 10;

impl Storage for Intruder {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.bytes.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.bytes.write_at(offset, buf)
    }
    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.bytes.zero(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        if let Some(image) = self.image.get().and_then(Weak::upgrade) {
            image.write(512 << 10, &[7; MEANWHILE as usize]).unwrap();
        }
        self.bytes.punch(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        self.bytes.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.bytes.set_len(len)
    }
}

#[test]
fn a_late_punch_hits_a_reused_cluster() {
    let storage = Arc::new(Intruder::default());
    let options = CreateOptions {
        cluster_size: 4096,
        ..CreateOptions::new(1 << 20)
    };
    create(Path::new(NAME), storage.clone(), &options).unwrap();
    let options = OpenOptions::new(Format::Qcow2);
    let image = Image::open_over(Path::new(NAME), storage.clone(), &options, None).unwrap();
    let image = Arc::new(image);
    image.write(0, &[1; MEANWHILE as usize / 2]).unwrap();
    image.flush().unwrap();
    storage.image.set(Arc::downgrade(&image)).unwrap();
    image.discard(0, MEANWHILE / 2).unwrap();
    image.flush().unwrap();
    let mut now = [0; MEANWHILE as usize];
    image.read(512 << 10, &mut now).unwrap();
    assert!(
        now == [7; MEANWHILE as usize],
        "a write that ended was punched away"
    );
}

#[test]
fn writes_in_place_with_copied_clear() {
    if !have_qemu() {
        return;
    }
    let mut bytes = golden("cluster_size=4k");
    let l2 = first_l2(&bytes);
    bytes[l2] &= 0x7f;
    let host = number(&bytes, l2);
    let (image, storage) = open_bytes(bytes);
    assert!(matches!(image.plan_write(0, 512).unwrap(), Plan::Slow));
    image.write(512, &[9; 512]).unwrap();
    assert!(
        storage.to_vec()[host..host + 4096] == [1; 4096],
        "perhaps a snapshot's cluster was written"
    );
    let mut now = [0; 1024];
    image.read(0, &mut now).unwrap();
    assert!(now[..512] == [1; 512] && now[512..] == [9; 512]);
}

/// Threads write sectors beside each other over three files: each sector keeps its own.
#[test]
fn multi_queue_writes_over_a_chain() {
    const QUEUES: usize = 4;
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "0", "1M"]);
    for i in 0..3 {
        let name = i.to_string();
        if i > 0 {
            let below = (i - 1).to_string();
            let args = [
                "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &below, &name,
            ];
            qemu_img(folder, &args);
        }
        qemu_io(
            folder,
            &name,
            &[format!("write -P {} {}k 400k", i + 1, i * 200)],
        );
    }
    let bases = || ["0", "1"].map(|name| std::fs::read(folder.join(name)).unwrap());
    let before = bases();
    let image = open(&folder.join("2")).unwrap();
    let mut expected = content(&image);
    std::thread::scope(|scope| {
        for queue in 0..QUEUES {
            let image = &image;
            scope.spawn(move || {
                for sector in (queue..2048).step_by(QUEUES) {
                    let byte = [sector as u8 | 1; SECTOR];
                    image.write((sector * SECTOR) as u64, &byte[..]).unwrap();
                    if sector % 512 == queue {
                        image.flush().unwrap();
                    }
                }
            });
        }
    });
    for (sector, bytes) in expected.chunks_mut(SECTOR).enumerate() {
        bytes.fill(sector as u8 | 1);
    }
    assert!(content(&image) == expected);
    drop(image);
    assert!(qemu_content(folder, "2", "qcow2") == expected);
    qemu_img(folder, &["check", "-q", "2"]);
    assert!(bases() == before);
}

/// Headers of 72 (version 2), 104, 112 and 128 bytes: the extensions come where each ends.
#[test]
fn the_backing_format_is_read_only_when_the_header_is_long() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("base"), [5; 512]).unwrap();
    for compat in ["0.10", "1.1"] {
        let options = format!("compat={compat}");
        let args = ["create", "-q", "-f", "qcow2", "-o", &options];
        qemu_img(
            folder,
            &[&args[..], &["-b", "base", "-F", "raw", compat]].concat(),
        );
    }
    let image = std::fs::read(folder.join("1.1")).unwrap();
    let name_at = number(&image, 8);
    for (length, file) in [(104, "short"), (128, "long")] {
        let mut other = image.clone();
        other[100..104].copy_from_slice(&(length as u32).to_be_bytes());
        let name_to = name_at + length - 112;
        other[104..4096].fill(0);
        other[length..name_to + 4].copy_from_slice(&image[112..name_at + 4]);
        other[8..16].copy_from_slice(&(name_to as u64).to_be_bytes());
        std::fs::write(folder.join(file), other).unwrap();
    }
    for name in ["0.10", "1.1", "short", "long"] {
        let said = qemu_img(folder, &["info", "--output=json", name]);
        assert!(
            said.contains("\"backing-filename-format\": \"raw\""),
            "{name}: {said}"
        );
        let image = open(&folder.join(name)).unwrap();
        assert_eq!(image.backing().unwrap().format, Some(Format::Raw), "{name}");
        let mut bytes = [0; 512];
        image.read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [5; 512], "{name}");
    }
}

/// The magic number of the extension is 0xe2792aca and nothing else: what looks like a format under
/// another number is none.
#[test]
fn the_backing_format_is_read_with_the_wrong_magic() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("base"), [5; 512]).unwrap();
    let args = [
        "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top",
    ];
    qemu_img(folder, &args);
    let mut bytes = std::fs::read(folder.join("top")).unwrap();
    assert_eq!(bytes[112..116], [0xe2, 0x79, 0x2a, 0xca]);
    bytes[112..116].copy_from_slice(&[0xe2, 0x79, 0x2a, 0xac]);
    std::fs::write(folder.join("top"), bytes).unwrap();
    assert!(
        open(&folder.join("top")).is_err(),
        "the format is not recorded, and never guessed"
    );
}

#[test]
fn the_zero_flag_is_ignored_over_a_backing_file() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("base"), vec![5; 1 << 20]).unwrap();
    for (name, options) in [("plain", "cluster_size=64k"), ("parts", "extended_l2=on")] {
        let args = [
            "create", "-q", "-f", "qcow2", "-o", options, "-F", "raw", "-b", "base", name,
        ];
        qemu_img(folder, &args);
        let zero = [
            "write -P 6 128k 128k",
            "write -z 64k 128k",
            "write -z -u 512k 4k",
        ];
        qemu_io(folder, name, &zero.map(String::from));
        let image = open(&folder.join(name)).unwrap();
        let now = content(&image);
        assert!(
            now[64 << 10..192 << 10].iter().all(|&byte| byte == 0),
            "{name}"
        );
        assert!(
            now[512 << 10..516 << 10].iter().all(|&byte| byte == 0),
            "{name}"
        );
        assert!(now == qemu_content(folder, name, "qcow2"), "{name}");
        // And ours, over the base and over what QEMU wrote.
        image.write_zeroes(320 << 10, 64 << 10, false).unwrap();
        image.discard(192 << 10, 64 << 10).unwrap();
        let now = content(&image);
        drop(image);
        assert!(
            now[320 << 10..384 << 10].iter().all(|&byte| byte == 0),
            "{name}"
        );
        assert!(now == qemu_content(folder, name, "qcow2"), "{name}");
    }
}

/// Without a secret an encrypted disk is not read, as ciphertext or otherwise.
#[test]
fn an_encrypted_image_is_opened_as_plain() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (format, more) in [("luks", ",encrypt.iter-time=10"), ("aes", "")] {
        let options = format!("encrypt.format={format},encrypt.key-secret=s{more}");
        let secret = "secret,id=s,data=moo";
        let made = Command::new("qemu-img")
            .args([
                "create", "-q", "-f", "qcow2", "--object", secret, "-o", &options,
            ])
            .args([format, "1M"])
            .current_dir(folder)
            .output()
            .unwrap();
        if !made.status.success() {
            eprintln!("skipped: this qemu-img makes no image encrypted with {format}");
            continue;
        }
        let image = open(&folder.join(format));
        let read = image.and_then(|image| image.read(0, &mut [0; 512]));
        assert!(read.is_err(), "{format}");
    }
}

/// A file that has been written for long is no longer than what it holds, whatever was freed when.
#[test]
fn freed_clusters_are_counted_twice_or_lost() {
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions {
        cluster_size: 512,
        ..CreateOptions::new(256 << 10)
    };
    create(Path::new(NAME), storage.clone(), &options).unwrap();
    let options = OpenOptions::new(Format::Qcow2);
    let image = Image::open_over(Path::new(NAME), storage.clone(), &options, None).unwrap();
    let mut random = Random(1);
    for i in 0..3000 {
        let offset = random.below(500) * 512;
        match random.below(4) {
            0 => image.discard(offset, 4096).unwrap(),
            1 => image.write_zeroes(offset, 2048, true).unwrap(),
            _ => image.write(offset, &[i as u8; 1536]).unwrap(),
        }
        if i % 50 == 0 {
            image.flush().unwrap();
        }
    }
    drop(image);
    check(&storage.to_vec()).assert_clean("in the end");
}
