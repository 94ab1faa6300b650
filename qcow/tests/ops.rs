//! Work on whole images gives what QEMU's tools give.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use cowshed_qcow::ops::{
    CommitOptions, CopyOptions, Difference, Task, commit, compare, copy, rebase,
};
use cowshed_qcow::{CreateOptions, Error, FileStorage, Format, Image, OpenOptions, create};
use support::{Random, have_qemu, open_file, qemu_content, qemu_img, qemu_io};

fn open(path: &Path, format: Format, read_only: bool) -> Image {
    let options = OpenOptions {
        read_only,
        ..OpenOptions::new(format)
    };
    open_file(path, &options)
}

/// An overlay with data, zeros, holes and zero clusters, over a raw base that is shorter.
fn chain(folder: &Path) {
    let base = std::fs::File::create(folder.join("base")).unwrap();
    base.set_len(20 << 20).unwrap();
    for (i, at) in [0, 3_000_000, 11_000_000].into_iter().enumerate() {
        let bytes = vec![i as u8 + 1; 1_500_000];
        std::os::unix::fs::FileExt::write_all_at(&base, &bytes, at).unwrap();
    }
    let args = [
        "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top", "30M",
    ];
    qemu_img(folder, &args);
    let mut random = Random(3);
    let mut commands = Vec::new();
    for i in 0..30 {
        let at = random.below(29 << 11) << 9;
        commands.push(match i % 3 {
            0 => format!("write -P {i} {at} 300k"),
            1 => format!("write -P 0 {at} 200k"),
            _ => format!("write -z {at} 150k"),
        });
    }
    qemu_io(folder, "top", &commands);
}

#[test]
fn copies_are_what_qemu_finds_identical() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    chain(folder);
    let source = open(&folder.join("top"), Format::Qcow2, true);
    for (i, (sparse, threads, out_of_order, offload)) in [
        (Some(4096), 1, false, false),
        (Some(65536), 4, false, false),
        (Some(512), 3, true, false),
        (None, 2, false, false),
        (Some(4096), 2, true, true),
    ]
    .into_iter()
    .enumerate()
    {
        for (format, target_is_zero) in [
            (Format::Qcow2, true),
            (Format::Raw, true),
            (Format::Raw, false),
        ] {
            let name = format!("{i}-{}-{target_is_zero}", format.name());
            let path = folder.join(&name);
            let file = std::fs::File::create_new(&path).unwrap();
            match format {
                Format::Raw if target_is_zero => file.set_len(source.size()).unwrap(),
                Format::Raw => std::fs::write(&path, vec![7; source.size() as usize]).unwrap(),
                Format::Qcow2 => {
                    let file = std::fs::File::options().read(true).write(true).open(&path);
                    let storage = Arc::new(FileStorage::new(file.unwrap()));
                    create(&path, storage, &CreateOptions::new(source.size())).unwrap();
                }
            }
            let target = open(&path, format, false);
            let options = CopyOptions {
                sparse,
                threads,
                out_of_order,
                target_is_zero,
                offload,
                ..CopyOptions::default()
            };
            let task = Task::default();
            copy(&source, &target, 0, &options, &task).unwrap();
            assert_eq!((task.done(), task.total()), (source.size(), source.size()));
            target.flush().unwrap();
            drop(target);
            let args = ["compare", "-f", "qcow2", "-F", format.name(), "top", &name];
            qemu_img(folder, &args);
            if sparse.is_some() {
                let kept = open(&path, format, true).allocated().unwrap();
                assert!(kept < 20 << 20, "{name}: {kept} bytes");
            }
            let target = open(&path, format, true);
            let found = compare(&source, &target, false, 2, &Task::default()).unwrap();
            assert_eq!(found.difference, None, "{name}");
        }
    }
}

