//! Persistent bitmaps: what QEMU marks we read, what we mark QEMU reads, and a crash leaves them
//! right or says that they are not.

#![allow(clippy::unwrap_used)] // A test fails by panicking.
#![allow(clippy::single_range_in_vec_init)] // A list of ranges may have one.

mod support;

use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cowshed_qcow::{Format, Image, MemoryStorage, OpenOptions, ResizeOptions};
use support::bitmaps::{all, assert_clean, in_memory};
use support::{Files, have_qemu, open_file, qemu_create, qemu_img, qemu_io, run};

fn open(path: &Path) -> Image {
    open_file(path, &OpenOptions::new(Format::Qcow2))
}

/// What QEMU says is marked. It exports none but a disabled bitmap of a read-only image.
fn qemu_dirty(folder: &Path, image: &str, name: &str) -> Vec<Range<u64>> {
    // A server goes when its client has gone, perhaps a little later: each has its own files.
    static SERVERS: AtomicU32 = AtomicU32::new(0);
    let server = SERVERS.fetch_add(1, Ordering::Relaxed);
    let export = &format!("export{server}");
    std::fs::copy(folder.join(image), folder.join(export)).unwrap();
    qemu_img(folder, &["bitmap", "--disable", export, name]);
    let socket = folder.join(format!("socket{server}"));
    let socket = socket.to_str().unwrap();
    let args = [
        "--fork", "-r", "-k", socket, "-f", "qcow2", "-B", name, export,
    ];
    // What it leaves in the background must not hold a pipe that this waits on.
    let status = Command::new("qemu-nbd")
        .args(args)
        .current_dir(folder)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status();
    assert!(status.unwrap().success(), "qemu-nbd {args:?}");
    let source = format!(
        "driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
    );
    let map = qemu_img(folder, &["map", "--output=json", "--image-opts", &source]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for entry in map.as_array().unwrap() {
        // Under this name "data" says that the bitmap has it clear.
        if entry["data"] == true {
            continue;
        }
        let start = entry["start"].as_u64().unwrap();
        let end = start + entry["length"].as_u64().unwrap();
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}

/// Name, granularity and flags as `qemu-img info` has them.
fn qemu_list(folder: &Path, image: &str) -> Vec<(String, u64, Vec<String>)> {
    let info = qemu_img(folder, &["info", "--output=json", image]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    bitmaps
        .into_iter()
        .flatten()
        .map(|bitmap| {
            let flags = bitmap["flags"].as_array().unwrap();
            (
                text(&bitmap["name"]),
                bitmap["granularity"].as_u64().unwrap(),
                flags.iter().map(text).collect(),
            )
        })
        .collect()
}

/// The same as this crate has it.
fn our_list(image: &Image) -> Vec<(String, u64, Vec<String>)> {
    let bitmaps = image.bitmaps().unwrap();
    bitmaps
        .into_iter()
        .map(|bitmap| {
            let flags = [(bitmap.in_use, "in-use"), (bitmap.enabled, "auto")];
            let flags = flags.iter().filter(|(set, _)| *set);
            (
                bitmap.name,
                bitmap.granularity,
                flags.map(|(_, name)| (*name).into()).collect(),
            )
        })
        .collect()
}

fn create_with_qemu(folder: &Path, options: &str, size: &str) {
    qemu_create(folder, options, "disk", size);
}

/// Disks over the product of cluster sizes and granularities, with a size that ends in the middle
/// of everything.
const KINDS: [(u32, u32, u64); 6] = [
    (512, 512, 3 << 20),
    (512, 65536, (2 << 20) + 512),
    (4096, 512, (40 << 20) + 1536),
    (65536, 65536, 9 << 30),
    (65536, 1 << 30, (5 << 30) + 512),
    (2 << 20, 4096, (1 << 30) + 4608),
];

/// Some writes near the ends and in the middle: offsets and lengths.
fn some_writes(size: u64) -> [(u64, u64); 5] {
    [
        (0, 512),
        (size / 3 / 512 * 512, 70_000 / 512 * 512),
        (size / 2 / 512 * 512 + 512, 512),
        (size / 4 * 3 / 512 * 512, 200 << 10),
        (size - 512, 512),
    ]
}

fn granules(writes: &[(u64, u64)], granularity: u64, size: u64) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for (offset, len) in writes {
        let start = offset / granularity * granularity;
        let end = (offset + len).next_multiple_of(granularity).min(size);
        match ranges.last_mut() {
            Some(last) if last.end >= start => last.end = last.end.max(end),
            _ => ranges.push(start..end),
        }
    }
    ranges
}

#[test]
fn what_qemu_marks_is_read() {
    if !have_qemu() {
        return;
    }
    for (cluster, granularity, size) in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        create_with_qemu(
            folder,
            &format!("cluster_size={cluster}"),
            &size.to_string(),
        );
        let granularity_text = granularity.to_string();
        let add = ["bitmap", "--add", "-g", &granularity_text, "disk"];
        qemu_img(folder, &[&add[..], &["b"]].concat());
        qemu_img(folder, &[&add[..], &["off", "--disable"]].concat());
        let mut writes = some_writes(size).to_vec();
        let commands = writes
            .iter()
            .map(|(offset, len)| format!("write {offset} {len}"));
        qemu_io(folder, "disk", &commands.collect::<Vec<_>>());
        let image = open(&folder.join("disk"));
        assert_eq!(our_list(&image), qemu_list(folder, "disk"));
        let expected = granules(&writes, granularity.into(), size);
        assert_eq!(all(&image, "b"), expected, "{cluster} {granularity}");
        assert_eq!(qemu_dirty(folder, "disk", "b"), expected);
        assert_eq!(all(&image, "off"), []);
        let bytes = expected.iter().map(|range| range.end - range.start);
        assert_eq!(image.dirty_bytes("b").unwrap(), bytes.sum::<u64>());

        // And on from there.
        image.write(size / 5 / 512 * 512, &[1; 4096]).unwrap();
        writes.insert(1, (size / 5 / 512 * 512, 4096));
        let expected = granules(&writes, granularity.into(), size);
        assert_eq!(all(&image, "b"), expected, "while it is open");
        let flags = |list: Vec<(String, u64, Vec<String>)>| list.into_iter().next().unwrap().2;
        assert_eq!(flags(our_list(&image)), ["auto"]);
        let other = OpenOptions {
            read_only: true,
            ..OpenOptions::new(Format::Qcow2)
        };
        let other = Image::open(&folder.join("disk"), &other, &Files::default()).unwrap();
        assert_eq!(flags(our_list(&other)), ["in-use", "auto"]);
        drop(image);
        assert_eq!(flags(qemu_list(folder, "disk")), ["auto"]);
        assert_eq!(qemu_dirty(folder, "disk", "b"), expected);
        assert_eq!(qemu_dirty(folder, "disk", "off"), []);
        qemu_img(folder, &["check", "-q", "disk"]);
    }
}

#[test]
fn what_we_mark_qemu_reads() {
    if !have_qemu() {
        return;
    }
    for (cluster, granularity, size) in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        create_with_qemu(
            folder,
            &format!("cluster_size={cluster}"),
            &size.to_string(),
        );
        let image = open(&folder.join("disk"));
        image.add_bitmap("b", Some(granularity), true).unwrap();
        image.add_bitmap("off", None, false).unwrap();
        let writes = some_writes(size);
        for (offset, len) in writes {
            image.write(offset, &vec![7; len as usize]).unwrap();
        }
        image.close().unwrap();
        qemu_img(folder, &["check", "-q", "disk"]);
        let expected = granules(&writes, granularity.into(), size);
        assert_eq!(
            qemu_dirty(folder, "disk", "b"),
            expected,
            "{cluster} {granularity}"
        );
        let default = u64::from(cluster.clamp(4096, 65536));
        let auto = vec!["auto".to_owned()];
        let listed = [
            ("b".to_owned(), granularity.into(), auto),
            ("off".into(), default, vec![]),
        ];
        assert_eq!(qemu_list(folder, "disk"), listed);
    }
}

