//! Encrypted images: QEMU's must read as QEMU reads them, ours must be read by QEMU, and no
//! password may ever be missing, wrong or too expensive without an error that says so.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use cowshed_qcow::{
    CreateOptions, DataFile, Error, FileStorage, Format, Image, KeyCost, MemoryStorage,
    NewEncryption, OpenOptions, Plan, Preallocation, ResizeOptions, Secret, Storage, create,
};
use support::check::check;
use support::model::{Ops, content, mirror, perform};
use support::{Files, Random, have_qemu, qemu_img, run};

const SIZE: u64 = 1 << 20;

fn secret(text: &str) -> Secret {
    Secret::new(text.into())
}

fn options(passwords: &[&str]) -> OpenOptions {
    OpenOptions {
        secrets: passwords.iter().map(|text| secret(text)).collect(),
        cache_bytes: 32 << 10,
        ..OpenOptions::new(Format::Qcow2)
    }
}

fn open(path: &Path, passwords: &[&str]) -> cowshed_qcow::Result<Image> {
    Image::open(path, &options(passwords), &Files::default())
}

fn luks(password: &str) -> Option<NewEncryption> {
    Some(NewEncryption::Luks {
        secret: secret(password),
        cost: KeyCost::Iterations(1),
    })
}

fn make(path: &Path, options: &CreateOptions) {
    let file = std::fs::File::options();
    let file = file
        .clone()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .unwrap();
    create(path, Arc::new(FileStorage::new(file)), options).unwrap();
}

/// An image with the passwords of its chain, as QEMU is told of it.
struct Qemu<'a> {
    folder: &'a Path,
    name: &'a str,
    passwords: &'a [&'a str],
}

impl Qemu<'_> {
    fn arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        let mut image = format!("driver=qcow2,file.filename={}", self.name);
        for (i, password) in self.passwords.iter().enumerate() {
            arguments.extend(["--object".into(), format!("secret,id=s{i},data={password}")]);
            let backing = "backing.".repeat(i);
            image += &format!(",{backing}encrypt.key-secret=s{i}");
        }
        arguments.extend(["--image-opts".into(), image]);
        arguments
    }

    fn run(&self, tool: &str, before: &[&str], after: &[&str]) -> String {
        let between = self.arguments();
        let all = before.iter().copied();
        let all: Vec<&str> = all
            .chain(between.iter().map(|a| &**a))
            .chain(after.iter().copied())
            .collect();
        run(self.folder, tool, &all)
    }

    fn content(&self) -> Vec<u8> {
        let name = format!("{}.raw", self.name);
        self.run("qemu-img", &["convert", "-O", "raw"], &[&name]);
        let content = std::fs::read(self.folder.join(&name)).unwrap();
        std::fs::remove_file(self.folder.join(&name)).unwrap();
        content
    }

    fn io(&self, commands: &[String]) {
        let mut before = Vec::new();
        for command in commands {
            before.extend(["-c", command]);
        }
        let said = self.run("qemu-io", &before, &[]);
        assert!(
            !said.contains("failed") && !said.contains("rror"),
            "{commands:?}: {said}"
        );
    }

    /// Both checkers find nothing.
    fn assert_clean(&self) {
        let report = check(&std::fs::read(self.folder.join(self.name)).unwrap());
        assert!(
            report.corruptions.is_empty(),
            "{}: {:?}",
            self.name,
            report.corruptions
        );
        assert!(
            report.leaks.is_empty(),
            "{}: leaks {:?}",
            self.name,
            report.leaks
        );
        self.run("qemu-img", &["check", "-q"], &[]);
    }
}

/// `qemu-img create` with the password `moo`. It measures how fast it is, and fails when that took
/// no measurable time.
fn qemu_create(folder: &Path, name: &str, options: &str) {
    let options = format!("{options},encrypt.key-secret=s0");
    let args = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        "secret,id=s0,data=moo",
        "-o",
        &options,
    ];
    for _ in 0..50 {
        let mut command = Command::new("qemu-img");
        command.args(args).args([name, "1M"]).current_dir(folder);
        let output = command.output().unwrap();
        if output.status.success() {
            return;
        }
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("accurate CPU usage"), "{options}: {said}");
    }
    panic!("qemu-img cannot measure how fast it is");
}

