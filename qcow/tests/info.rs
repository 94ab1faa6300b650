//! What images say of themselves, held against `qemu-img info`.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cowshed_qcow::{
    Compression, CreateOptions, EncryptionInfo, FileStorage, Info, LuksInfo, MemoryStorage,
    Storage, create,
};
use serde_json::{Value, json};
use support::encryption::qemu_create;
use support::{have_qemu, qemu_img, qemu_io};

fn read(path: &Path) -> Info {
    let file = std::fs::File::open(path).unwrap();
    Info::read(path, Arc::new(FileStorage::new(file))).unwrap()
}

/// The same words as in `qemu-img info --output=json`.
fn in_words(info: &Info) -> Value {
    let mut data = json!({
        "compat": if info.version == 2 { "0.10" } else { "1.1" },
        "compression-type": match info.compression {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        },
        "refcount-bits": info.refcount_bits,
    });
    let data_map = data.as_object_mut().unwrap();
    let mut add = |key: &str, value: Value| data_map.insert(key.into(), value);
    if info.version == 3 {
        add("lazy-refcounts", json!(info.lazy_refcounts));
        add("corrupt", json!(info.corrupt));
        add("extended-l2", json!(info.extended_l2));
    }
    if let Some(name) = &info.data_file {
        add("data-file", json!(name));
        add("data-file-raw", json!(info.data_file_raw));
    }
    match &info.encryption {
        None => {}
        Some(EncryptionInfo::LegacyAes) => {
            add("encrypt", json!({"format": "aes"}));
        }
        Some(EncryptionInfo::Luks(luks)) => {
            add("encrypt", luks_in_words(luks));
        }
    }
    if !info.bitmaps.is_empty() {
        let bitmaps = info.bitmaps.iter().map(|bitmap| {
            let flags = [("in-use", bitmap.in_use), ("auto", bitmap.enabled)];
            let flags = flags.iter().filter(|(_, set)| *set).map(|(name, _)| name);
            json!({
                "name": bitmap.name,
                "granularity": bitmap.granularity,
                "flags": flags.collect::<Vec<_>>(),
            })
        });
        add("bitmaps", bitmaps.collect());
    }
    let mut all = json!({
        "virtual-size": info.virtual_size,
        "cluster-size": info.cluster_size,
        "format": "qcow2",
        "actual-size": info.allocated,
        "dirty-flag": info.dirty,
        "format-specific": {"type": "qcow2", "data": data},
    });
    let all_map = all.as_object_mut().unwrap();
    if info.encryption.is_some() {
        all_map.insert("encrypted".into(), json!(true));
    }
    if let Some(backing) = &info.backing {
        all_map.insert("backing-filename".into(), json!(backing.name));
        if let Some(format) = backing.format {
            all_map.insert("backing-filename-format".into(), json!(format.name()));
        }
    }
    if !info.snapshots.is_empty() {
        let names = info.snapshots.iter().map(|snapshot| {
            let date = snapshot.date.duration_since(std::time::UNIX_EPOCH).unwrap();
            json!({
                "id": snapshot.id,
                "name": snapshot.name,
                "vm-state-size": snapshot.vm_state_size,
                "date-sec": date.as_secs(),
                "date-nsec": date.subsec_nanos(),
                "vm-clock-sec": snapshot.vm_clock.as_secs(),
                "vm-clock-nsec": snapshot.vm_clock.subsec_nanos(),
            })
        });
        all_map.insert("snapshots".into(), names.collect());
    }
    all
}

fn luks_in_words(luks: &LuksInfo) -> Value {
    let (mode, iv) = luks.cipher_mode.split_once('-').unwrap();
    let slots = luks.slots.iter().map(|slot| match slot.iterations {
        None => json!({"active": false, "key-offset": slot.offset}),
        Some(iterations) => json!({
            "active": true,
            "key-offset": slot.offset,
            "iters": iterations,
            "stripes": slot.stripes,
        }),
    });
    let mut words = json!({
        "format": "luks",
        "cipher-alg": format!("{}-{}", luks.cipher, luks.key_bits),
        "cipher-mode": mode,
        "ivgen-alg": iv,
        "hash-alg": luks.hash,
        "uuid": luks.uuid,
        "payload-offset": luks.payload_offset,
        "master-key-iters": luks.digest_iterations,
        "slots": slots.collect::<Vec<_>>(),
    });
    if let Some((iv, hash)) = iv.split_once(':') {
        words["ivgen-alg"] = json!(iv);
        words["ivgen-hash-alg"] = json!(hash);
    }
    words
}