/// Each operation of `qemu-img bitmap`, done by QEMU and by us on two copies.
#[test]
fn operations_are_as_qemu_has_them() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    create_with_qemu(folder, "cluster_size=4k", "9M");
    for (name, granularity) in [("fine", "512"), ("coarse", "128k"), ("other", "4k")] {
        qemu_img(
            folder,
            &["bitmap", "--add", "-g", granularity, "disk", name],
        );
        let write = format!("write {} 70k", 1000 * 512 * name.len());
        qemu_io(folder, "disk", &[write]);
        if name == "fine" {
            qemu_img(folder, &["bitmap", "--disable", "disk", name]);
        }
    }
    type Operation = (
        &'static [&'static str],
        fn(&Image) -> cowshed_qcow::Result<()>,
    );
    let operations: [Operation; 9] = [
        (&["--merge", "fine", "disk", "coarse"], |i| {
            i.merge_bitmap("coarse", "fine")
        }),
        (&["--merge", "coarse", "disk", "fine"], |i| {
            i.merge_bitmap("fine", "coarse")
        }),
        (&["--merge", "fine", "disk", "fine"], |i| {
            i.merge_bitmap("fine", "fine")
        }),
        (&["--clear", "disk", "coarse"], |i| i.clear_bitmap("coarse")),
        (&["--disable", "disk", "other"], |i| {
            i.disable_bitmap("other")
        }),
        (&["--enable", "disk", "fine"], |i| i.enable_bitmap("fine")),
        (&["--add", "disk", "new"], |i| {
            i.add_bitmap("new", None, true)
        }),
        (&["--add", "--disable", "-g", "1M", "disk", "less"], |i| {
            i.add_bitmap("less", Some(1 << 20), false)
        }),
        (&["--remove", "disk", "coarse"], |i| {
            i.remove_bitmap("coarse")
        }),
    ];
    std::fs::create_dir(folder.join("ours")).unwrap();
    std::fs::copy(folder.join("disk"), folder.join("ours/disk")).unwrap();
    for (args, operation) in operations {
        qemu_img(folder, &[&["bitmap"], args].concat());
        let image = open(&folder.join("ours/disk"));
        operation(&image).unwrap();
        drop(image);
        let ours = &folder.join("ours");
        qemu_img(ours, &["check", "-q", "disk"]);
        let mut lists = [qemu_list(folder, "disk"), qemu_list(ours, "disk")];
        lists.iter_mut().for_each(|list| list.sort());
        assert_eq!(lists[0], lists[1], "{args:?}");
        for (name, ..) in &lists[0] {
            let theirs = qemu_dirty(folder, "disk", name);
            assert_eq!(qemu_dirty(ours, "disk", name), theirs, "{args:?}: {name}");
        }
    }
}

