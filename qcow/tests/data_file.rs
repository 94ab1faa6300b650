//! Data files: images whose guest data is in a file of its own, raw ones among them.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use cowshed_qcow::{
    CheckOptions, CreateOptions, DataFile, Error, Extent, Format, Image, KeyCost, MemoryStorage,
    NewEncryption, OpenOptions, Plan, Preallocation, Reference, ReferencePolicy, ResizeOptions,
    Secret, Storage, create,
};
use support::check::check;
use support::model::{Op, Ops, SECTOR, content, mirror, perform};
use support::storages::{Change, apply, tear};
use support::{Files, Random, have_qemu, new_file, qemu_content, qemu_img, qemu_io};

fn open(path: &Path) -> Image {
    let options = OpenOptions {
        cache_bytes: 32 << 10,
        ..OpenOptions::new(Format::Qcow2)
    };
    Image::open(path, &options, &Files::default()).unwrap()
}

/// Makes `name` with the data file `name.data`.
fn make(folder: &Path, name: &str, raw: bool, options: CreateOptions) {
    let data = format!("{name}.data");
    let storage = new_file(&folder.join(&data));
    let data_file = Some(DataFile {
        name: data,
        raw,
        storage,
    });
    let options = CreateOptions {
        data_file,
        ..options
    };
    support::make(folder, name, &options);
}

/// Garbage where nothing has been written, which nobody may ever see.
fn litter(path: &Path) {
    let len = std::fs::metadata(path).unwrap().len() as usize;
    std::fs::write(path, vec![0xdd; len]).unwrap();
}

/// Runs random requests and holds the result against the model, the checkers and QEMU.
fn exercise(folder: &Path, name: &str, seed: u64, raw: bool) {
    let path = folder.join(name);
    let image = open(&path);
    assert_eq!(image.data_file(), Some(format!("{name}.data")));
    let mut model = content(&image);
    let mut ops = Ops::new(seed, image.size(), image.cluster_size().into());
    ops.compressed = false;
    for i in 0..150 {
        let op = ops.next();
        perform(&image, &op).unwrap_or_else(|error| panic!("{name}: {error:?}"));
        mirror(&mut model, &image, &op);
        if i % 8 == 0 {
            assert!(content(&image) == model, "{name}: after {i} requests");
        }
    }
    assert_plan_is_in_the_data_file(&image, &model, &folder.join(format!("{name}.data")));
    drop(image);
    assert!(content(&open(&path)) == model, "{name}: opened again");
    let report = check(&std::fs::read(&path).unwrap());
    assert!(
        report.corruptions.is_empty(),
        "{name}: {:?}",
        report.corruptions
    );
    assert!(report.leaks.is_empty(), "{name}: leaks {:?}", report.leaks);
    let storage = Arc::new(MemoryStorage::new(std::fs::read(&path).unwrap()));
    let report = cowshed_qcow::check(&path, storage, &CheckOptions::default()).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
    qemu_img(folder, &["check", "-q", "-f", "qcow2", name]);
    let read = qemu_content(folder, name, "qcow2");
    assert!(read == model, "{name}: QEMU reads something else");
    if raw {
        let data = std::fs::read(folder.join(format!("{name}.data"))).unwrap();
        // QEMU makes them as long as the clusters are.
        let (head, tail) = data.split_at(model.len());
        assert!(
            head == model,
            "{name}: the data file is not what the disk is"
        );
        assert!(
            tail.iter().all(|&byte| byte == 0),
            "{name}: past the disk's end"
        );
    }
}

fn assert_plan_is_in_the_data_file(image: &Image, model: &[u8], data: &Path) {
    let data = std::fs::read(data).unwrap();
    let files = image.files();
    assert_eq!(files.len(), image.depth());
    let Plan::Fast { extents, .. } = image.plan_read(0, image.size()).unwrap() else {
        panic!("nothing is in the way of a plan");
    };
    let mut at = 0;
    for extent in extents {
        at += match extent {
            Extent::Zero { len } => len,
            Extent::File { file, offset, len } => {
                if file == 0 {
                    assert_eq!(offset, at as u64, "guest data is where the guest has it");
                    assert!(data[at..][..len as usize] == model[at..][..len as usize]);
                }
                len
            }
        } as usize;
    }
}

