//! From version 3 to version 2 where snapshots have zero clusters, and share them: QEMU reads the
//! same disk and the same snapshots before and after, and finds nothing wrong. (QEMU 7.2's own
//! `amend` zeroes what snapshots share there, so that it is asked to read only.)

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{
    CreateOptions, Error, Format, Image, MemoryStorage, OpenOptions, Storage, create,
};
use support::crash::{CrashStorage, crashes};
use support::encryption::{self, Qemu, open};
use support::lab::{Lab, Moment, NAME, assert_between, assert_sound, bytes_of, go_on, requests};
use support::model::Op;
use support::storages::FaultStorage;
use support::{Random, base, cached, have_qemu, qemu_create, to_version};

const MIB: usize = 1 << 20;

/// A life by QEMU: data, zeroes with and without a place, discards, and snapshots among them, some
/// applied and some deleted. Returns the names of those that are left.
fn live(image: &Qemu<'_>, random: &mut Random) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    let sectors = (MIB / 512) as u64;
    for round in 0..8 {
        let command = |_| {
            let len = 1 + random.below(sectors / 6);
            let (at, len) = (random.below(sectors - len) * 512, len * 512);
            match random.below(5) {
                0 | 1 => format!("write -P {} {at} {len}", 1 + random.below(250)),
                2 => format!("write -z {at} {len}"),
                3 => format!("write -z -u {at} {len}"),
                _ => format!("discard {at} {len}"),
            }
        };
        image.io(&(0..6).map(command).collect::<Vec<_>>());
        let one = random.below(names.len() as u64) as usize;
        let (what, name) = match random.below(5) {
            0 if names.len() > 1 => ("-d", names.swap_remove(one)),
            1 if !names.is_empty() => ("-a", names[one].clone()),
            _ => {
                names.push(format!("s{round}"));
                ("-c", format!("s{round}"))
            }
        };
        image.run("qemu-img", &["snapshot", what, &name], &[]);
    }
    names
}

/// What QEMU reads of the disk and of each snapshot.
fn contents(image: &Qemu<'_>, names: &[String]) -> Vec<Vec<u8>> {
    let snapshot = |name| {
        let before = ["convert", "-l", name, "-O", "raw"];
        image.run("qemu-img", &before, &["snapshot.raw"]);
        std::fs::read(image.folder.join("snapshot.raw")).unwrap()
    };
    let snapshots = names.iter().map(|name| snapshot(name.as_str()));
    std::iter::once(image.content()).chain(snapshots).collect()
}

fn downgrade(folder: &Path, options: &str, backing: &str, passwords: &[&str], seed: u64) {
    let what = format!("{options}{backing}");
    let name = format!("{seed}");
    let all = what.clone() + ",compat=1.1";
    match passwords {
        [] => qemu_create(folder, &all, &name, "1M"),
        _ => encryption::qemu_create(folder, &name, &all),
    }
    let image = Qemu {
        folder,
        name: &name,
        passwords,
    };
    let names = live(&image, &mut Random(seed));
    let path = folder.join(&name);
    let before = contents(&image, &names);
    let opened = open(&path, passwords).unwrap();
    opened.amend(&to_version(2)).unwrap();
    image.assert_clean();
    assert!(contents(&image, &names) == before, "{what}");
    let info = image.run("qemu-img", &["info"], &[]);
    assert!(info.contains("compat: 0.10"), "{info}");
    // It goes on as an image of version 2: places that were shared are still copied first.
    image.io(&["write -P 77 0 1M".into()]);
    image.assert_clean();
    let after = contents(&image, &names);
    assert!(
        after[1..] == before[1..],
        "{what}: a write to the disk shows"
    );
}

#[test]
fn zero_clusters_of_snapshots() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (name, len) in [("short", 333_333), ("long", 2 * MIB)] {
        std::fs::write(folder.join(name), vec![0x77; len]).unwrap();
    }
    let over = |name: &str| format!(",backing_file={name},backing_fmt=raw");
    let mut seed = 0;
    for options in ["cluster_size=512", "cluster_size=64k"] {
        for backing in [String::new(), over("short"), over("long")] {
            downgrade(folder, options, &backing, &[], seed);
            seed += 1;
        }
    }
    let luks = "cluster_size=4k,encrypt.format=luks,encrypt.iter-time=10";
    let aes = "cluster_size=1k,encrypt.format=aes";
    for options in [luks, aes] {
        downgrade(folder, options, &over("short"), &["moo"], seed);
        seed += 1;
    }
}

/// A place that a snapshot keeps for zeros, and the disk has data in: the disk is the only one that
/// refers to it afterwards, and says so.
#[test]
fn a_place_is_the_disks_alone() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    qemu_create(folder, "cluster_size=4k", "disk", "1M");
    let image = Qemu {
        folder,
        name: "disk",
        passwords: &[],
    };
    let snapshot = |what, name| image.run("qemu-img", &["snapshot", what, name], &[]);
    image.io(&["write -P 5 0 64k".into()]);
    snapshot("-c", "data");
    image.io(&["write -z 0 16k".into()]);
    snapshot("-c", "zeros");
    snapshot("-a", "data");
    snapshot("-d", "data");
    let before = contents(&image, &["zeros".into()]);
    let path = folder.join("disk");
    open(&path, &[]).unwrap().amend(&to_version(2)).unwrap();
    image.assert_clean();
    assert!(contents(&image, &["zeros".into()]) == before);
}

