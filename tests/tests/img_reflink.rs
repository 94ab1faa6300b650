//! `cowshed img convert` where the file system can share blocks: on btrfs and XFS, made here in files and
//! mounted, which takes root and loop devices.

#![allow(clippy::unwrap_used)] // A test fails by panicking.
use std::process::Command;

use cowshed_tests::cowshed::binary;
use cowshed_tests::skip;
use tempfile::TempDir;

/// Makes a file system by `mkfs` and runs a script in it. `img` is `cowshed img`, `raw` a disk of 12 MiB:
/// noise, zeros that are written, noise, a hole. `new FILE WORDS` converts to a new file.
fn on(mkfs: &str, script: &str) {
    const MOUNTS: [&str; 3] = ["-m", "sh", "-c"];
    let folder = TempDir::new().unwrap();
    let run = |script: &str| {
        // What is mounted goes with the namespace, and its loop device with that.
        let mut unshare = Command::new("unshare");
        let unshare = unshare.args(MOUNTS).arg(script).current_dir(&folder);
        unshare.env("COWSHED", binary()).output().unwrap()
    };
    let mount = format!(
        "set -eu
        PATH=$PATH:/usr/sbin:/sbin
        truncate -s 400M image
        {mkfs} image > /dev/null
        mkdir -p there
        mount -o loop image there"
    );
    let probe = run(&mount);
    if !probe.status.success() {
        let why = String::from_utf8_lossy(&probe.stderr).into_owned();
        skip::say(&format!("{mkfs} cannot be mounted: {}", why.trim()));
        return;
    }
    let output = run(&format!(
        "set -eu
        PATH=$PATH:/usr/sbin:/sbin
        mount -o loop image there
        cd there
        img() {{ \"$COWSHED\" img \"$@\"; }}
        new() {{ rm -f $1; name=$1; shift; img convert \"$@\" $name; }}
        same() {{ qemu-img compare -q -f raw -F $2 raw $1; }}
        # Bytes of a file's extents that another file has too.
        shared() {{
            sync $1
            filefrag -b1 -v $1 | awk -F: '/shared/ {{ sum += $4 }} END {{ print sum + 0 }}'
        }}
        head -c 4M /dev/urandom > raw
        head -c 4M /dev/zero >> raw
        head -c 2M /dev/urandom >> raw
        truncate -s 12M raw
        {script}"
    ));
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{mkfs}: {said}");
}

const SHARING: [&str; 2] = ["mkfs.xfs -q -f -m reflink=1", "mkfs.btrfs -q -f"];

#[test]
fn data_is_shared_and_zeros_are_left_out() {
    for mkfs in SHARING {
        on(
            mkfs,
            "for words in '' '-W -m 4' '-o cluster_size=4k' '-o cluster_size=2M' '-S 64k'; do
                new disk -f raw -O qcow2 $words raw
                same disk qcow2
                qemu-img check -q disk
                # The clusters of the image at the ends of a run are the file system's blocks too.
                [ $(shared disk) = $((6 << 20)) ] || { echo \"$words: $(shared disk)\"; exit 1; }
            done
            new disk -f raw -O qcow2 raw
            new back -f qcow2 -O raw disk
            same back raw
            cmp raw back
            [ $(shared back) = $((6 << 20)) ]
            new copy -f raw -O raw raw
            cmp raw copy
            [ $(shared copy) = $((6 << 20)) ]
            # Each has its own bytes when one is written.
            qemu-io -f qcow2 -c 'write -P 7 0 12M' disk > /dev/null
            cmp raw back
            same back raw",
        );
    }
}

#[test]
fn offloaded_zeros_are_copied_unseen() {
    for mkfs in SHARING {
        on(
            mkfs,
            "for format in raw qcow2; do
                new disk -C -f raw -O $format raw
                same disk $format
                [ $(shared disk) = $((10 << 20)) ] || { shared disk; exit 1; }
            done
            qemu-img check -q disk
            # What cannot be offloaded is copied as ever.
            new small -f raw -O qcow2 -c raw
            new back -C -f qcow2 -O raw small
            cmp raw back
            secret='--object secret,id=k,data=moo'
            luks=encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10
            new locked -C $secret -f raw -O qcow2 -o $luks raw
            [ $(shared locked) = 0 ]
            new back -C $secret -O raw --image-opts driver=qcow2,file.filename=locked,encrypt.key-secret=k
            cmp raw back",
        );
    }
}

#[test]
fn old_bytes_of_a_target_and_ends_of_clusters_are_right() {
    for mkfs in SHARING {
        on(
            mkfs,
            "# Neither a multiple of the cluster size nor of the file system's blocks.
            truncate -s 10484224 raw
            for words in '' -C; do
                img create -q -f qcow2 disk 10484224
                qemu-io -f qcow2 -c 'write -P 9 0 10484224' disk > /dev/null
                img snapshot -c before disk
                img convert $words -n -f raw -O qcow2 raw disk
                same disk qcow2
                qemu-img check -q disk
                img snapshot -a before disk
                qemu-io -f qcow2 -c 'read -P 9 0 10484224' disk > said
                if grep failed said; then exit 1; fi
                qemu-img create -q -f qcow2 -b raw -F raw over
                qemu-io -f qcow2 -c 'write -P 5 100k 900k' over > /dev/null
                new flat $words -f qcow2 -O qcow2 over
                qemu-img compare -q flat over
                qemu-img check -q flat
                # Two sources, the second one where no cluster begins.
                new both $words -f raw -O qcow2 raw raw
                { cat raw raw; } > joined
                qemu-img compare -q -f raw -F qcow2 joined both
                rm over flat both joined
            done",
        );
    }
}

#[test]
fn without_clones_it_is_copied() {
    on(
        "mkfs.xfs -q -f -m reflink=0",
        "for words in '' -C; do
            new disk $words -f raw -O qcow2 raw
            same disk qcow2
            [ $(shared disk) = 0 ]
        done",
    );
}