fn assert_as_qemu(folder: &Path, name: &str) {
    let said = qemu_img(folder, &["info", "-f", "qcow2", "--output=json", name]);
    let mut expected: Value = serde_json::from_str(&said).unwrap();
    let all = expected.as_object_mut().unwrap();
    // Who asks knows the name; where backing files are is for who may open them to say; and some
    // releases say more, such as the children of the block graph.
    for key in ["filename", "full-backing-filename", "children"] {
        all.remove(key);
    }
    for snapshot in all
        .get_mut("snapshots")
        .into_iter()
        .flat_map(|list| list.as_array_mut())
    {
        for snapshot in snapshot {
            snapshot.as_object_mut().unwrap().remove("icount");
        }
    }
    let encrypt = &mut expected["format-specific"]["data"]["encrypt"];
    if let Some(encrypt) = encrypt.as_object_mut() {
        encrypt.remove("detached-header");
    } else {
        let data = expected["format-specific"]["data"].as_object_mut();
        data.unwrap().retain(|_, value| !value.is_null());
    }
    assert_eq!(in_words(&read(&folder.join(name))), expected, "{name}");
}

#[test]
fn images_of_every_kind() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("base"), [1; 4096]).unwrap();
    for (i, (options, more)) in [
        ("cluster_size=512", &[][..]),
        ("cluster_size=2M,lazy_refcounts=on", &[]),
        ("compat=0.10", &["-b", "base", "-F", "raw"]),
        ("refcount_bits=1", &["-b", "base", "-F", "raw"]),
        ("refcount_bits=64,extended_l2=on", &[]),
        ("compression_type=zstd", &[]),
        ("data_file=data", &[]),
        ("data_file=data-raw,data_file_raw=on", &[]),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("{i}");
        let args = ["create", "-q", "-f", "qcow2", "-o", options];
        qemu_img(folder, &[&args, more, &[&name, "3M"]].concat());
        assert_as_qemu(folder, &name);
    }
}

#[test]
fn encrypted_images() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let luks = "encrypt.format=luks,encrypt.iter-time=10";
    let old = "encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256";
    let luks = format!("{luks},{old},encrypt.cipher-alg=aes-128");
    for (i, options) in [&*luks, "encryption=on"].into_iter().enumerate() {
        let name = format!("{i}");
        qemu_create(folder, &name, options);
        assert_as_qemu(folder, &name);
    }
}

#[test]
fn snapshots_bitmaps_and_flags() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "disk", "3M"]);
    for i in 0..3 {
        qemu_io(folder, "disk", &[format!("write -P {i} 0 1M")]);
        qemu_img(folder, &["snapshot", "-c", &format!("number {i}"), "disk"]);
        qemu_img(
            folder,
            &[
                "bitmap",
                "--add",
                "-g",
                "4k",
                "disk",
                &format!("bitmap {i}"),
            ],
        );
    }
    qemu_img(folder, &["bitmap", "--disable", "disk", "bitmap 1"]);
    assert_as_qemu(folder, "disk");
    // The dirty and the corrupt bit.
    let path = folder.join("disk");
    let mut bytes = std::fs::read(&path).unwrap();
    for bit in [1, 2] {
        bytes[79] |= bit;
        std::fs::write(&path, &bytes).unwrap();
        assert_as_qemu(folder, "disk");
    }
}

/// Counts what is read.
struct Counted(MemoryStorage, AtomicUsize);

impl Storage for Counted {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.1.fetch_add(buf.len(), Ordering::Relaxed);
        self.0.read_at(offset, buf)
    }
    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        panic!("info wrote")
    }
    fn zero(&self, _: u64, _: u64) -> io::Result<()> {
        panic!("info wrote")
    }
    fn punch(&self, _: u64, _: u64) -> io::Result<()> {
        panic!("info wrote")
    }
    fn sync(&self) -> io::Result<()> {
        panic!("info synced")
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, _: u64) -> io::Result<()> {
        panic!("info wrote")
    }
}

/// What is read does not depend on the disk's size, and every byte of the header may be wrong.
#[test]
fn bounded() {
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions {
        backing: Some(("/dev/zero".into(), cowshed_qcow::Format::Raw)),
        ..CreateOptions::new(1 << 44)
    };
    create(Path::new("huge"), storage.clone(), &options).unwrap();
    let bytes = storage.to_vec();
    let info = |bytes: Vec<u8>| {
        let storage = Arc::new(Counted(MemoryStorage::new(bytes), AtomicUsize::new(0)));
        let info = Info::read(Path::new("huge"), storage.clone());
        (info, storage.1.load(Ordering::Relaxed))
    };
    let (found, read) = info(bytes.clone());
    assert_eq!(found.unwrap().virtual_size, 1 << 44);
    assert!(read < 70_000, "{read} bytes");
    for at in 0..300 {
        for value in [0, 1, 0x7f, 0xff] {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            let (_, read) = info(bytes);
            // A cluster, and the table of snapshots to its limit.
            assert!(
                read < (64 << 20) + (4 << 20),
                "{read} bytes: byte {at} is {value}"
            );
        }
    }
}