#[test]
fn compressed_copies_and_copies_over_a_base() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    chain(folder);
    let source = open(&folder.join("top"), Format::Qcow2, true);
    for (name, compress, only_differences, cluster) in [
        ("compressed", true, false, "4k"),
        ("over", false, true, "64k"),
        ("both", true, true, "64k"),
    ] {
        let options = format!("cluster_size={cluster}");
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if only_differences {
            args.extend(["-b", "base", "-F", "raw"]);
        }
        args.extend([name, "30M"]);
        qemu_img(folder, &args);
        let target = open(&folder.join(name), Format::Qcow2, false);
        let options = CopyOptions {
            compress,
            only_differences,
            target_is_zero: !only_differences,
            threads: 3,
            ..CopyOptions::default()
        };
        copy(&source, &target, 0, &options, &Task::default()).unwrap();
        drop(target);
        qemu_img(
            folder,
            &["compare", "-f", "qcow2", "-F", "qcow2", "top", name],
        );
        qemu_img(folder, &["check", "-q", name]);
        let size = std::fs::metadata(folder.join(name)).unwrap().len();
        let most = if compress { 2 << 20 } else { 9 << 20 };
        assert!(size < most, "{name}: {size} bytes");
    }
}

#[test]
fn a_compressed_copy_ends_where_its_source_does() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("source"), vec![1; 100_000]).unwrap();
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "target", "1M"]);
    qemu_io(folder, "target", &["write -P 2 0 1M".into()]);
    std::fs::copy(folder.join("target"), folder.join("qemus")).unwrap();
    let source = open(&folder.join("source"), Format::Raw, true);
    let target = open(&folder.join("target"), Format::Qcow2, false);
    let options = CopyOptions {
        compress: true,
        ..CopyOptions::default()
    };
    copy(&source, &target, 0, &options, &Task::default()).unwrap();
    target.close().unwrap();
    // Compressed it writes neither a part of a cluster nor one that is allocated.
    let convert = ["convert", "-n", "-f", "raw", "-O", "qcow2"];
    qemu_img(folder, &[&convert[..], &["source", "qemus"]].concat());
    let expected = qemu_content(folder, "qemus", "qcow2");
    // A raw image is of whole sectors, the last one filled up with zeros.
    assert!(expected[source.size() as usize..].iter().all(|&b| b == 2));
    assert!(qemu_content(folder, "target", "qcow2") == expected);
}

#[test]
fn comparing_finds_what_qemu_finds() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    chain(folder);
    let args = ["convert", "-f", "qcow2", "-O", "qcow2", "top", "other"];
    qemu_img(folder, &args);
    let mut random = Random(5);
    for i in 0..40 {
        if i > 0 {
            // Differences come in, and go again.
            let at = random.below(29 << 11) << 9;
            let value = random.below(2) * 9;
            qemu_io(folder, "other", &[format!("write -P {value} {at} 512")]);
        }
        if i == 20 {
            qemu_img(folder, &["resize", "-q", "-f", "qcow2", "other", "33M"]);
        }
        if i == 30 {
            qemu_io(folder, "other", &["write -P 4 31M 1".into()]);
        }
        for strict in [false, true] {
            let mut args = vec!["compare", "-f", "qcow2", "-F", "qcow2", "top", "other"];
            if strict {
                args.push("-s");
            }
            let output = Command::new("qemu-img")
                .args(&args)
                .current_dir(folder)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            let (a, b) = (
                open(&folder.join("top"), Format::Qcow2, true),
                open(&folder.join("other"), Format::Qcow2, true),
            );
            let found = compare(&a, &b, strict, 1 + i % 3, &Task::default()).unwrap();
            assert_eq!(found.sizes_differ, a.size() != b.size());
            if strict && found.sizes_differ {
                continue; // QEMU looks no further.
            }
            let ours = match found.difference {
                None => "Images are identical.".to_owned(),
                Some(Difference::Content { offset }) => {
                    // QEMU's granularity is a sector.
                    format!("Content mismatch at offset {}!", offset / 512 * 512)
                }
                Some(Difference::Allocation { offset }) => {
                    format!("Strict mode: Offset {offset} block status mismatch!")
                }
            };
            assert!(said.contains(&ours), "{i}, {strict}: {ours}, QEMU: {said}");
        }
    }
}

#[test]
fn a_stopped_task_ends_with_an_error() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        let file = std::fs::File::create(folder.path().join(name)).unwrap();
        file.set_len(64 << 20).unwrap();
    }
    let a = open(&folder.path().join("a"), Format::Raw, true);
    let b = open(&folder.path().join("b"), Format::Raw, false);
    let task = Task::default();
    task.stop();
    let compared = compare(&a, &b, false, 3, &task);
    assert!(matches!(compared, Err(Error::Stopped)), "{compared:?}");
    let copied = copy(&a, &b, 0, &CopyOptions::default(), &task);
    assert!(matches!(copied, Err(Error::Stopped)), "{copied:?}");
}

