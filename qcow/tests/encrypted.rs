//! Encrypted images: QEMU's must read as QEMU reads them, ours must be read by QEMU, and nothing
//! but this crate moves their bytes.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cowshed_qcow::{
    CreateOptions, DataFile, Format, Image, MemoryStorage, NewEncryption, NewSnapshot, OpenOptions,
    Plan, Preallocation, ResizeOptions, Selector, Storage, create,
};
use support::encryption::{Qemu, SIZE, exercise, luks, make, open, options, qemu_create, scribble};
use support::model::content;
use support::{Files, have_qemu, qemu_img};

/// Nine of the product of the algorithms, in which each pair occurs that QEMU can make: it has no
/// keys of 192 bits but for XTS. All of the product if `ENCRYPTED_ALL` is set.
fn algorithms() -> Vec<[&'static str; 4]> {
    const ESSIV: &str = "essiv,encrypt.ivgen-hash-alg=sha256";
    let mut found = vec![
        ["xts", "aes-256", "plain64", "sha256"],
        ["xts", "aes-128", "plain", "sha1"],
        ["xts", "aes-192", ESSIV, "sha512"],
        ["cbc", "aes-256", ESSIV, "sha256"],
        ["cbc", "aes-128", "plain64", "sha512"],
        ["cbc", "aes-256", "plain", "sha1"],
        ["ecb", "aes-128", "plain", "sha256"],
        ["ecb", "aes-256", ESSIV, "sha1"],
        ["ecb", "aes-256", "plain64", "sha512"],
    ];
    if std::env::var_os("ENCRYPTED_ALL").is_some() {
        found.clear();
        for mode in ["xts", "cbc", "ecb"] {
            for cipher in ["aes-128", "aes-192", "aes-256"] {
                for iv in ["plain", "plain64", ESSIV] {
                    let hashes = ["sha1", "sha256", "sha512"];
                    found.extend(hashes.map(|hash| [mode, cipher, iv, hash]));
                }
            }
        }
        found.retain(|[mode, cipher, ..]| *mode == "xts" || *cipher != "aes-192");
    }
    found
}

#[test]
fn every_algorithm_both_ways() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (seed, [mode, cipher, iv, hash]) in algorithms().into_iter().enumerate() {
        let name = format!("{mode}-{cipher}-{iv}-{hash}").replace(",encrypt.ivgen-hash-alg=", "-");
        let cluster = ["64k", "4k", "512"][seed % 3];
        let options = format!(
            "cluster_size={cluster},encrypt.format=luks,encrypt.cipher-mode={mode},\
             encrypt.cipher-alg={cipher},encrypt.ivgen-alg={iv},encrypt.hash-alg={hash},\
             encrypt.iter-time=10"
        );
        qemu_create(folder.path(), &name, &options);
        let qemu = Qemu {
            folder: folder.path(),
            name: &name,
            passwords: &["moo"],
        };
        qemu.io(&scribble(seed as u64));
        let image = open(&folder.path().join(&name), &["moo"]).unwrap();
        assert!(content(&image) == qemu.content(), "{name}");
        drop(image);
        exercise(&qemu, seed as u64, 20);
    }
}

#[test]
fn legacy_aes_both_ways() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (seed, password) in ["moo", "exactly 16 bytes", "much longer than 16 bytes"]
        .iter()
        .enumerate()
    {
        let name = format!("{seed}");
        let object = format!("secret,id=s0,data={password}");
        let options = "encrypt.format=aes,encrypt.key-secret=s0,cluster_size=4k";
        let args = [
            "create", "-q", "-f", "qcow2", "--object", &object, "-o", options, &name, "1M",
        ];
        qemu_img(folder.path(), &args);
        let qemu = Qemu {
            folder: folder.path(),
            name: &name,
            passwords: &[password],
        };
        qemu.io(&scribble(seed as u64));
        let image = open(&folder.path().join(&name), &[password]).unwrap();
        assert!(content(&image) == qemu.content(), "{password}");
        drop(image);
        exercise(&qemu, seed as u64, 60);
    }
}