fn scribble(seed: u64) -> Vec<String> {
    let mut random = Random(seed);
    (0..12)
        .map(|i| {
            let offset = random.below(SIZE / 512 - 300) * 512;
            let len = (1 + random.below(300)) * 512;
            match i {
                5 => format!("write -z {offset} {len}"),
                _ => format!("write -P {} {offset} {len}", 1 + random.below(255)),
            }
        })
        .collect()
}

/// Requests to an image and to a vector; then QEMU must read the same, and find nothing wrong.
fn exercise(qemu: &Qemu<'_>, seed: u64, count: usize) {
    let path = qemu.folder.join(qemu.name);
    let image = open(&path, qemu.passwords).unwrap();
    let mut model = content(&image);
    let mut ops = Ops::new(seed, image.size(), image.cluster_size().into());
    for i in 0..count {
        if i % 3 == 0 {
            write_bytes(&image, &mut model, &mut ops.random);
        }
        let op = ops.next();
        perform(&image, &op).unwrap_or_else(|error| panic!("{}: {error:?}", qemu.name));
        mirror(&mut model, &image, &op);
        assert!(
            i % 16 > 0 || content(&image) == model,
            "{}: after {i} requests",
            qemu.name
        );
    }
    assert!(content(&image) == model, "{}", qemu.name);
    drop(image);
    assert!(
        content(&open(&path, qemu.passwords).unwrap()) == model,
        "{}: again",
        qemu.name
    );
    qemu.assert_clean();
    assert!(
        qemu.content() == model,
        "{}: QEMU reads something else",
        qemu.name
    );
}

/// Writes from any byte to any byte, and reads them back from around there.
fn write_bytes(image: &Image, model: &mut [u8], random: &mut Random) {
    let offset = random.below(image.size() - 1);
    let most = [3, 700, 70_000][random.below(3) as usize].min(image.size() - offset);
    let data = vec![random.next() as u8; 1 + random.below(most) as usize];
    image.write(offset, &data).unwrap();
    model[offset as usize..][..data.len()].copy_from_slice(&data);
    let start = offset.saturating_sub(random.below(600));
    let mut around = vec![0xee; (offset - start) as usize + data.len()];
    image.read(start, &mut around).unwrap();
    assert!(
        around == model[start as usize..][..around.len()],
        "bytes from {start:#x}"
    );
}

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

#[test]
fn key_slots_both_ways() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    make(
        &path,
        &CreateOptions {
            encryption: luks("zero"),
            ..CreateOptions::new(SIZE)
        },
    );
    open(&path, &["zero"]).unwrap().write(4000, b"cow").unwrap();
    let amend = |passwords: &[&str], options: &str| {
        let qemu = Qemu {
            folder: folder.path(),
            name: "disk",
            passwords,
        };
        qemu.run(
            "qemu-img",
            &["amend", "--object", "secret,id=new,data=one"],
            &["-o", options],
        );
    };
    let opens = |password| {
        let ours = open(&path, &[password]).map(|image| content(&image)[4000..4003] == *b"cow");
        assert!(
            !matches!(ours, Ok(false)),
            "{password} reads something else"
        );
        ours.is_ok()
    };

    amend(
        &["zero"],
        "encrypt.state=active,encrypt.new-secret=new,encrypt.iter-time=10",
    );
    assert!(opens("zero") && opens("one") && !opens("two"));
    let image = open(&path, &["one"]).unwrap();
    assert_eq!(image.key_slots().unwrap().iter().flatten().count(), 2);
    assert_eq!(image.key_slot_of(&secret("one")).unwrap(), 1);
    assert_eq!(
        image
            .add_key(&secret("one"), &secret("two"), KeyCost::Iterations(2000))
            .unwrap(),
        2
    );
    assert_eq!(image.key_slots().unwrap()[2], Some(2000));
    assert!(
        image
            .add_key(&secret("four"), &secret("five"), KeyCost::Iterations(1))
            .is_err()
    );
    image.erase_key_slot(0, false).unwrap();
    drop(image);
    assert!(!opens("zero") && opens("one") && opens("two"));
    let two = Qemu {
        folder: folder.path(),
        name: "disk",
        passwords: &["two"],
    };
    assert_eq!(two.content()[4000..4003], *b"cow");
    two.assert_clean();

    amend(&["two"], "encrypt.state=inactive,encrypt.keyslot=1");
    assert!(!opens("one") && opens("two"));
    let image = open(&path, &["two"]).unwrap();
    let kept = image.erase_key_slot(2, false).unwrap_err();
    assert!(kept.to_string().contains("the last key"), "{kept}");
    assert!(opens("two"));
}