#[test]
fn images_that_qemu_made() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (seed, (raw, options)) in [
        (false, "cluster_size=4k"),
        (true, "cluster_size=4k"),
        (false, "cluster_size=512,refcount_bits=1"),
        (true, "preallocation=full"),
        (false, "extended_l2=on,cluster_size=16k"),
        (true, "extended_l2=on"),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("{seed}");
        let mut options = format!("{options},data_file={name}.data");
        if raw {
            options += ",data_file_raw=on";
        }
        let args = [
            "create", "-q", "-f", "qcow2", "-o", &options, &name, "1000k",
        ];
        qemu_img(folder, &args);
        let writes = [
            "write -P 3 10k 100k",
            "write -z 40k 20k",
            "write -P 4 995k 5k",
        ];
        qemu_io(folder, &name, &writes.map(str::to_owned));
        let expected = qemu_content(folder, &name, "qcow2");
        assert!(content(&open(&folder.join(&name))) == expected, "{options}");
        exercise(folder, &name, seed as u64, raw);
        qemu_io(folder, &name, &["write -P 5 333k 44k".to_owned()]);
        let expected = qemu_content(folder, &name, "qcow2");
        assert!(content(&open(&folder.join(&name))) == expected, "{options}");
    }
}

#[test]
fn images_that_we_made() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let base: Vec<u8> = (0..700_001_u32).map(|i| (i / 100) as u8 | 1).collect();
    std::fs::write(folder.join("base"), &base).unwrap();
    let mut seed = 0;
    for (cluster_size, extended_l2) in [(512, false), (65536, false), (16384, true)] {
        for (raw, with_base) in [(false, false), (false, true), (true, false)] {
            seed += 1;
            let name = format!("{seed}");
            let options = CreateOptions {
                cluster_size,
                extended_l2,
                backing: with_base.then(|| ("base".into(), Format::Raw)),
                ..CreateOptions::new((1 << 20) + 1536)
            };
            make(folder, &name, raw, options);
            if !raw {
                litter(&folder.join(format!("{name}.data")));
            }
            exercise(folder, &name, seed, raw);
            let data = std::fs::metadata(folder.join(format!("{name}.data"))).unwrap();
            assert_eq!(data.len(), (1 << 20) + 1536, "it ends where the disk does");
        }
    }
    assert_eq!(std::fs::read(folder.join("base")).unwrap(), base);
}

#[test]
fn a_raw_data_file_stays_one_and_says_so() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    make(folder, "disk", true, CreateOptions::new(1 << 20));
    let path = folder.join("disk");
    let data = || std::fs::read(folder.join("disk.data")).unwrap();
    let image = open(&path);
    image.write(0, &[1; 1 << 20]).unwrap();
    image.write_zeroes(1000, 200_000, false).unwrap();
    image.write_zeroes(300_000, 200_000, true).unwrap();
    image.discard(600_000, 200_000).unwrap();
    image.flush().unwrap();
    assert!(data() == content(&image));
    assert_eq!(data()[1000..201_000], [0; 200_000]);
    image.resize(2 << 20, &ResizeOptions::default()).unwrap();
    image.write((2 << 20) - 512, &[7; 512]).unwrap();
    assert!(data() == content(&image));
    let shrink = ResizeOptions {
        shrink: true,
        ..ResizeOptions::default()
    };
    image.resize(100 << 10, &shrink).unwrap();
    assert!(data() == content(&image));
    image.resize(1 << 20, &ResizeOptions::default()).unwrap();
    assert!(data() == content(&image));
    assert_eq!(data()[100 << 10..], [0; (1 << 20) - (100 << 10)]);
    image.make_empty().unwrap();
    assert!(data() == content(&image));
    drop(image);
    let info = qemu_img(folder, &["info", "--output=json", "disk"]);
    assert!(info.contains("\"data-file-raw\": true"), "{info}");
    qemu_img(folder, &["check", "-q", "disk"]);
}

#[test]
fn a_data_file_that_was_shrunk_shows_nothing_old() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    make(folder, "disk", false, CreateOptions::new(1 << 20));
    let image = open(&folder.join("disk"));
    image.write(0, &[1; 1 << 20]).unwrap();
    let shrink = ResizeOptions {
        shrink: true,
        ..ResizeOptions::default()
    };
    image.resize(512, &shrink).unwrap();
    litter(&folder.join("disk.data"));
    image.resize(1 << 20, &ResizeOptions::default()).unwrap();
    image.write(70_000, &[2; 512]).unwrap();
    let now = content(&image);
    let others = now.iter().enumerate().skip(512);
    let mut others = others.filter(|(i, _)| !(70_000..70_512).contains(i));
    assert!(others.all(|(_, &byte)| byte == 0));
    assert_eq!(now[70_000..70_512], [2; 512]);
}

