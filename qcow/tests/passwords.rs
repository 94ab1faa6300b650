//! Passwords: none may be missing, wrong or too expensive without an error that says so, and none
//! is lost while others change.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cowshed_qcow::{
    CheckOptions, CreateOptions, Error, FileStorage, Image, KeyCost, MemoryStorage, NewEncryption,
    OpenOptions, Plan, Repair, Storage, create, repair,
};
use support::crash::{CrashStorage, crashes};
use support::encryption::{
    Qemu, SIZE, exercise, luks, make, new_luks, open, options, qemu_create, secret,
};
use support::model::content;
use support::storages::FaultStorage;
use support::{Files, Random, have_qemu};

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
    calls: AtomicUsize,
}

impl Storage for Counted {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.calls.fetch_add(1, Ordering::Relaxed);
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

/// QEMU gives a key slot the iterations that take it two seconds: the default bound has room for
/// several of them.
#[test]
fn the_default_bound_admits_what_qemu_makes() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    // A tenth of the default, which would take a quarter of a minute to make.
    qemu_create(folder, "disk", "encrypt.format=luks,encrypt.iter-time=200");
    let bytes = std::fs::read(folder.join("disk")).unwrap();
    let at = bytes.windows(6).position(|w| w == b"LUKS\xba\xbe").unwrap();
    let number = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    // Of the digest, and of the first slot.
    let iterations = u64::from(number(at + 164)) + u64::from(number(at + 212));
    eprintln!("{iterations} iterations");
    assert!(iterations > 2000);
    assert!(iterations * 10 * 3 <= OpenOptions::DEFAULT_KEY_ITERATIONS);
    open(&folder.join("disk"), &["moo"]).unwrap();
    let few = OpenOptions {
        max_key_iterations: iterations - 1,
        ..options(&["moo"])
    };
    let refused = Image::open(&folder.join("disk"), &few, &Files::default());
    assert!(matches!(refused, Err(Error::Locked { .. })));
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
            let calls = storage.calls.load(Ordering::Relaxed);
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

/// A crash adds a key or does not, and wipes one or does not: the others open the image throughout.
#[test]
fn crash_safe_while_keys_change() {
    let path = Path::new("disk");
    let storage = Arc::new(CrashStorage::default());
    create(path, storage.clone(), &new_luks("0")).unwrap();
    let image = Image::open_over(path, storage.clone(), &options(&["0"]), None).unwrap();
    image.write(0, b"cow").unwrap();
    image.flush().unwrap();
    // From which change on there is a key, and from which on there may be none any more.
    let mut keys = vec![(storage.position(), usize::MAX)];
    for slot in 1..8 {
        let password = secret(&slot.to_string());
        let added = image.add_key(&secret("0"), &password, KeyCost::Iterations(1));
        assert_eq!(added.unwrap(), slot);
        keys.push((storage.position(), usize::MAX));
    }
    for slot in [0, 6] {
        keys[slot].1 = storage.position();
        image.erase_key_slot(slot, false).unwrap();
    }
    drop(image);

    let log = storage.changes();
    let from = keys[0].0;
    crashes(&log, from, 4, &mut Random(1), &mut |position, bytes| {
        let there =
            |&(_, &(from, until)): &(usize, &(usize, usize))| (from..=until).contains(&position);
        // The first key and the last that are certain; all are too many to try.
        let certain: Vec<_> = keys.iter().enumerate().filter(there).collect();
        for (slot, _) in certain.first().into_iter().chain(certain.last()) {
            let storage = Arc::new(MemoryStorage::new(bytes.clone()));
            let password = slot.to_string();
            let image = Image::open_over(path, storage, &options(&[&password]), None);
            let image = image.unwrap_or_else(|error| panic!("{position}: {slot}: {error}"));
            let mut cow = [0; 3];
            image.read(0, &mut cow).unwrap();
            assert_eq!(&cow, b"cow", "{position}: {slot}");
        }
    });
}

/// After a call that fails there is an error, and the first password still opens the image.
#[test]
fn every_call_fails_once_while_keys_change() {
    let path = Path::new("disk");
    let made = Arc::new(MemoryStorage::default());
    create(path, made.clone(), &new_luks("0")).unwrap();
    for n in 0.. {
        let storage = FaultStorage::new(made.to_vec(), ErrorKind::StorageFull);
        let open = |password| Image::open_over(path, storage.clone(), &options(&[password]), None);
        let image = open("0").unwrap();
        storage.fail_after(n);
        let added = image.add_key(&secret("0"), &secret("1"), KeyCost::Iterations(1));
        let erased = image.erase_key_slot(1, false);
        let failed = storage.recover();
        assert_eq!(failed, added.is_err() || erased.is_err(), "call {n}");
        assert!(open("0").is_ok(), "call {n}");
        // What failed can be done again.
        let slot = image
            .add_key(&secret("0"), &secret("2"), KeyCost::Iterations(1))
            .unwrap();
        image.erase_key_slot(slot, false).unwrap();
        assert!(open("0").is_ok() && open("2").is_err(), "call {n}");
        if !failed {
            break;
        }
    }
}

/// A repair that makes all refcounts anew knows what is LUKS's.
#[test]
fn a_repair_keeps_the_keys() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    make(&path, &new_luks("moo"));
    let image = open(&path, &["moo"]).unwrap();
    image.write(100_000, &[7; 100_000]).unwrap();
    let before = content(&image);
    drop(image);
    let mut bytes = std::fs::read(&path).unwrap();
    let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let block = number(number(48) as usize) as usize;
    bytes[block..block + 65536].fill(0);
    std::fs::write(&path, &bytes).unwrap();
    let file = || {
        Arc::new(FileStorage::new(
            std::fs::File::options()
                .read(true)
                .write(true)
                .open(&path)
                .unwrap(),
        ))
    };
    let report = cowshed_qcow::check(&path, file(), &CheckOptions::default()).unwrap();
    assert!(report.corruptions > 30, "{report:?}");
    repair(&path, file(), Repair::All, &CheckOptions::default()).unwrap();
    assert!(content(&open(&path, &["moo"]).unwrap()) == before);
    let qemu = Qemu {
        folder: folder.path(),
        name: "disk",
        passwords: &["moo"],
    };
    qemu.assert_clean();
    exercise(&qemu, 1, 40);
}
