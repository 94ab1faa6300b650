//! How a write is planned: in place, with a place to be found and nothing to read, or with more.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::path::Path;

use cowshed_qcow::{Format, Image, OpenOptions, Plan};
use support::{have_qemu, open_file, qemu_img, qemu_io};

const CLUSTER: u64 = 128 << 10;

fn image(folder: &Path, options: &str, commands: &[&str]) -> Image {
    qemu_img(folder, &["create", "-q", "-f", "raw", "base", "1M"]);
    let create = [
        "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "-o", options,
    ];
    qemu_img(folder, &[&create[..], &["disk", "1M"]].concat());
    for command in commands {
        match command.strip_prefix("snapshot ") {
            Some(name) => drop(qemu_img(folder, &["snapshot", "-c", name, "disk"])),
            None => qemu_io(folder, "disk", &[(*command).to_owned()]),
        }
    }
    open_file(&folder.join("disk"), &OpenOptions::new(Format::Qcow2))
}

fn plan(image: &Image, offset: u64, len: u64) -> &'static str {
    match image.plan_write(offset, len).unwrap() {
        Plan::Fast { .. } => "fast",
        Plan::Fill { fill, .. } => {
            image.commit(fill, false).unwrap();
            "fill"
        }
        Plan::Slow => "slow",
    }
}

#[test]
fn whole_subclusters_are_filled_and_parts_of_them_slow() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let disk = image(folder.path(), "cluster_size=128k,extended_l2=on", &[]);
    assert_eq!(plan(&disk, 4096, 4096), "fill");
    assert_eq!(plan(&disk, 4096, 5 * CLUSTER), "fill");
    assert_eq!(plan(&disk, 4096, 512), "slow");
    assert_eq!(plan(&disk, 4096, 4608), "slow");
    disk.write(4096, &[1; 4096]).unwrap();
    assert_eq!(plan(&disk, 4096, 4096), "fast");
    assert_eq!(plan(&disk, 5120, 512), "fast");
    // The cluster is there, its next subcluster is not; the one after that is another cluster's.
    assert_eq!(plan(&disk, 4096, 8192), "fill");
    assert_eq!(plan(&disk, 7680, 1024), "slow");
    assert_eq!(plan(&disk, CLUSTER - 4096, 8192), "fill");
    disk.close().unwrap();
    qemu_img(folder.path(), &["check", "-q", "disk"]);
}

#[test]
fn without_subclusters_whole_clusters_are_brief() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let disk = image(folder.path(), "cluster_size=128k", &[]);
    assert_eq!(plan(&disk, 0, CLUSTER), "fill");
    assert_eq!(plan(&disk, CLUSTER, 3 * CLUSTER), "fill");
    assert_eq!(plan(&disk, 0, 4096), "slow");
    assert_eq!(plan(&disk, 0, CLUSTER + 4096), "slow");
}

#[test]
fn what_others_refer_to_or_is_compressed_is_replaced_as_a_whole() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let commands = [
        "write -P 1 0 128k",
        "write -c -P 2 128k 128k",
        "snapshot one",
    ];
    let disk = image(folder.path(), "cluster_size=128k,extended_l2=on", &commands);
    for offset in [0, CLUSTER] {
        assert_eq!(plan(&disk, offset, 4096), "slow");
        assert_eq!(plan(&disk, offset, CLUSTER), "fill");
    }
    assert_eq!(plan(&disk, 2 * CLUSTER, 4096), "fill");
}