#[test]
fn a_repair_changes_refcounts_and_no_data() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    make(folder, "disk", true, CreateOptions::new(1 << 20));
    let path = folder.join("disk");
    let image = open(&path);
    image.write(0, &[3; 1 << 20]).unwrap();
    drop(image);
    let good = std::fs::read(&path).unwrap();
    let number = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap()) as usize;
    let (table, block) = (number(48), number(number(48)));
    for at in [block + 1, block + 100, table] {
        let mut bad = good.clone();
        bad[at] ^= 2;
        let storage = Arc::new(MemoryStorage::new(bad));
        let (what, options) = (cowshed_qcow::Repair::All, CheckOptions::default());
        cowshed_qcow::repair(&path, storage.clone(), what, &options).unwrap();
        let report = cowshed_qcow::check(&path, storage.clone(), &options).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{at:#x}");
        std::fs::write(&path, storage.to_vec()).unwrap();
        assert!(content(&open(&path)) == [3; 1 << 20], "{at:#x}");
        assert_eq!(storage.to_vec()[95], 2, "the data file is still raw");
    }
}

#[test]
fn data_files_grow_with_their_places() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let modes = [
        Preallocation::Off,
        Preallocation::Metadata,
        Preallocation::Full,
    ];
    for (i, preallocation) in modes.into_iter().enumerate() {
        for raw in [false, true] {
            for extended_l2 in [false, true] {
                let name = format!("{i}{raw}{extended_l2}");
                let options = CreateOptions {
                    extended_l2,
                    ..CreateOptions::new(100 << 10)
                };
                make(folder, &name, raw, options);
                let image = open(&folder.join(&name));
                image.write(0, &[1; 100 << 10]).unwrap();
                let options = ResizeOptions {
                    preallocation,
                    ..ResizeOptions::default()
                };
                let size = (1 << 20) + 512;
                image.resize(size, &options).unwrap();
                let plan = image.plan_write(100 << 10, size - (100 << 10)).unwrap();
                let placed = raw || preallocation != Preallocation::Off && !extended_l2;
                assert_eq!(placed, matches!(plan, Plan::Fast { .. }), "{name}");
                drop(plan);
                let data = std::fs::metadata(folder.join(format!("{name}.data"))).unwrap();
                assert_eq!(data.len(), size, "{name}");
                drop(image);
                exercise(folder, &name, i as u64, raw);
            }
        }
    }
}

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
    support::make(folder, "hostile", &options);
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
    make(folder, "disk", true, CreateOptions::new(1 << 20));
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
    let image = open(&path);
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
        make(folder, &name, raw, options);
        open(&folder.join(&name))
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

/// LUKS numbers sectors by their place in the file, which here is their place on the disk.
#[test]
fn encrypted_data_files() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let secret = || Secret::new("moo".into());
    for (name, extended_l2, preallocation) in [
        ("plain", false, Preallocation::Off),
        ("placed", false, Preallocation::Metadata),
        ("parts", true, Preallocation::Metadata),
    ] {
        let options = CreateOptions {
            extended_l2,
            preallocation,
            encryption: Some(NewEncryption::Luks {
                secret: secret(),
                cost: KeyCost::Iterations(1),
            }),
            ..CreateOptions::new(300 << 10)
        };
        make(folder, name, false, options);
        let path = folder.join(name);
        let open = || {
            let options = OpenOptions {
                secrets: vec![secret()],
                ..OpenOptions::new(Format::Qcow2)
            };
            Image::open(&path, &options, &Files::default()).unwrap()
        };
        let image = open();
        let mut model = content(&image);
        assert!(model.iter().all(|&byte| byte == 0), "{name}");
        let mut ops = Ops::new(4, image.size(), 65536);
        ops.compressed = false;
        for _ in 0..100 {
            let op = ops.next();
            perform(&image, &op).unwrap();
            mirror(&mut model, &image, &op);
        }
        assert!(content(&image) == model, "{name}");
        drop(image);
        assert!(content(&open()) == model, "{name}: opened again");
        let image = format!("driver=qcow2,file.filename={name},encrypt.key-secret=s");
        let args = [
            "convert",
            "--object",
            "secret,id=s,data=moo",
            "--image-opts",
            &image,
        ];
        qemu_img(folder, &[&args[..], &["-O", "raw", "content"]].concat());
        let read = std::fs::read(folder.join("content")).unwrap();
        assert!(read == model, "{name}: QEMU reads something else");
    }
}

