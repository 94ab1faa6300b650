//! New images: what was asked for, and what `qemu-img create` makes of the same options.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cowshed_qcow::{
    Compression, CreateOptions, DataFile, Extent, FileStorage, Format, Image, MemoryStorage,
    OpenOptions, Plan, Preallocation, Storage, create,
};
use serde_json::Value;
use support::{Files, have_qemu, make, new_file, qemu_content, qemu_img};

const PREALLOCATIONS: [(Preallocation, &str); 4] = [
    (Preallocation::Off, "off"),
    (Preallocation::Metadata, "metadata"),
    (Preallocation::Falloc, "falloc"),
    (Preallocation::Full, "full"),
];

/// The options in QEMU's words.
fn words(options: &CreateOptions) -> String {
    let on = |flag| if flag { "on" } else { "off" };
    let preallocation = PREALLOCATIONS
        .iter()
        .find(|(p, _)| *p == options.preallocation);
    let mut words = format!(
        "compat={},cluster_size={},refcount_bits={},preallocation={}",
        if options.version == 2 { "0.10" } else { "1.1" },
        options.cluster_size,
        options.refcount_bits,
        preallocation.unwrap().1,
    );
    if options.version == 3 {
        words += match options.compression {
            Compression::Zlib => ",compression_type=zlib",
            Compression::Zstd => ",compression_type=zstd",
        };
        words += &format!(
            ",lazy_refcounts={},extended_l2={}",
            on(options.lazy_refcounts),
            on(options.extended_l2)
        );
    }
    if let Some(file) = &options.data_file {
        words += &format!(",data_file={},data_file_raw={}", file.name, on(file.raw));
    }
    words
}

fn json(folder: &Path, command: &str, name: &str) -> Value {
    let said = qemu_img(folder, &[command, "--output=json", "-f", "qcow2", name]);
    serde_json::from_str(&said).unwrap()
}

/// What `info` says, without the file's name and size.
fn info(folder: &Path, name: &str) -> Value {
    let info = json(folder, "info", name);
    let kept = [
        "virtual-size",
        "cluster-size",
        "backing-filename",
        "backing-filename-format",
        "dirty-flag",
        "format-specific",
    ];
    kept.into_iter()
        .map(|key| (key, info[key].clone()))
        .collect()
}

/// What `map` says of the image alone, without what it knows of holes in the file: where runs
/// begin, and whether they are allocated.
fn map(folder: &Path, name: &str) -> Vec<(Value, [Value; 3])> {
    let map = json(folder, "map", name);
    let mut runs = Vec::new();
    for run in map.as_array().unwrap() {
        let state = ["depth", "present", "data"].map(|key| run[key].clone());
        if runs.last().is_none_or(|(_, last)| *last != state) {
            runs.push((run["start"].clone(), state));
        }
    }
    runs
}

/// Makes the image with QEMU's options too, and compares.
fn assert_as_qemu_makes(folder: &Path, name: &str, options: &CreateOptions, content: &[u8]) {
    let (ours, theirs) = (folder.join("ours"), folder.join("theirs"));
    make(&ours, name, options);
    let (words, size) = (words(options), options.size.to_string());
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &words];
    if let Some((backing, format)) = &options.backing {
        args.extend(["-b", backing, "-F", format.name()]);
    }
    qemu_img(&theirs, &[&args[..], &[name, &size]].concat());
    qemu_img(&ours, &["check", "-q", "-f", "qcow2", name]);
    assert_eq!(info(&ours, name), info(&theirs, name), "{name}: {words}");
    // A raw data file has content from the beginning: QEMU says so of clusters only.
    let raw = options.data_file.as_ref().is_some_and(|file| file.raw);
    if options.size > 0 && !(raw && options.extended_l2) {
        assert_eq!(map(&ours, name), map(&theirs, name), "{name}: {words}");
    }
    let read = qemu_content(&ours, name, "qcow2");
    assert!(read == content, "{name}: {words}: content");
    let open = OpenOptions::new(Format::Qcow2);
    let image = Image::open(&ours.join(name), &open, &Files::default()).unwrap();
    let mut read = vec![0xee; content.len()];
    image.read(0, &mut read).unwrap();
    assert!(read == content, "{name}: {words}: content by our reader");
}

/// Folders for our images and QEMU's, with the same backing file in both.
fn folders(base: &[u8]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for of in ["ours", "theirs"] {
        std::fs::create_dir(folder.path().join(of)).unwrap();
        std::fs::write(folder.path().join(of).join("base.raw"), base).unwrap();
    }
    folder
}

