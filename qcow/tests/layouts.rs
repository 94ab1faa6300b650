//! Images as they are met in the wild, made again by QEMU's tools: they read as QEMU reads them, check
//! clean, take writes, and are clean to QEMU afterwards.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{CheckOptions, FileStorage, Format, Image, Info, OpenOptions, check};
use support::model::content;
use support::{have_qemu, open_file, qemu_content, qemu_img, qemu_io};

/// Holds an image of these words of `qemu-img`, each line a command, against QEMU.
fn meets(name: &str, commands: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut system: Vec<u8> = (0..4_u32 << 20).map(|i| (i / 700) as u8).collect();
    system[1 << 20..2 << 20].fill(0);
    std::fs::write(folder.join("system"), system).unwrap();
    for command in commands {
        qemu_img(folder, &command.split(' ').collect::<Vec<_>>());
    }
    sound(folder, name);
    let image = open(&folder.join("disk"));
    let before = content(&image);
    assert!(before == qemu_content(folder, "disk", "qcow2"), "{name}");
    // A boot's worth of writes, here and there.
    let mut model = before;
    for (i, at) in (0..model.len()).step_by(model.len() / 40).enumerate() {
        let bytes = vec![i as u8 + 1; 3000.min(model.len() - at)];
        image.write(at as u64, &bytes).unwrap();
        model[at..at + bytes.len()].copy_from_slice(&bytes);
        if i % 8 == 7 {
            image.flush().unwrap();
        }
    }
    image.close().unwrap();
    sound(folder, name);
    qemu_img(folder, &["check", "-q", "-f", "qcow2", "disk"]);
    assert!(model == qemu_content(folder, "disk", "qcow2"), "{name}");
    qemu_io(folder, "disk", &["write -P 9 1M 100k".into()]);
    model[1 << 20..(1 << 20) + (100 << 10)].fill(9);
    assert!(content(&open(&folder.join("disk"))) == model, "{name}");
}

fn open(path: &Path) -> Image {
    open_file(path, &OpenOptions::new(Format::Qcow2))
}

/// Our check finds nothing, and the header can be described.
fn sound(folder: &Path, name: &str) {
    let path = folder.join("disk");
    let file = std::fs::File::open(&path).unwrap();
    let storage = Arc::new(FileStorage::new(file));
    let report = check(&path, storage.clone(), &CheckOptions::default()).unwrap();
    assert!(report.is_clean(), "{name}: {:?}", report.findings);
    assert!(Info::read(&path, storage).unwrap().virtual_size > 0);
}

#[test]
fn cloud_images() {
    if !have_qemu() {
        return;
    }
    // All of it compressed, in the old version and the new, and grown on first use.
    for options in ["compat=0.10", "compat=1.1", "compression_type=zstd"] {
        let convert = format!("convert -c -f raw -O qcow2 -o {options} system disk");
        meets(options, &[&convert]);
        meets(options, &[&convert, "resize -q disk 20M"]);
        let below = convert.replace(" disk", " below");
        let over = "create -q -f qcow2 -b below -F qcow2 disk 20M";
        meets(options, &[&below, over]);
    }
}

#[test]
fn volumes_of_managers() {
    if !have_qemu() {
        return;
    }
    for options in [
        "compat=1.1,lazy_refcounts=on,preallocation=metadata",
        "compat=0.10,preallocation=metadata",
        "compat=1.1,preallocation=falloc,cluster_size=2M",
        "compat=1.1,extended_l2=on,cluster_size=128k",
    ] {
        let create = format!("create -q -f qcow2 -o {options} disk 8M");
        meets(options, &[&create]);
        let snapshots = [
            "snapshot -c 1700000000 disk",
            "snapshot -c before-update disk",
        ];
        meets(options, &[&[create.as_str()], &snapshots[..]].concat());
    }
}

#[test]
fn refcount_tables_of_every_size() {
    if !have_qemu() {
        return;
    }
    for options in [
        "cluster_size=512,refcount_bits=64",
        "cluster_size=1k,refcount_bits=1",
    ] {
        // Large once: the refcount table stays as it was then.
        let create = format!("create -q -f qcow2 -o {options},preallocation=metadata disk 64M");
        meets(options, &[&create, "resize -q --shrink disk 6M"]);
        let convert = format!("convert -f raw -O qcow2 -o {options} system disk");
        meets(options, &[&convert, "resize -q disk 30M"]);
    }
    // Amended from the one width to the other.
    let convert = "convert -f raw -O qcow2 -o cluster_size=4k system disk";
    for bits in [2, 8, 64] {
        let amend = format!("amend -q -f qcow2 -o refcount_bits={bits} disk");
        meets(&amend, &[convert, &amend]);
    }
}