/// An encrypted image is never opened as plain, nor a plain one as encrypted.
#[test]
fn passwords_are_asked_for_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    for (name, encryption) in [
        ("luks", luks("moo")),
        ("aes", Some(NewEncryption::LegacyAes)),
        ("plain", None),
    ] {
        let new = CreateOptions {
            encryption,
            ..CreateOptions::new(SIZE)
        };
        make(&folder.path().join(name), &new);
    }
    let said = |name: &str, options: &OpenOptions| {
        let opened = Image::open(&folder.path().join(name), options, &Files::default());
        match opened {
            Err(error @ Error::Locked { .. }) => error.to_string(),
            other => panic!("{name}: {other:?}"),
        }
    };
    let needs = "it is encrypted, and no password was given for it";
    assert!(said("luks", &options(&[])).ends_with(needs));
    assert!(said("aes", &options(&[])).ends_with(needs));
    assert!(said("luks", &options(&["wrong"])).ends_with("the password is wrong"));
    assert!(said("luks", &options(&["moo", "moo"])).contains("1 more passwords were given"));
    assert!(said("plain", &options(&["moo"])).contains("1 more passwords were given"));
    let poor = OpenOptions {
        max_key_iterations: 1999,
        ..options(&["moo"])
    };
    assert!(said("luks", &poor).contains("takes 2000 iterations of PBKDF2, and 1999 are left"));
    let printed = format!("{:?}", options(&["moo"]));
    assert!(
        printed.contains("Secret(..)") && !printed.contains("moo"),
        "{printed}"
    );

    // What stays locked can be looked at, and that is all.
    let locked = OpenOptions {
        stay_locked: true,
        ..options(&[])
    };
    for name in ["luks", "aes"] {
        open(&folder.path().join(name), &["moo"])
            .unwrap()
            .write(0, &[7; 512])
            .unwrap();
        assert!(said(name, &locked).ends_with(needs), "it would be written");
        let look = OpenOptions {
            read_only: true,
            ..locked.clone()
        };
        let image = Image::open(&folder.path().join(name), &look, &Files::default()).unwrap();
        assert_eq!(image.size(), SIZE);
        assert!(matches!(
            image.read(0, &mut [0; 512]),
            Err(Error::Locked { .. })
        ));
        assert!(matches!(image.plan_read(0, 512).unwrap(), Plan::Slow));
    }
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
                for round in 0..256_u64 {
                    let at = round % 8 * 512 + u64::from(thread) * 128;
                    image.write(at, &[thread; 128]).unwrap();
                    let mut back = [0xee; 128];
                    image.read(at, &mut back).unwrap();
                    assert_eq!(back, [thread; 128]);
                }
            });
        }
    });
    let found = content(&image);
    for (at, byte) in found[..4096].iter().enumerate() {
        assert_eq!(usize::from(*byte), at % 512 / 128, "at {at}");
    }
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