/// Makes a disk with snapshots that have zero clusters, some of them in tables that are shared.
fn lab(storage: Arc<dyn Storage>, cluster_size: u32, base_len: usize) -> Moment {
    let options = CreateOptions {
        cluster_size,
        backing: (base_len > 0).then(|| ("base".into(), Format::Raw)),
        ..CreateOptions::new(48 << 10)
    };
    create(Path::new(NAME), storage.clone(), &options).unwrap();
    let mut lab = Lab::new(storage, base_len);
    let mut ops = requests(&lab, 3, 16);
    for round in 0..4 {
        (0..6).for_each(|_| lab.op(&ops.next()));
        lab.op(&Op::Zero {
            offset: round * 5000 / 512 * 512,
            len: 8 << 10,
            unmap: round % 2 == 0,
        });
        lab.take();
    }
    lab.apply(1);
    lab.delete(2);
    Moment {
        position: 0,
        disk: lab.disk,
        snapshots: lab.snapshots,
    }
}

/// The same storage with nothing cached.
fn fresh(storage: &Arc<dyn Storage>, base_len: usize) -> Image {
    Lab::new(storage.clone(), base_len).image
}

#[test]
fn crash_safe() {
    for (cluster_size, base_len) in [(512, 0), (512, 20_000), (2048, 60_000), (1024, 0)] {
        let storage = Arc::new(CrashStorage::default());
        let shared: Arc<dyn Storage> = storage.clone();
        let moment = lab(shared.clone(), cluster_size, base_len);
        let from = storage.position();
        fresh(&shared, base_len).amend(&to_version(2)).unwrap();
        assert_sound(&*shared);
        let mut random = Random(5);
        let mut turns = Random(6);
        crashes(
            &storage.changes(),
            from,
            6,
            &mut random,
            &mut |at, bytes| {
                let what = format!("{cluster_size} over {base_len}, after {at}");
                let mut left = assert_between(bytes, base_len, [&moment; 2], &what);
                if turns.below(8) == 0 {
                    let mut ops = requests(&left, at as u64, 16);
                    go_on(&mut left, &mut ops, &mut turns, &what);
                }
            },
        );
    }
}

#[test]
fn every_call_fails_once() {
    for base_len in [0, 20_000] {
        for n in 0.. {
            let storage = FaultStorage::new(Vec::new(), ErrorKind::Other);
            let shared: Arc<dyn Storage> = storage.clone();
            let moment = lab(shared.clone(), 1024, base_len);
            let image = fresh(&shared, base_len);
            storage.fail_after(n);
            let changed = image.amend(&to_version(2));
            let untouched = !storage.recover();
            assert!(changed.is_ok() || !untouched, "{:?}", changed.err());
            let what = format!("call {n}");
            assert_between(bytes_of(&*shared), base_len, [&moment; 2], &what);
            if untouched {
                assert!(n > 20);
                break;
            }
        }
    }
}

/// A file that may not grow: an error, and what was allocated until then is free again.
#[test]
fn a_full_file_stays_as_it_is() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
    let before = lab(storage.clone(), 512, 40_000);
    let options = OpenOptions {
        max_file_size: Some(storage.len().unwrap() + 2048),
        ..cached(4 << 10)
    };
    let over = Some(base(vec![0x77; 40_000]));
    let image = Image::open_over(Path::new(NAME), storage.clone(), &options, over).unwrap();
    let error = image.amend(&to_version(2)).unwrap_err();
    assert!(matches!(error, Error::Full { .. }), "{error}");
    assert_sound(&*storage);
    assert_between(bytes_of(&*storage), 40_000, [&before; 2], "a full file");
}

/// A snapshot's table that lies where other metadata is, or has too low a refcount, is refused.
#[test]
fn wrong_tables_are_refused() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
    lab(storage.clone(), 1024, 0);
    let good = bytes_of(&*storage);
    let number = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap());
    let (refcounts, snapshots) = (number(48) as usize, number(64) as usize);
    let (l1, block) = (number(snapshots) as usize, number(refcounts) as usize);
    let count = block + number(l1) as usize / 1024 * 2;
    let mut overlap = good.clone();
    overlap[l1..l1 + 8].copy_from_slice(&good[40..48]);
    // The disk's L1 table, which as an L2 table has an entry with the zero flag behind it.
    overlap[number(40) as usize + 1023] = 1;
    let mut low = good.clone();
    low[count..count + 2].fill(0);
    for (bad, field) in [
        (overlap, "L2 table of a snapshot"),
        (low, "refcount of the L2 table"),
    ] {
        let storage = Arc::new(MemoryStorage::new(bad));
        let image = Image::open_over(Path::new(NAME), storage.clone(), &cached(4 << 10), None);
        let error = image.unwrap().amend(&to_version(2)).unwrap_err();
        let Error::Invalid { source, .. } = error else {
            panic!("{error}");
        };
        assert_eq!(source.field, field);
        assert_eq!(storage.to_vec()[7], 3);
    }
}