#[test]
fn the_product_of_options() {
    if !have_qemu() {
        return;
    }
    let base: Vec<u8> = (0..200 * 1024).map(|i| (i / 512) as u8 | 1).collect();
    let folder = folders(&base);
    let mut count = 0;
    for version in [2, 3] {
        for bits in [9, 12, 14, 16, 21] {
            for (preallocation, _) in PREALLOCATIONS {
                for extended_l2 in [false, true] {
                    for with_base in [false, true] {
                        // These stand beside each other: every value with most of the others.
                        count += 1;
                        let options = CreateOptions {
                            version,
                            cluster_size: 1 << bits,
                            refcount_bits: if version == 2 { 16 } else { 1 << (count % 7) },
                            compression: match count % 3 {
                                0 if version == 3 => Compression::Zstd,
                                _ => Compression::Zlib,
                            },
                            lazy_refcounts: version == 3 && count % 5 < 2,
                            extended_l2,
                            preallocation,
                            backing: with_base.then(|| ("base.raw".into(), Format::Raw)),
                            ..CreateOptions::new([0, 512, 100 << 10, (1 << 20) + 512][count % 4])
                        };
                        let off = preallocation == Preallocation::Off;
                        if with_base && !off && !extended_l2
                            || extended_l2 && (version == 2 || bits < 14)
                        {
                            continue;
                        }
                        let mut content = if with_base { base.clone() } else { Vec::new() };
                        content.resize(options.size as usize, 0);
                        let name = count.to_string();
                        assert_as_qemu_makes(folder.path(), &name, &options, &content);
                    }
                }
            }
        }
    }
}

#[test]
fn data_files() {
    if !have_qemu() {
        return;
    }
    let base = vec![7; 80 << 10];
    let folder = folders(&base);
    let mut count = 0;
    for raw in [false, true] {
        for (preallocation, _) in PREALLOCATIONS {
            for extended_l2 in [false, true] {
                count += 1;
                let path = folder.path().join("ours").join(format!("data{count}"));
                let storage = new_file(&path);
                storage.write_at(0, &[9; 512]).unwrap();
                let off = preallocation == Preallocation::Off;
                let with_base = !raw && (extended_l2 || off);
                let options = CreateOptions {
                    extended_l2,
                    preallocation,
                    backing: with_base.then(|| ("base.raw".into(), Format::Raw)),
                    data_file: Some(DataFile {
                        name: format!("data{count}"),
                        raw,
                        storage,
                    }),
                    ..CreateOptions::new(100 << 10)
                };
                let mut content = if with_base { base.clone() } else { Vec::new() };
                content.resize(options.size as usize, 0);
                let name = count.to_string();
                assert_as_qemu_makes(folder.path(), &name, &options, &content);
                assert_eq!(std::fs::read(path).unwrap(), vec![0; 100 << 10]);
            }
        }
    }
}

#[test]
fn preallocated_clusters_lie_in_a_row_and_are_written_in_place() {
    let folder = tempfile::tempdir().unwrap();
    let size = 5 << 20;
    for (preallocation, name) in PREALLOCATIONS {
        let options = CreateOptions {
            preallocation,
            ..CreateOptions::new(size)
        };
        make(folder.path(), name, &options);
        let path = folder.path().join(name);
        let open = OpenOptions::new(Format::Qcow2);
        let image = Image::open(&path, &open, &Files::default()).unwrap();
        let plan = image.plan_write(0, size).unwrap();
        if preallocation == Preallocation::Off {
            let Plan::Fill { fill, .. } = plan else {
                panic!("{plan:?}");
            };
            image.commit(fill, false).unwrap();
            continue;
        }
        let Plan::Fast { extents, .. } = plan else {
            panic!("{name}: {plan:?}");
        };
        let len = image.file_len().unwrap();
        let (file, offset) = (0, len - size);
        assert_eq!(
            extents,
            [Extent::File {
                file,
                offset,
                len: size
            }]
        );
        let reserved = image.allocated().unwrap() >= size;
        assert_eq!(reserved, preallocation != Preallocation::Metadata, "{name}");
        image.write(0, &vec![1; size as usize]).unwrap();
        image.flush().unwrap();
        assert_eq!(image.file_len().unwrap(), len, "{name} grew");
    }
}