/// Each file of a chain has its own password, or none; what is read from one is written to another.
#[test]
fn images_that_we_made() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let sizes = [512, 4096, 65536, 2 << 20];
    for (seed, cluster_size) in sizes.into_iter().enumerate() {
        for (kind, encryption) in [
            ("luks", luks("top")),
            ("aes", Some(NewEncryption::LegacyAes)),
        ] {
            let base = format!("base-{kind}-{cluster_size}");
            let new = CreateOptions {
                encryption: luks("base"),
                ..CreateOptions::new(700 << 10)
            };
            make(&folder.join(&base), &new);
            let image = open(&folder.join(&base), &["base"]).unwrap();
            let bytes: Vec<u8> = (0..300_000_u32).map(|i| (i / 100) as u8 | 1).collect();
            image.write(5000, &bytes).unwrap();
            drop(image);

            let name = format!("{kind}-{cluster_size}");
            let new = CreateOptions {
                cluster_size,
                version: [3, 2][seed % 2],
                extended_l2: cluster_size == 65536,
                backing: Some((base, Format::Qcow2)),
                encryption,
                ..CreateOptions::new(SIZE)
            };
            make(&folder.join(&name), &new);
            let qemu = Qemu {
                folder,
                name: &name,
                passwords: &["top", "base"],
            };
            qemu.assert_clean();
            exercise(&qemu, seed as u64, 100);
        }
    }
}

/// What is allocated from the beginning reads as zeros, which no zeros in the file would. (QEMU
/// makes images whose preallocated clusters read as noise.)
#[test]
fn preallocated_images_read_as_zeros() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let kinds = [
        Preallocation::Metadata,
        Preallocation::Falloc,
        Preallocation::Full,
    ];
    for (seed, preallocation) in kinds.into_iter().enumerate() {
        for extended_l2 in [false, true] {
            let name = format!("{preallocation:?}-{extended_l2}");
            let new = CreateOptions {
                preallocation,
                extended_l2,
                encryption: luks("moo"),
                ..CreateOptions::new(SIZE)
            };
            make(&folder.join(&name), &new);
            let len = std::fs::metadata(folder.join(&name)).unwrap().len();
            let image = open(&folder.join(&name), &["moo"]).unwrap();
            assert!(content(&image).iter().all(|&byte| byte == 0), "{name}");
            image.write(0, &vec![7; SIZE as usize]).unwrap();
            drop(image);
            let now = std::fs::metadata(folder.join(&name)).unwrap().len();
            assert_eq!(now, len, "{name}: what has a place got another one");
            if have_qemu() {
                let qemu = Qemu {
                    folder,
                    name: &name,
                    passwords: &["moo"],
                };
                exercise(&qemu, seed as u64, 60);
            }
        }
    }
}

#[test]
fn disks_grow_by_zeros() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let base: Vec<u8> = vec![0x77; 2 << 20];
    std::fs::write(folder.join("base"), base).unwrap();
    let grow = |preallocation| ResizeOptions {
        shrink: true,
        preallocation,
    };
    let kinds = [
        Preallocation::Off,
        Preallocation::Metadata,
        Preallocation::Falloc,
        Preallocation::Full,
    ];
    for (seed, preallocation) in kinds.into_iter().enumerate() {
        for extended_l2 in [false, true] {
            let name = format!("{preallocation:?}-{extended_l2}");
            let new = CreateOptions {
                extended_l2,
                backing: Some(("base".into(), Format::Raw)),
                encryption: luks("moo"),
                ..CreateOptions::new(SIZE)
            };
            make(&folder.join(&name), &new);
            let image = open(&folder.join(&name), &["moo"]).unwrap();
            // Clusters that were in use are used again, with what is in them.
            image.write(SIZE / 2, &vec![7; SIZE as usize / 2]).unwrap();
            image
                .resize(SIZE / 2 + 512, &grow(Preallocation::Off))
                .unwrap();
            image.flush().unwrap();
            image.resize(SIZE * 2, &grow(preallocation)).unwrap();
            let content = content(&image);
            assert!(
                content[..512 * 1024].iter().all(|&byte| byte == 0x77),
                "{name}"
            );
            assert!(
                content[512 * 1024..][..512].iter().all(|&byte| byte == 7),
                "{name}"
            );
            assert!(
                content[513 * 1024..].iter().all(|&byte| byte == 0),
                "{name}"
            );
            drop(image);
            if have_qemu() {
                let qemu = Qemu {
                    folder,
                    name: &name,
                    passwords: &["moo"],
                };
                exercise(&qemu, seed as u64, 40);
            }
        }
    }
    let new = CreateOptions {
        version: 2,
        encryption: luks("moo"),
        ..CreateOptions::new(SIZE)
    };
    make(&folder.join("old"), &new);
    let image = open(&folder.join("old"), &["moo"]).unwrap();
    let refused = image
        .resize(SIZE * 2, &grow(Preallocation::Full))
        .unwrap_err();
    assert!(refused.to_string().contains("version 2"), "{refused}");
    image.resize(SIZE * 2, &grow(Preallocation::Off)).unwrap();
}

