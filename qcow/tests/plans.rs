//! How a write is planned: in place, with a place to be found and nothing to read, or with more.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use cowshed_qcow::{Extent, FileStorage, Fill, Format, Image, OpenOptions, Plan, Storage};
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
fn without_subclusters_whole_clusters_are_filled() {
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

/// Plans a write to new clusters, and writes it.
fn fill(image: &Image, offset: u64, bytes: &[u8]) -> Fill {
    let Plan::Fill { extents, fill } = image.plan_write(offset, bytes.len() as u64).unwrap() else {
        panic!("nothing is allocated yet");
    };
    let files = image.files();
    let mut rest = bytes;
    for extent in extents {
        let Extent::File { file, offset, len } = extent else {
            panic!("{extent:?}");
        };
        let part = rest.split_off(..len as usize).unwrap();
        let file = File::from(files[file].try_clone_to_owned().unwrap());
        file.write_all_at(part, offset).unwrap();
    }
    assert!(rest.is_empty());
    fill
}

#[test]
fn a_fill_is_seen_when_it_is_committed_and_by_nobody_if_it_is_not() {
    if !have_qemu() {
        return;
    }
    for options in ["cluster_size=64k", "cluster_size=128k,extended_l2=on"] {
        let folder = tempfile::tempdir().unwrap();
        let disk = image(folder.path(), options, &["write -P 1 256k 128k"]);
        let content = |offset| {
            let mut bytes = vec![0; 256 << 10];
            disk.read(offset, &mut bytes).unwrap();
            bytes
        };
        let (new, none) = ([5; 256 << 10], [0; 256 << 10]);
        let first = fill(&disk, 0, &new);
        assert!(content(0) == none, "{options}: not committed yet");
        // Who comes meanwhile is not given another place, nor the same one.
        assert!(matches!(disk.plan_write(4096, 4096).unwrap(), Plan::Slow));
        // Over clusters that are there already.
        let second = fill(&disk, 256 << 10, &new);
        disk.flush().unwrap();
        disk.commit(second, false).unwrap();
        disk.commit(first, true).unwrap();
        assert!(content(0) == new, "{options}");
        // What was overwritten in place is there whatever becomes of the rest.
        let there = [[5; 128 << 10], [0; 128 << 10]].concat();
        assert!(content(256 << 10) == there, "{options}");
        let third = fill(&disk, 512 << 10, &new);
        disk.commit(third, true).unwrap();
        disk.close().unwrap();
        qemu_img(folder.path(), &["check", "-q", "disk"]);
        qemu_io(folder.path(), "disk", &["read -P 5 512k 256k".to_owned()]);
    }
}

#[test]
fn who_cannot_wait_is_told_that_tables_are_missing() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let disk = image(folder.path(), "cluster_size=64k", &["write -P 1 0 64k"]);
    assert!(matches!(
        disk.plan_read_at_once(0, 512).unwrap(),
        Plan::Slow
    ));
    assert!(matches!(
        disk.plan_write_at_once(0, 512).unwrap(),
        Plan::Slow
    ));
    assert!(matches!(disk.plan_read(0, 512).unwrap(), Plan::Fast { .. }));
    assert!(matches!(
        disk.plan_read_at_once(0, 512).unwrap(),
        Plan::Fast { .. }
    ));
    assert!(matches!(
        disk.plan_write_at_once(0, 512).unwrap(),
        Plan::Fast { .. }
    ));
}

#[test]
fn a_flush_is_a_sync_only_where_no_table_waits_for_it() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let disk = image(folder.path(), "cluster_size=64k", &["write -P 1 0 128k"]);
    assert!(disk.needs_sync_only());
    disk.write(0, &[2; 4096]).unwrap();
    assert!(disk.needs_sync_only(), "in place");
    disk.write(512 << 10, &[3; 64 << 10]).unwrap();
    assert!(!disk.needs_sync_only(), "a new cluster");
    disk.flush().unwrap();
    assert!(disk.needs_sync_only());
    // What a request may still be reading is given back by a later flush.
    let plan = disk.plan_read(0, 4096).unwrap();
    disk.discard(64 << 10, 64 << 10).unwrap();
    assert!(!disk.needs_sync_only(), "a dropped cluster");
    disk.flush().unwrap();
    assert!(!disk.needs_sync_only(), "a cluster that waits for a reader");
    drop(plan);
    disk.flush().unwrap();
    assert!(disk.needs_sync_only());
    disk.synced(Ok(())).unwrap();
    // Nobody knows what is durable after a failure, whoever saw it.
    assert!(disk.synced(Err(io::Error::from_raw_os_error(5))).is_err());
    assert!(disk.flush().is_err());
    assert!(disk.synced(Ok(())).is_err());
    drop(disk);

    let raw = open_file(&folder.path().join("base"), &OpenOptions::new(Format::Raw));
    assert!(raw.needs_sync_only());
    drop(raw);
    let file = File::open(folder.path().join("base")).unwrap();
    assert!(!FileStorage::without_sync(file).syncs_file());
}