#[test]
fn contradictions_name_both_options() {
    let storage = || Arc::new(MemoryStorage::default());
    let data_file = |raw| {
        let (name, storage) = ("data".into(), storage());
        Some(DataFile { name, raw, storage })
    };
    let new = || CreateOptions::new(1 << 20);
    let old = || CreateOptions {
        version: 2,
        ..new()
    };
    let backing = Some(("base".to_owned(), Format::Raw));
    let cases = [
        (
            CreateOptions {
                version: 4,
                ..new()
            },
            "version is 4",
            "2 or 3",
        ),
        (
            CreateOptions {
                size: 1000,
                ..new()
            },
            "size 1000",
            "512",
        ),
        (
            CreateOptions {
                cluster_size: 3 << 10,
                ..new()
            },
            "cluster size is 3072",
            "512",
        ),
        (
            CreateOptions {
                refcount_bits: 3,
                ..new()
            },
            "refcounts of 3 bits",
            "64",
        ),
        (
            CreateOptions {
                refcount_bits: 8,
                ..old()
            },
            "refcounts",
            "version 2",
        ),
        (
            CreateOptions {
                compression: Compression::Zstd,
                ..old()
            },
            "compression",
            "version 2",
        ),
        (
            CreateOptions {
                lazy_refcounts: true,
                ..old()
            },
            "lazy refcounts",
            "version 2",
        ),
        (
            CreateOptions {
                extended_l2: true,
                ..old()
            },
            "extended L2",
            "version 2",
        ),
        (
            CreateOptions {
                data_file: data_file(false),
                ..old()
            },
            "data file",
            "version 2",
        ),
        (
            CreateOptions {
                extended_l2: true,
                cluster_size: 8192,
                ..new()
            },
            "extended L2",
            "cluster size of at least 16384",
        ),
        (
            CreateOptions {
                preallocation: Preallocation::Full,
                backing: backing.clone(),
                ..new()
            },
            "preallocation",
            "backing file",
        ),
        (
            CreateOptions {
                data_file: data_file(true),
                backing: backing.clone(),
                ..new()
            },
            "raw data file",
            "backing file",
        ),
        (
            CreateOptions {
                cluster_size: 512,
                ..CreateOptions::new(1 << 40)
            },
            "disk of 1099511627776 bytes",
            "clusters of 512",
        ),
        (
            CreateOptions {
                preallocation: Preallocation::Metadata,
                cluster_size: 2 << 20,
                ..CreateOptions::new(1 << 57)
            },
            "preallocation",
            "refcount",
        ),
        (
            CreateOptions {
                backing: Some((String::new(), Format::Raw)),
                ..new()
            },
            "backing",
            "name",
        ),
        (
            CreateOptions {
                backing: Some(("x".repeat(1024), Format::Raw)),
                ..new()
            },
            "backing file's name has 1024",
            "1023",
        ),
    ];
    for (options, one, other) in cases {
        let made = create(Path::new("new"), storage(), &options);
        let said = made.expect_err(one).to_string();
        assert!(said.contains(one) && said.contains(other), "{said}");
    }
}

/// A file that counts calls, and knows the largest write.
struct Counting {
    file: FileStorage,
    calls: AtomicUsize,
    largest: AtomicUsize,
}

impl Storage for Counting {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.largest.fetch_max(buf.len(), Ordering::Relaxed);
        self.file.write_at(offset, buf)
    }
    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.zero(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.punch(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }
}

#[test]
fn a_tebibyte_of_metadata_takes_little_memory_and_few_calls() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let storage = Arc::new(Counting {
        file: Arc::into_inner(new_file(&path)).unwrap(),
        calls: AtomicUsize::new(0),
        largest: AtomicUsize::new(0),
    });
    let options = CreateOptions {
        preallocation: Preallocation::Metadata,
        ..CreateOptions::new(1 << 40)
    };
    create(&path, storage.clone(), &options).unwrap();
    assert!(storage.largest.load(Ordering::Relaxed) <= 1 << 20);
    assert!(storage.calls.load(Ordering::Relaxed) < 200);
    let open = OpenOptions::new(Format::Qcow2);
    let image = Image::open_over(&path, storage, &open, None).unwrap();
    image.write((1 << 40) - 512, &[5; 512]).unwrap();
    let mut bytes = [0xee; 1024];
    image.read((1 << 40) - 1024, &mut bytes).unwrap();
    assert_eq!(bytes[..512], [0; 512]);
    assert_eq!(bytes[512..], [5; 512]);
}