/// Overlays of two, three and one clusters' difference, committed one by one and both at once.
#[test]
fn commits_are_what_qemu_commits() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for above in [1, 2] {
        for (base, middle, top) in [("3M", "2M", "3M"), ("4M", "4M", "3M"), ("4M", "3M", "4M")] {
            let _ = std::fs::remove_file(folder.join("base"));
            qemu_img(folder, &["create", "-q", "-f", "qcow2", "base", base]);
            qemu_io(folder, "base", &[format!("write -P 1 0 {base}")]);
            for (name, below, size) in [("middle", "base", middle), ("top", "middle", top)] {
                let args = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
                let _ = std::fs::remove_file(folder.join(name));
                qemu_img(folder, &[&args[..], &[below, name, size]].concat());
                let commands = [
                    "write -P 5 70k 300k",
                    "write -z 1M 100k",
                    "discard 1500k 128k",
                ];
                let shift = if name == "top" {
                    "write -P 6 300k 500k"
                } else {
                    "write -P 7 1900k 5k"
                };
                let commands: Vec<String> = commands.map(String::from).into_iter().collect();
                qemu_io(folder, name, &[&commands[..], &[shift.to_owned()]].concat());
            }
            let expected = qemu_content(folder, "top", "qcow2");
            let overlay = open(&folder.join("top"), Format::Qcow2, false);
            let target = ["middle", "base"][above - 1];
            let below = open(&folder.join(target), Format::Qcow2, false);
            if below.size() < overlay.size() {
                continue;
            }
            let options = CommitOptions {
                above,
                make_empty: above == 1,
                threads: 2,
            };
            commit(&overlay, &below, &options, &Task::default()).unwrap();
            drop(below);
            let now = qemu_content(folder, target, "qcow2");
            assert!(now[..expected.len()] == expected, "{base} {middle} {top}");
            if above > 1 {
                continue;
            }
            drop(overlay);
            qemu_img(folder, &["check", "-q", "top"]);
            assert!(qemu_content(folder, "top", "qcow2") == expected);
            let map = qemu_img(folder, &["map", "--output=json", "top"]);
            assert!(!map.contains(r#""depth": 0, "present": true"#), "{map}");
        }
    }
}

#[test]
fn a_rebased_overlay_keeps_its_content() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    chain(folder);
    let expected = qemu_content(folder, "top", "qcow2");
    let copy_of = |name: &str| {
        std::fs::copy(folder.join("top"), folder.join(name)).unwrap();
        open(&folder.join(name), Format::Qcow2, false)
    };
    // A base that is longer and differs here and there, one that is shorter, and none.
    let mut other = std::fs::read(folder.join("base")).unwrap();
    other.resize(40 << 20, 9);
    for at in [100, 3_500_000, 9_000_000] {
        other[at..at + 70_000].fill(8);
    }
    std::fs::write(folder.join("longer"), &other).unwrap();
    std::fs::write(folder.join("shorter"), &other[..12 << 20]).unwrap();
    for (new, compat) in [("longer", "1.1"), ("shorter", "1.1"), ("longer", "0.10")] {
        let name = format!("over-{new}-{compat}");
        drop(copy_of(&name));
        let compat = format!("compat={compat}");
        qemu_img(
            folder,
            &["amend", "-q", "-f", "qcow2", "-o", &compat, &name],
        );
        let overlay = open(&folder.join(&name), Format::Qcow2, false);
        let base = open(&folder.join(new), Format::Raw, true);
        rebase(&overlay, Some(&base), false, 2, &Task::default()).unwrap();
        drop(overlay);
        qemu_img(folder, &["rebase", "-u", "-b", new, "-F", "raw", &name]);
        assert!(qemu_content(folder, &name, "qcow2") == expected, "{new}");
        qemu_img(folder, &["check", "-q", &name]);
        let kept = std::fs::metadata(folder.join(&name)).unwrap().len();
        assert!(
            kept < 20 << 20,
            "{new}: what is the same is not copied: {kept} bytes"
        );
    }
    let overlay = copy_of("alone");
    rebase(&overlay, None, false, 2, &Task::default()).unwrap();
    drop(overlay);
    qemu_img(folder, &["rebase", "-u", "-b", "", "alone"]);
    assert!(qemu_content(folder, "alone", "qcow2") == expected);
}