/// What QEMU refuses we refuse, and change nothing.
#[test]
fn operations_that_are_refused() {
    let (storage, image) = in_memory(1 << 20, 4096);
    image.add_bitmap("b", None, true).unwrap();
    image.flush().unwrap();
    let before = storage.to_vec();
    let too_long = "x".repeat(1024);
    let refused: [(&str, cowshed_qcow::Result<()>); 13] = [
        ("there is one", image.add_bitmap("b", None, true)),
        ("256", image.add_bitmap("z", Some(256), true)),
        ("3000", image.add_bitmap("z", Some(3000), true)),
        ("name has 0", image.add_bitmap("", None, true)),
        ("name has 1024", image.add_bitmap(&too_long, None, true)),
        ("there is none", image.remove_bitmap("z")),
        ("there is none", image.clear_bitmap("z")),
        ("there is none", image.enable_bitmap("z")),
        ("there is none", image.disable_bitmap("z")),
        ("there is none", image.merge_bitmap("b", "z")),
        ("there is none", image.merge_bitmap("z", "b")),
        ("past the end", image.mark_bitmap("b", &[0..1 << 30])),
        ("there is none", image.dirty_bytes("z").map(drop)),
    ];
    for (reason, result) in refused {
        let error = result.unwrap_err();
        assert!(error.to_string().contains(reason), "{reason}: {error}");
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    }
    image.flush().unwrap();
    assert!(storage.to_vec() == before);
    assert_clean(&before);

    // A granularity that makes more bits than a bitmap can have.
    let (_, image) = in_memory(4 << 40, 65536);
    let error = image.add_bitmap("b", Some(512), true).unwrap_err();
    assert!(error.to_string().contains("choose a larger"), "{error}");
    image.add_bitmap("b", Some(1024), true).unwrap();
    let (_, image) = in_memory(0, 65536);
    assert!(image.add_bitmap("b", None, true).is_err());
}

#[test]
fn old_images_and_raw_files_have_none() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    create_with_qemu(folder.path(), "compat=0.10", "1M");
    let image = open(&folder.path().join("disk"));
    assert_eq!(image.bitmaps().unwrap(), []);
    let error = image.add_bitmap("b", None, true).unwrap_err();
    assert!(error.to_string().contains("compat=1.1"), "{error}");

    let storage = Arc::new(MemoryStorage::new(vec![0; 4096]));
    let raw = OpenOptions::new(Format::Raw);
    let raw = Image::open_over(Path::new("raw"), storage, &raw, None).unwrap();
    assert_eq!(raw.bitmaps().unwrap(), []);
    assert!(raw.add_bitmap("b", None, true).is_err());
    assert!(raw.dirty_bytes("b").is_err());
    raw.store_bitmaps().unwrap();
}