#[test]
fn options_that_do_not_go_together() {
    let raw = DataFile {
        name: "data".into(),
        raw: true,
        storage: Arc::new(MemoryStorage::default()),
    };
    let with_raw = CreateOptions {
        data_file: Some(raw),
        ..CreateOptions::new(SIZE)
    };
    let old_and_preallocated = CreateOptions {
        version: 2,
        preallocation: Preallocation::Metadata,
        ..CreateOptions::new(SIZE)
    };
    for (options, expected) in [
        (with_raw, "a raw data file"),
        (old_and_preallocated, "preallocation and encryption"),
    ] {
        let options = CreateOptions {
            encryption: Some(NewEncryption::LegacyAes),
            ..options
        };
        let storage = Arc::new(MemoryStorage::default());
        let error = create(Path::new("disk"), storage, &options).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

/// Clusters that QEMU's snapshot shares are copied, and what is new is encrypted for its new place.
#[test]
fn beside_a_snapshot_of_qemus() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let encryption = luks("moo");
    make(
        &path,
        &CreateOptions {
            cluster_size: 4096,
            encryption,
            ..CreateOptions::new(SIZE)
        },
    );
    let qemu = Qemu {
        folder: folder.path(),
        name: "disk",
        passwords: &["moo"],
    };
    qemu.io(&scribble(3));
    let before = qemu.content();
    qemu.run("qemu-img", &["snapshot", "-c", "one"], &[]);
    exercise(&qemu, 3, 60);
    qemu.run("qemu-img", &["snapshot", "-a", "one"], &[]);
    assert!(qemu.content() == before);
    assert!(content(&open(&path, &["moo"]).unwrap()) == before);
}

/// QEMU encrypts no compressed cluster.
#[test]
fn compressed_clusters_are_not_encrypted() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    make(
        &path,
        &CreateOptions {
            encryption: luks("moo"),
            ..CreateOptions::new(SIZE)
        },
    );
    let qemu = Qemu {
        folder: folder.path(),
        name: "disk",
        passwords: &["moo"],
    };
    qemu.io(&[
        "write -c -P 7 64k 64k".into(),
        "write -c -P 9 128k 64k".into(),
    ]);
    let image = open(&path, &["moo"]).unwrap();
    let content = content(&image);
    assert!(content == qemu.content());
    assert_eq!(content[100_000], 7);
    // We write none at all.
    let refused = image.write_compressed(0, &[3; 65536]).unwrap_err();
    assert!(refused.to_string().contains("encryption"), "{refused}");
    drop(image);
    exercise(&qemu, 1, 40);
}

/// Nobody but this crate moves bytes that are encrypted.
#[test]
fn no_plan_is_fast() {
    let folder = tempfile::tempdir().unwrap();
    for (name, encryption) in [
        ("luks", luks("moo")),
        ("aes", Some(NewEncryption::LegacyAes)),
    ] {
        let path = folder.path().join(name);
        make(
            &path,
            &CreateOptions {
                encryption,
                ..CreateOptions::new(SIZE)
            },
        );
        let image = open(&path, &["moo"]).unwrap();
        image.write(65536, &[7; 65536]).unwrap();
        for (offset, len) in [(65536, 512), (65536, 65536), (0, SIZE)] {
            assert!(matches!(image.plan_read(offset, len).unwrap(), Plan::Slow));
            assert!(matches!(image.plan_write(offset, len).unwrap(), Plan::Slow));
        }
        image.flush().unwrap();
        let file = std::fs::read(&path).unwrap();
        assert!(
            !file.windows(16).any(|bytes| bytes == [7; 16]),
            "the data is in the file"
        );
    }
}

/// Memory into which bytes trickle, so that others see half of a sector.
#[derive(Default)]
struct Trickling(MemoryStorage);

impl Storage for Trickling {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        std::thread::yield_now();
        self.0.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> std::io::Result<()> {
        for (at, part) in (offset..).step_by(64).zip(buf.chunks(64)) {
            self.0.write_at(at, part)?;
            std::thread::yield_now();
        }
        Ok(())
    }
    fn zero(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.0.zero(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.0.punch(offset, len)
    }
    fn sync(&self) -> std::io::Result<()> {
        self.0.sync()
    }
    fn len(&self) -> std::io::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.0.set_len(len)
    }
}

