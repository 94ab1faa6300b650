//! Images with a data file that must not be believed: names that lead elsewhere, headers and tables
//! that contradict it.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{
    CheckOptions, CreateOptions, DataFile, Error, Format, Image, MemoryStorage, OpenOptions,
    Reference, ReferencePolicy, ResizeOptions,
};
use support::model::{Ops, perform};
use support::{Files, Random, cached, make, make_with_data, open_file};

/// An image over `base` that names the data file `name`, and what opening it says.
fn attempt(folder: &Path, name: &str, references: ReferencePolicy) -> (Error, usize) {
    let path = folder.join("hostile");
    let _ = std::fs::remove_file(&path);
    let data_file = Some(DataFile {
        name: name.into(),
        raw: false,
        storage: Arc::new(MemoryStorage::default()),
    });
    let options = CreateOptions {
        backing: Some(("base".into(), Format::Raw)),
        data_file,
        ..CreateOptions::new(1 << 20)
    };
    make(folder, "hostile", &options);
    let options = OpenOptions {
        references,
        ..OpenOptions::new(Format::Qcow2)
    };
    let files = Files::default();
    let error = Image::open(&path, &options, &files).expect_err(name);
    let written = files.written.lock().unwrap().len();
    (error, written)
}

#[test]
fn hostile_names_are_not_followed() {
    let folder = tempfile::tempdir().unwrap();
    let outer = folder.path();
    let folder = &outer.join("inner");
    std::fs::create_dir(folder).unwrap();
    std::fs::write(outer.join("secret"), vec![9; 1 << 20]).unwrap();
    std::fs::write(folder.join("base"), vec![9; 1 << 20]).unwrap();
    std::fs::write(folder.join("short"), vec![9; (1 << 20) - 512]).unwrap();
    std::os::unix::fs::symlink("../secret", folder.join("symlink")).unwrap();
    std::fs::hard_link(folder.join("base"), folder.join("twin")).unwrap();
    use ReferencePolicy::{Any, None as Never, OwnFolder};
    let secret = outer.join("secret");
    for name in [
        "../secret",
        "./../inner/../secret",
        "symlink",
        secret.to_str().unwrap(),
    ] {
        let (error, written) = attempt(folder, name, OwnFolder);
        let outside = matches!(
            error,
            Error::Outside {
                kind: Reference::DataFile,
                ..
            }
        );
        assert!(outside, "{name}: {error}");
        assert_eq!(written, 1, "{name} was opened");
    }
    let (error, written) = attempt(folder, "short", Never);
    assert!(error.to_string().contains("not allowed here"), "{error}");
    assert_eq!(written, 1);
    for (name, said) in [
        ("nbd://localhost/", "only files"),
        ("json:{}", "only files"),
        ("short", "1048064 bytes and the disk 1048576"),
        // The image itself, which the guest could make what it likes.
        ("hostile", "other files"),
        // The base, which is never written, by its name and another.
        ("base", "a file that it has passed"),
        ("twin", "a file that it has passed"),
    ] {
        let (error, _) = attempt(folder, name, Any);
        assert!(error.to_string().contains(said), "{name}: {error}");
    }
    assert_eq!(std::fs::read(secret).unwrap(), vec![9; 1 << 20]);
    assert_eq!(
        std::fs::read(folder.join("base")).unwrap(),
        vec![9; 1 << 20]
    );
}