#[test]
fn without_its_data_file_an_image_can_be_looked_at_only() {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path(), "disk", true, CreateOptions::new(1 << 20));
    let bytes = std::fs::read(folder.path().join("disk")).unwrap();
    let open = |read_only, data_file| {
        let storage = Arc::new(MemoryStorage::new(bytes.clone()));
        let options = OpenOptions {
            read_only,
            data_file,
            ..OpenOptions::new(Format::Qcow2)
        };
        Image::open_over(Path::new("disk"), storage, &options, None)
    };
    assert!(open(false, None).is_err());
    let image = open(true, None).unwrap();
    assert_eq!(image.data_file().unwrap(), "disk.data");
    assert_eq!(image.size(), 1 << 20);
    let error = image.read(0, &mut [0; 512]).unwrap_err();
    assert!(error.to_string().contains("opened without"), "{error}");
    assert!(matches!(image.plan_read(0, 512).unwrap(), Plan::Slow));
    let data = Arc::new(MemoryStorage::new(vec![5; 1 << 20]));
    let image = open(false, Some(data.clone())).unwrap();
    assert_eq!(content(&image), vec![5; 1 << 20]);
    image.write(512, &[6; 512]).unwrap();
    assert_eq!(data.to_vec()[512..1024], [6; 512]);
}

/// What happened to the image and to its data file, in one order.
type Log = Arc<Mutex<Vec<(usize, Change)>>>;

/// One of both files.
struct Part {
    index: usize,
    now: MemoryStorage,
    log: Log,
}

impl Part {
    fn log(&self, change: Change) {
        self.log.lock().unwrap().push((self.index, change));
    }
}

impl Storage for Part {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.now.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.log(Change::Write(offset, buf.to_vec()));
        self.now.write_at(offset, buf)
    }
    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.log(Change::Zero(offset, len));
        self.now.zero(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.log(Change::Punch(offset, len));
        self.now.punch(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        self.log(Change::Sync);
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        self.now.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.log(Change::SetLen(len));
        self.now.set_len(len)
    }
}

/// Sectors with the values that a crash from a position of the log on may leave there.
struct Event {
    position: usize,
    sectors: Vec<(usize, Vec<u8>)>,
    flushed: bool,
}

fn base() -> Image {
    let bytes: Vec<u8> = (0..40_usize << 10)
        .map(|i| 0x80 | (i / SECTOR) as u8)
        .collect();
    let raw = OpenOptions {
        read_only: true,
        ..OpenOptions::new(Format::Raw)
    };
    let storage = Arc::new(MemoryStorage::new(bytes));
    Image::open_over(Path::new("base"), storage, &raw, None).unwrap()
}

fn open_parts(parts: [Arc<dyn Storage>; 2], with_base: bool) -> Image {
    let [image, data] = parts;
    let options = OpenOptions {
        cache_bytes: 4 << 10,
        data_file: Some(data),
        ..OpenOptions::new(Format::Qcow2)
    };
    Image::open_over(Path::new("disk"), image, &options, with_base.then(base)).unwrap()
}