/// An L2 entry that leads to the LUKS header makes nobody write there.
#[test]
fn the_luks_header_is_never_overwritten() {
    let storage = Arc::new(MemoryStorage::default());
    let path = Path::new("disk");
    let new = CreateOptions {
        encryption: luks("moo"),
        ..CreateOptions::new(SIZE)
    };
    create(path, storage.clone(), &new).unwrap();
    let open = || Image::open_over(path, storage.clone(), &options(&["moo"]), None).unwrap();
    open().write(0, &[7; 65536]).unwrap();
    let before = storage.to_vec();
    let luks_at = before.windows(6).position(|bytes| bytes == b"LUKS\xba\xbe");
    let number = |at: u64| {
        let mut bytes = [0; 8];
        storage.read_at(at, &mut bytes).unwrap();
        u64::from_be_bytes(bytes)
    };
    let l2 = number(number(40)) & 0x00ff_ffff_ffff_fe00;
    for cluster in [0, 1, 31] {
        let entry = (luks_at.unwrap() as u64 + cluster * 65536) | 1 << 63;
        storage.write_at(l2, &entry.to_be_bytes()).unwrap();
        let error = open().write(512, &[9; 512]).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        let bits = 72..80_usize; // The corrupt bit.
        storage.write_at(72, &before[bits]).unwrap();
    }
    storage.write_at(l2, &before[l2 as usize..][..8]).unwrap();
    assert!(storage.to_vec() == before);
}

/// Memory that counts what is read of it.
struct Counted {
    inner: MemoryStorage,
    calls: std::sync::atomic::AtomicUsize,
}

impl Storage for Counted {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.calls
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        assert!(buf.len() <= 1 << 20, "{} bytes are read at once", buf.len());
        self.inner.read_at(offset, buf)
    }
    fn write_at(&self, _: u64, _: &[u8]) -> std::io::Result<()> {
        panic!("a write while opening")
    }
    fn zero(&self, _: u64, _: u64) -> std::io::Result<()> {
        panic!("a write while opening")
    }
    fn punch(&self, _: u64, _: u64) -> std::io::Result<()> {
        panic!("a write while opening")
    }
    fn sync(&self) -> std::io::Result<()> {
        Ok(())
    }
    fn len(&self) -> std::io::Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, _: u64) -> std::io::Result<()> {
        panic!("a write while opening")
    }
}

/// Every byte of the LUKS header and of the pointer to it, with values at the edges: an error or a
/// right key, in a bounded number of calls and iterations.
#[test]
fn hostile_headers_are_bounded() {
    let storage = Arc::new(MemoryStorage::default());
    let new = CreateOptions {
        encryption: luks("moo"),
        ..CreateOptions::new(SIZE)
    };
    create(Path::new("disk"), storage.clone(), &new).unwrap();
    let image = storage.to_vec();
    let luks_at = image
        .windows(6)
        .position(|bytes| bytes == b"LUKS\xba\xbe")
        .unwrap();
    let pointer = image
        .windows(4)
        .position(|bytes| bytes == [0x05, 0x37, 0xbe, 0x77])
        .unwrap();
    let mut refused = 0;
    for at in (pointer..pointer + 24).chain(luks_at..luks_at + 592) {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            if image[at] == value {
                continue;
            }
            let mut bytes = image.clone();
            bytes[at] = value;
            let storage = Arc::new(Counted {
                inner: MemoryStorage::new(bytes),
                calls: 0.into(),
            });
            let options = OpenOptions {
                read_only: true,
                max_key_iterations: 20_000,
                ..options(&["moo"])
            };
            let opened = Image::open_over(Path::new("disk"), storage.clone(), &options, None);
            let calls = storage.calls.load(std::sync::atomic::Ordering::Relaxed);
            assert!(calls <= 12, "byte {at}: {calls} reads");
            match opened {
                Ok(_) => {}
                Err(
                    error @ (Error::Invalid { .. }
                    | Error::Locked { .. }
                    | Error::Unsupported { .. }),
                ) => {
                    assert!(error.to_string().contains("disk"));
                    refused += 1;
                }
                Err(other) => panic!("byte {at} is {value:#x}: {other:?}"),
            }
        }
    }
    assert!(refused > 500, "{refused} of the headers were refused");
}