#[test]
fn what_a_data_file_excludes_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    make_with_data(folder, "disk", true, CreateOptions::new(1 << 20));
    let path = folder.join("disk");
    let good = std::fs::read(&path).unwrap();
    let refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bad = good.clone();
        change(&mut bad);
        std::fs::write(&path, bad).unwrap();
        let open = OpenOptions::new(Format::Qcow2);
        let image = Image::open(&path, &open, &Files::default());
        let error = match image {
            Err(error) => error,
            Ok(image) => image.read(0, &mut [0; 1 << 20]).unwrap_err(),
        };
        let source = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error}: {}", source.unwrap_or_default())
    };
    let name = good.windows(4).position(|w| w == b"DATA").unwrap();
    let said = refused(&|bytes| bytes[name] = 0x11);
    assert!(
        said.contains("incompatible_features") && said.contains("without a name"),
        "{said}"
    );
    let said = refused(&|bytes| bytes[63] = 1);
    assert!(said.contains("nb_snapshots"), "{said}");
    let said = refused(&|bytes| {
        let at = 1000_u64;
        bytes[8..16].copy_from_slice(&at.to_be_bytes());
        bytes[19] = 4;
        bytes[1000..1004].copy_from_slice(b"base");
    });
    assert!(said.contains("autoclear_features"), "{said}");
    // Entries that lead elsewhere than where the guest has the cluster.
    let number = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap()) as usize;
    let l2 = number(number(40)) & 0xff_ffff_fe00;
    assert_eq!(number(l2 + 8) as u64, 1 << 63 | 65536);
    for entry in [
        1 << 63 | 131_072,
        1 << 63,
        1 << 62 | 65536,
        1 << 63 | 65537 | 2,
    ] {
        let said =
            refused(&|bytes| bytes[l2 + 8..l2 + 16].copy_from_slice(&u64::to_be_bytes(entry)));
        assert!(said.contains("L2 entry"), "{entry:#x}: {said}");
        let storage = Arc::new(MemoryStorage::new(std::fs::read(&path).unwrap()));
        let report = cowshed_qcow::check(&path, storage, &CheckOptions::default()).unwrap();
        assert!(report.corruptions > 0, "{entry:#x}");
    }
    std::fs::write(&path, &good).unwrap();
    let image = open_file(&path, &cached(32 << 10));
    let error = image.write_compressed(0, &[1; 65536]).unwrap_err();
    assert!(error.to_string().contains("data file"), "{error}");
}

#[test]
fn random_damage_never_panics() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (raw, extended_l2) in [(false, false), (true, true)] {
        let name = format!("{raw}");
        let options = CreateOptions {
            cluster_size: 16384,
            extended_l2,
            ..CreateOptions::new(1 << 20)
        };
        make_with_data(folder, &name, raw, options);
        open_file(&folder.join(&name), &cached(32 << 10))
            .write(5000, &[1; 300_000])
            .unwrap();
        let good = std::fs::read(folder.join(&name)).unwrap();
        let mut random = Random(8);
        let mut opened = 0;
        for _ in 0..200 {
            let mut bad = good.clone();
            for _ in 0..1 + random.below(6) {
                let at = match random.below(3) {
                    0 => random.below(300),
                    1 => random.below(good.len() as u64) / 16384 * 16384 + random.below(512),
                    _ => random.below(good.len() as u64),
                };
                bad[at as usize] = random.next() as u8;
            }
            let options = OpenOptions {
                data_file: Some(Arc::new(MemoryStorage::new(vec![2; 1 << 20]))),
                ..OpenOptions::new(Format::Qcow2)
            };
            let storage = Arc::new(MemoryStorage::new(bad));
            let _ = cowshed_qcow::check(Path::new("bad"), storage.clone(), &Default::default());
            let Ok(disk) = Image::open_over(Path::new("bad"), storage, &options, None) else {
                continue;
            };
            opened += 1;
            if disk.size() == 0 || disk.size() > 2 << 20 {
                continue;
            }
            let mut ops = Ops::new(random.next(), disk.size(), disk.cluster_size().into());
            for _ in 0..15 {
                let _ = perform(&disk, &ops.next());
                let _ = disk.read(0, &mut vec![0; disk.size() as usize]);
            }
            let _ = disk.resize(3 << 19, &ResizeOptions::default());
        }
        assert!(opened > 20, "{opened}");
    }
}