/// A process that is killed leaves bitmaps that are named as inconsistent, here and in QEMU.
#[test]
fn a_crash_leaves_them_in_use() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    create_with_qemu(folder, "cluster_size=4k", "1M");
    let image = open(&folder.join("disk"));
    image.add_bitmap("b", None, true).unwrap();
    image.add_bitmap("off", None, false).unwrap();
    image.write(0, &[1; 512]).unwrap();
    image.flush().unwrap();
    std::fs::copy(folder.join("disk"), folder.join("crashed")).unwrap();
    image.close().unwrap();

    let image = open(&folder.join("crashed"));
    let flags: Vec<_> = qemu_list(folder, "crashed")
        .into_iter()
        .map(|b| b.2)
        .collect();
    assert_eq!(flags, [vec!["in-use", "auto"], vec![]]);
    let bitmaps = image.bitmaps().unwrap();
    assert!(bitmaps[0].in_use && bitmaps[0].inconsistent.is_some());
    assert!(!bitmaps[1].in_use && bitmaps[1].inconsistent.is_none());
    for refused in [
        image.clear_bitmap("b"),
        image.enable_bitmap("b"),
        image.disable_bitmap("b"),
        image.merge_bitmap("b", "off"),
        image.merge_bitmap("off", "b"),
        image.mark_bitmap("b", &[0..512]),
        image.dirty_bytes("b").map(drop),
    ] {
        let error = refused.unwrap_err();
        assert!(error.to_string().contains("in use"), "{error}");
    }
    image.write(4096, &[1; 512]).unwrap();
    drop(image);
    assert_eq!(qemu_list(folder, "crashed")[0].2, ["in-use", "auto"]);
    let image = open(&folder.join("crashed"));
    image.remove_bitmap("b").unwrap();
    assert_eq!(our_list(&image).len(), 1);
    image.remove_bitmap("off").unwrap();
    drop(image);
    assert_eq!(qemu_list(folder, "crashed"), []);
    run(folder, "qemu-img", &["check", "-q", "crashed"]);
    let header = std::fs::read(folder.join("crashed")).unwrap();
    assert_eq!(header[95] & 1, 0, "the autoclear bit");
}

/// Growing and shrinking, to sizes that end in the middle of a bit, of a byte, of a cluster of bits.
#[test]
fn a_resized_disk_keeps_its_bitmaps() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let shrink = ResizeOptions {
        shrink: true,
        ..ResizeOptions::default()
    };
    for cluster in [512, 65536] {
        create_with_qemu(folder, &format!("cluster_size={cluster}"), "6M");
        for (name, granularity) in [("b", "512"), ("coarse", "64k")] {
            let args = ["bitmap", "--add", "-g", granularity, "disk", name];
            qemu_img(folder, &args);
        }
        let ours = folder.join("ours");
        let _ = std::fs::remove_dir_all(&ours);
        std::fs::create_dir(&ours).unwrap();
        std::fs::copy(folder.join("disk"), ours.join("disk")).unwrap();
        let sizes = [
            (6 << 20) + 512,
            (5 << 20) + 1536,
            (5 << 20) + 4096,
            9 << 20,
            512,
            1 << 20,
        ];
        for size in sizes {
            let image = open(&ours.join("disk"));
            let old = image.size();
            let writes = [(0, 512), (old / 3 / 512 * 512, 512), (old - 512, 512)];
            let commands = writes.map(|(offset, len)| format!("write {offset} {len}"));
            qemu_io(folder, "disk", &commands);
            for (offset, len) in writes {
                image.write(offset, &vec![0xcd; len]).unwrap();
            }
            image.resize(size, &shrink).unwrap();
            qemu_img(
                folder,
                &["resize", "-q", "--shrink", "disk", &size.to_string()],
            );
            for name in ["b", "coarse"] {
                let theirs = qemu_dirty(folder, "disk", name);
                assert_eq!(all(&image, name), theirs, "{cluster}: {old} to {size}");
            }
            drop(image);
            qemu_img(&ours, &["check", "-q", "disk"]);
            assert_eq!(qemu_list(&ours, "disk"), qemu_list(folder, "disk"));
            assert_eq!(
                qemu_dirty(&ours, "disk", "b"),
                qemu_dirty(folder, "disk", "b")
            );
        }
        let image = open(&ours.join("disk"));
        let none = image.resize(0, &shrink);
        assert!(none.unwrap_err().to_string().contains("remove it first"));
        std::fs::remove_file(folder.join("disk")).unwrap();
    }
}