/// DESIGN.md's "crash safe", with two files of which each is synced apart.
fn crash_trial(seed: u64, raw: bool, with_base: bool, extended_l2: bool) {
    let log = Log::default();
    let parts = [0, 1].map(|index| {
        let (now, log) = (MemoryStorage::default(), Arc::clone(&log));
        Arc::new(Part { index, now, log })
    });
    let options = CreateOptions {
        cluster_size: if extended_l2 { 16384 } else { 1024 },
        extended_l2,
        backing: with_base.then(|| ("base".into(), Format::Raw)),
        data_file: Some(DataFile {
            name: "data".into(),
            raw,
            storage: parts[1].clone(),
        }),
        ..CreateOptions::new(96 << 10)
    };
    create(Path::new("disk"), parts[0].clone(), &options).unwrap();
    if !raw {
        parts[1].write_at(0, &vec![0xdd; 96 << 10]).unwrap();
        parts[1].sync().unwrap();
    }
    let position = || log.lock().unwrap().len();
    let created = position();
    let image = open_parts([parts[0].clone(), parts[1].clone()], with_base);
    let first = content(&image);
    let mut model = first.clone();
    let mut ops = Ops::new(seed, image.size(), image.cluster_size().into());
    ops.compressed = false;
    let mut events = Vec::new();
    for _ in 0..80 {
        let op = ops.next();
        let (before, from) = (model.clone(), position());
        perform(&image, &op).unwrap();
        mirror(&mut model, &image, &op);
        let flushed = matches!(op, Op::Flush);
        let zeros = match op {
            Op::Discard { offset, len } => offset as usize..(offset + len) as usize,
            _ => 0..0,
        };
        let mut sectors = Vec::new();
        for at in (0..model.len()).step_by(SECTOR) {
            if zeros.contains(&at) {
                sectors.push((at / SECTOR, vec![0; SECTOR]));
            }
            if zeros.contains(&at) || before[at..at + SECTOR] != model[at..at + SECTOR] {
                sectors.push((at / SECTOR, model[at..at + SECTOR].to_vec()));
            }
        }
        events.push(Event {
            position: if flushed { position() } else { from },
            sectors,
            flushed,
        });
    }
    drop(image);
    let log = log.lock().unwrap();
    let mut random = Random(seed);
    let mut possible: Vec<Vec<Vec<u8>>> = first
        .chunks(SECTOR)
        .map(|sector| vec![sector.to_vec()])
        .collect();
    let mut latest: Vec<Vec<u8>> = first.chunks(SECTOR).map(<[u8]>::to_vec).collect();
    let mut events = events.into_iter().peekable();
    let mut durable = [Vec::new(), Vec::new()];
    let mut pending = [Vec::new(), Vec::new()];
    for position in 0..=log.len() {
        if let Some((file, change)) = position.checked_sub(1).map(|i| &log[i]) {
            pending[*file].push(change.clone());
            if matches!(change, Change::Sync) {
                pending[*file]
                    .drain(..)
                    .for_each(|change| apply(&mut durable[*file], &change));
            }
        }
        while let Some(event) = events.next_if(|event| {
            event.position < position || event.flushed && event.position == position
        }) {
            for (i, value) in event.sectors {
                possible[i].push(value.clone());
                latest[i] = value;
            }
            if event.flushed {
                possible = latest.iter().map(|value| vec![value.clone()]).collect();
            }
        }
        if position < created || random.below(log.len() as u64) >= 150 {
            continue;
        }
        for variant in 0..4 {
            let files = [0, 1].map(|file| {
                let mut bytes = durable[file].clone();
                match variant {
                    0 => {}
                    1 => pending[file]
                        .iter()
                        .for_each(|change| apply(&mut bytes, change)),
                    _ => tear(&mut bytes, &pending[file], &mut random),
                }
                bytes
            });
            let what = format!("seed {seed} at {position}, variant {variant}");
            let report = check(&files[0]);
            assert!(
                report.corruptions.is_empty(),
                "{what}: {:?}",
                report.corruptions
            );
            let data = files[1].clone();
            let parts = files.map(|bytes| Arc::new(MemoryStorage::new(bytes)) as Arc<dyn Storage>);
            let now = content(&open_parts(parts, with_base));
            for (i, (found, possible)) in now.chunks(SECTOR).zip(&possible).enumerate() {
                let known = possible.iter().any(|value| value == found);
                assert!(known, "{what}: sector {i} is {:02x?}", &found[..8]);
            }
            assert!(!raw || data == now, "{what}: the data file is another disk");
        }
    }
}

#[test]
fn crash_safe() {
    for seed in 0..4 {
        crash_trial(seed, false, true, false);
        crash_trial(seed + 10, true, false, false);
    }
    crash_trial(20, false, false, false);
    crash_trial(21, false, true, true);
    crash_trial(22, true, false, true);
}

#[test]
fn preallocated_data_files_are_written_in_place() {
    let folder = tempfile::tempdir().unwrap();
    let options = CreateOptions {
        preallocation: Preallocation::Full,
        ..CreateOptions::new(1 << 20)
    };
    make(folder.path(), "disk", false, options);
    let image = open(&folder.path().join("disk"));
    let Plan::Fast { extents, .. } = image.plan_write(4096, 1 << 19).unwrap() else {
        panic!("something is to be allocated");
    };
    let expected = Extent::File {
        file: 0,
        offset: 4096,
        len: 1 << 19,
    };
    assert_eq!(extents, [expected]);
}