fn trickling() -> Image {
    let storage = Arc::new(Trickling::default());
    let path = Path::new("disk");
    let new = CreateOptions {
        cluster_size: 4096,
        encryption: Some(NewEncryption::LegacyAes),
        ..CreateOptions::new(SIZE)
    };
    create(path, storage.clone(), &new).unwrap();
    let image = Image::open_over(path, storage, &options(&["moo"]), None).unwrap();
    image.write(0, &[0xff; 4096]).unwrap();
    image
}

/// Threads that write bytes of the same sectors do not undo each other's, and read what they wrote.
#[test]
fn parts_of_sectors_at_once() {
    let image = trickling();
    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let image = &image;
            scope.spawn(move || {
                for round in 0..400_u64 {
                    let at = round % 8 * 512 + u64::from(thread) * 128;
                    let byte = (round / 8 * 4) as u8 | thread;
                    image.write(at, &[byte; 128]).unwrap();
                    let mut back = [0xee; 128];
                    image.read(at, &mut back).unwrap();
                    assert_eq!(back, [byte; 128]);
                }
            });
        }
    });
    let found = content(&image);
    for (at, byte) in found[..4096].iter().enumerate() {
        assert_eq!(usize::from(byte & 3), at % 512 / 128, "at {at}");
    }
}

/// Bytes that nobody writes read as they are while those beside them change.
#[test]
fn the_rest_of_a_sector_that_changes() {
    let image = trickling();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let bytes = (0..=255_u8).cycle();
            for byte in bytes.take_while(|_| !over.load(Ordering::Relaxed)) {
                image.write(512, &[byte; 64]).unwrap();
            }
        });
        let mut torn = false;
        for _ in 0..1000 {
            let mut rest = [0xee; 448];
            image.read(576, &mut rest).unwrap();
            torn |= rest != [0xff; 448];
        }
        over.store(true, Ordering::Relaxed);
        assert!(!torn);
    });
}

/// Who writes a part of a sector does not undo what somebody else makes of the rest.
#[test]
fn a_part_and_a_whole_sector_at_once() {
    let image = trickling();
    for round in 0..64_u8 {
        std::thread::scope(|scope| {
            scope.spawn(|| image.write(512, &[round; 512]).unwrap());
            scope.spawn(|| image.write(600, &[round; 100]).unwrap());
        });
        let mut sector = [0xee; 512];
        image.read(512, &mut sector).unwrap();
        assert_eq!(sector, [round; 512]);
    }
}

/// Our own snapshots share encrypted clusters, whose numbers stay; QEMU reads each.
#[test]
fn snapshots_of_an_encrypted_disk() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (name, encryption) in [
        ("luks", luks("moo")),
        ("aes", Some(NewEncryption::LegacyAes)),
    ] {
        let path = folder.path().join(name);
        let new = CreateOptions {
            cluster_size: 4096,
            encryption,
            ..CreateOptions::new(SIZE)
        };
        make(&path, &new);
        let qemu = Qemu {
            folder: folder.path(),
            name,
            passwords: &["moo"],
        };
        exercise(&qemu, 1, 40);
        let image = open(&path, &["moo"]).unwrap();
        let before = content(&image);
        // The VM's state is encrypted too, as if the disk went on.
        image.write_vm_state(512, &[5; 70_144]).unwrap();
        image.flush().unwrap();
        drop(image);
        qemu.io(&[
            "read -b -P 5 512 70144".into(),
            "write -b -P 6 10k 10k".into(),
        ]);
        let image = open(&path, &["moo"]).unwrap();
        let mut state = vec![0; 70_144];
        image.read_vm_state(512, &mut state).unwrap();
        assert!(state[..9728].iter().all(|&byte| byte == 5), "{name}");
        assert!(state[9728..19_968].iter().all(|&byte| byte == 6), "{name}");
        image.create_snapshot(&NewSnapshot::new("one")).unwrap();
        image.write(1000, &vec![5; 300_000]).unwrap();
        let after = content(&image);
        drop(image);
        exercise(&qemu, 2, 0);
        let at_one = OpenOptions {
            snapshot: Some(Selector::Name("one".into())),
            read_only: true,
            ..options(&["moo"])
        };
        let image = Image::open(&path, &at_one, &Files::default()).unwrap();
        assert!(content(&image) == before, "{name}");
        drop(image);
        assert!(qemu.content() == after, "{name}");
        qemu.run("qemu-img", &["snapshot", "-a", "one"], &[]);
        assert!(qemu.content() == before, "{name}");
    }
}
