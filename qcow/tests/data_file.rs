//! Data files: images whose guest data is in a file of its own, raw ones among them.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{
    CheckOptions, CreateOptions, Extent, Format, Image, KeyCost, MemoryStorage, NewEncryption,
    OpenOptions, Plan, Preallocation, ResizeOptions, Secret,
};
use support::check::check;
use support::model::{Ops, content, mirror, perform};
use support::{
    Files, cached, have_qemu, make_with_data as make, open_file, qemu_content, qemu_create,
    qemu_img, qemu_io,
};

fn open(path: &Path) -> Image {
    open_file(path, &cached(32 << 10))
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
    check(&std::fs::read(&path).unwrap()).assert_clean(name);
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
        qemu_create(folder, &options, &name, "1000k");
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

/// The same name that QEMU's `amend` gives: both open what was renamed, and no other image gets one.
#[test]
fn a_data_file_is_renamed() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    make(folder, "disk", true, CreateOptions::new(1 << 20));
    let path = folder.join("disk");
    open(&path).write(0, &[7; 1000]).unwrap();
    for name in ["theirs", "ours", "a name that is longer than all before it"] {
        let old = open(&path).data_file().unwrap();
        if name == "theirs" {
            std::fs::copy(folder.join(&old), folder.join(name)).unwrap();
            let option = format!("data_file={name}");
            qemu_img(folder, &["amend", "-f", "qcow2", "-o", &option, "disk"]);
        } else {
            open(&path).set_data_file(name).unwrap();
            std::fs::rename(folder.join(&old), folder.join(name)).unwrap();
        }
        assert_eq!(open(&path).data_file().unwrap(), name);
        qemu_img(folder, &["check", "-q", "-f", "qcow2", "disk"]);
        assert_eq!(qemu_content(folder, "disk", "qcow2")[..1000], [7; 1000]);
    }
    let error = open(&path).set_data_file("").unwrap_err();
    assert!(error.to_string().contains("must have a name"), "{error}");
    support::make(folder, "plain", &CreateOptions::new(1 << 20));
    let error = open(&folder.join("plain"))
        .set_data_file("data")
        .unwrap_err();
    assert!(error.to_string().contains("no data file"), "{error}");
}
