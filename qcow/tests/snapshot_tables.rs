//! Snapshot tables: QEMU's and ours, odd ones and hostile ones.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use cowshed_qcow::{Image, MemoryStorage, NewSnapshot, Preallocation, ResizeOptions, Selector};
use support::lab::{Lab, NAME, bytes_of, cut_extra_data, file, new_image, options};
use support::model::{Op, Ops, content};
use support::{Files, Random, have_qemu, qemu_content, qemu_img, qemu_io};

/// What QEMU says a snapshot's content is.
fn qemu_snapshot(folder: &Path, id: &str) -> Vec<u8> {
    let id = format!("snapshot.id={id}");
    let args = [
        "convert", "-l", &id, "-f", "qcow2", "-O", "raw", NAME, "s.raw",
    ];
    qemu_img(folder, &args);
    std::fs::read(folder.join("s.raw")).unwrap()
}

fn qemu_agrees(folder: &Path, lab: &Lab) {
    qemu_img(folder, &["check", "-q", "-f", "qcow2", NAME]);
    assert!(qemu_content(folder, NAME, "qcow2") == lab.disk, "the disk");
    for (id, disk) in &lab.snapshots {
        assert!(qemu_snapshot(folder, id) == *disk, "snapshot {id}");
    }
}

/// QEMU takes, applies and deletes among our own; each reads what the other made.
#[test]
fn both_directions_with_qemu() {
    if !have_qemu() {
        return;
    }
    for (seed, how) in [
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=32",
        "cluster_size=64k,refcount_bits=64",
        "cluster_size=1k,compat=0.10",
        "cluster_size=2k,compression_type=zstd",
    ]
    .into_iter()
    .enumerate()
    {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let source: Vec<u8> = (0..256_u32 << 10).map(|i| (i / 3000) as u8).collect();
        std::fs::write(folder.join("source"), source).unwrap();
        let args = ["convert", "-c", "-O", "qcow2", "-o", how, "source", NAME];
        qemu_img(folder, &args);
        qemu_io(folder, NAME, &["write -P 5 1k 39k".into()]);
        let mut lab = Lab::new(file(folder), 0);
        let mut ops = Ops::new(
            seed as u64,
            lab.image.size(),
            lab.image.cluster_size().into(),
        );
        let mut random = Random(seed as u64);
        for step in 0..16 {
            (0..random.below(8)).for_each(|_| lab.op(&ops.next()));
            lab.image.flush().unwrap();
            let count = lab.snapshots.len() as u64;
            let index = random.below(count) as usize;
            match random.below(8) {
                0 | 1 if count < 5 => lab.take(),
                2 if count > 0 => lab.apply(index),
                3 if count > 0 => lab.delete(index),
                4 | 5 if count < 5 => {
                    let name = format!("q{}", random.next());
                    qemu_img(folder, &["snapshot", "-c", &name, NAME]);
                    lab.reopen();
                    let id = lab.image.snapshots().unwrap().pop().unwrap().id;
                    lab.snapshots.push((id, lab.disk.clone()));
                }
                6 if count > 0 => {
                    let (id, disk) = lab.snapshots[index].clone();
                    qemu_img(folder, &["snapshot", "-a", &id, NAME]);
                    lab.disk = disk;
                    lab.reopen();
                }
                7 if count > 0 => {
                    lab.snapshots.remove(index);
                    let name = lab.image.snapshots().unwrap().swap_remove(index).name;
                    qemu_img(folder, &["snapshot", "-d", &name, NAME]);
                    lab.reopen();
                }
                _ => {}
            }
            lab.verify();
            if step % 4 == 3 {
                qemu_agrees(folder, &lab);
            }
        }
    }
}

/// All fields, as QEMU lists them and as we do.
#[test]
fn what_is_listed() {
    let mut lab = new_image(1 << 20, 65536, 16, 0);
    lab.op(&Op::Write {
        offset: 0,
        data: vec![1; 4096],
    });
    let new = NewSnapshot {
        name: "a name, two".into(),
        date: UNIX_EPOCH + Duration::new(1_700_000_000, 5),
        vm_state_size: 0,
        vm_clock: Duration::from_millis(3_723_004),
        icount: Some(77),
    };
    let made = lab.image.create_snapshot(&new).unwrap();
    assert_eq!(made.id, "1");
    assert_eq!(made.disk_size, 1 << 20);
    assert_eq!((made.date, made.vm_clock), (new.date, new.vm_clock));
    assert_eq!((&made.name, made.icount), (&new.name, Some(77)));
    assert_eq!(lab.image.snapshots().unwrap(), std::slice::from_ref(&made));
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(NAME), bytes_of(&*lab.storage)).unwrap();
    let said = qemu_img(folder.path(), &["info", "--output=json", NAME]);
    for part in [
        "\"icount\": 77",
        "\"vm-clock-sec\": 3723",
        "\"vm-clock-nsec\": 4000000",
        "\"name\": \"a name, two\"",
        "\"date-sec\": 1700000000",
        "\"date-nsec\": 5",
        "\"id\": \"1\"",
        "\"vm-state-size\": 0",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    // And QEMU's own.
    qemu_img(folder.path(), &["snapshot", "-c", "theirs", NAME]);
    let theirs = Lab::new(file(folder.path()), 0).image.snapshots().unwrap();
    assert_eq!(theirs[0], made);
    assert_eq!((&*theirs[1].id, &*theirs[1].name), ("2", "theirs"));
    assert_eq!(theirs[1].vm_state_size, 0);
    let age = theirs[1].date.elapsed().unwrap();
    assert!(age < Duration::from_secs(3600), "{age:?}");
}

/// The place of the snapshot table in an image, and of a number in its first entry.
fn table_of(bytes: &[u8]) -> usize {
    u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize
}

/// Extra data of any length stays, with what nobody knows, through every change of the table; IDs
/// and names may be any bytes.
#[test]
fn extra_data_is_kept() {
    for extra in [0_usize, 8, 16, 24, 40, 1024] {
        let mut lab = new_image(64 << 10, 512, 16, 0);
        let mut ops = Ops::new(extra as u64, 64 << 10, 512);
        (0..20).for_each(|_| lab.op(&ops.next()));
        lab.take();
        lab.image.flush().unwrap();
        // The entry again, with extra data of that length, and a name that is no text.
        let mut bytes = bytes_of(&*lab.storage);
        let table = table_of(&bytes);
        let mut entry = bytes[table..table + 40].to_vec();
        entry[14..16].copy_from_slice(&3_u16.to_be_bytes());
        entry[36..40].copy_from_slice(&(extra as u32).to_be_bytes());
        let mut data: Vec<u8> = (0..extra).map(|i| 0x80 | i as u8).collect();
        let known = [0_u64, 64 << 10, 77].map(u64::to_be_bytes).concat();
        let both = extra.min(24);
        data[..both].copy_from_slice(&known[..both]);
        entry.extend(&data);
        entry.extend(b"1a\xff\0");
        entry.resize(entry.len().next_multiple_of(8), 0);
        let place = bytes.len();
        assert!(place.is_multiple_of(512));
        // Its clusters are counted by a second table that we make: the old one is leaked.
        bytes.extend(&entry);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        let clusters = place / 512..bytes.len() / 512;
        bytes[64..72].copy_from_slice(&(place as u64).to_be_bytes());
        let refcount_table = u64::from_be_bytes(bytes[48..56].try_into().unwrap()) as usize;
        for cluster in clusters {
            let at = refcount_table + cluster / 256 * 8;
            let block = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            assert_ne!(block, 0);
            bytes[block + cluster % 256 * 2 + 1] = 1;
        }

        let storage = Arc::new(MemoryStorage::new(bytes));
        let (disk, snapshots) = (lab.disk, lab.snapshots);
        lab = Lab::new(storage, 0);
        let listed = lab.image.snapshots().unwrap().remove(0);
        assert_eq!((&*listed.id, &*listed.name), ("1", "a\u{fffd}\0"));
        assert_eq!(listed.icount, (extra >= 24).then_some(77));
        assert_eq!(listed.disk_size, 64 << 10);
        (lab.disk, lab.snapshots) = (disk, snapshots);
        for _ in 0..2 {
            (0..5).for_each(|_| lab.op(&ops.next()));
            lab.take();
        }
        lab.delete(1);
        lab.image.flush().unwrap();
        let now = bytes_of(&*lab.storage);
        let table = table_of(&now);
        // All but where its L1 table is.
        assert_eq!(
            now[table + 12..table + entry.len()],
            entry[12..],
            "{extra} bytes"
        );
        // What is listed selects.
        lab.image
            .apply_snapshot(&Selector::Name(listed.name))
            .unwrap();
        assert!(content(&lab.image) == lab.snapshots[0].1);
    }
}

/// A snapshot that does not say its disk's size has that of the disk today. It keeps that when the
/// disk gets another one, by a resize or another snapshot; QEMU's would follow and lose data.
#[test]
fn sizes_that_were_not_recorded() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let path = folder.join(NAME);
    let open = || Image::open(&path, &options(), &Files::default()).unwrap();
    let resize = |size: u64| {
        let shrink = true;
        let preallocation = Preallocation::Off;
        let options = ResizeOptions {
            shrink,
            preallocation,
        };
        open().resize(size, &options).unwrap();
        assert_eq!(open().size(), size);
    };
    let assert_kept = || {
        qemu_img(folder, &["check", "-q", "-f", "qcow2", NAME]);
        assert_eq!(open().snapshots().unwrap()[0].disk_size, 1 << 20);
        std::fs::copy(&path, folder.join("copy")).unwrap();
        qemu_img(folder, &["snapshot", "-a", "1", "copy"]);
        assert!(qemu_content(folder, "copy", "qcow2") == vec![5; 1 << 20]);
    };
    for extra in [0, 8] {
        let make = || {
            qemu_img(folder, &["create", "-q", "-f", "qcow2", NAME, "1M"]);
            qemu_io(folder, NAME, &["write -P 5 0 1M".into()]);
            qemu_img(folder, &["snapshot", "-c", "one", NAME]);
        };
        for size in [512 << 10, 2 << 20] {
            make();
            cut_extra_data(&path, &[extra]);
            resize(size);
            assert_kept();
        }
        make();
        resize(2 << 20);
        qemu_img(folder, &["snapshot", "-c", "two", NAME]);
        resize(1 << 20);
        cut_extra_data(&path, &[extra, 16]);
        open()
            .apply_snapshot(&Selector::Name("two".into()))
            .unwrap();
        assert_eq!(open().size(), 2 << 20);
        assert_kept();
    }
}

/// Snapshot tables that lie: an error that names field, offset and value, when the image is listed
/// and when it is written.
#[test]
fn hostile_tables() {
    let mut lab = new_image(64 << 10, 512, 16, 0);
    lab.op(&Op::Write {
        offset: 0,
        data: vec![1; 9000],
    });
    lab.take();
    lab.take();
    lab.image.flush().unwrap();
    let good = bytes_of(&*lab.storage);
    let table = table_of(&good);
    let l1 = u64::from_be_bytes(good[table..table + 8].try_into().unwrap()) as usize;
    let l2 = u64::from_be_bytes(good[l1..l1 + 8].try_into().unwrap()) & !(1 << 63);
    let refcount_block = {
        let at = u64::from_be_bytes(good[48..56].try_into().unwrap()) as usize;
        u64::from_be_bytes(good[at..at + 8].try_into().unwrap())
    };
    let number = |n: u64| n.to_be_bytes().to_vec();
    let small = |n: u32| n.to_be_bytes().to_vec();
    // Where, what, and words of the error.
    let listed: Vec<(usize, Vec<u8>, &str)> = vec![
        (
            table,
            number(0x2000_0000_0000),
            "l1_table_offset of a snapshot",
        ),
        (table, number(0), "l1_table_offset of a snapshot"),
        (table, number(0x201), "l1_table_offset of a snapshot"),
        (table, number(!511), "l1_table_offset of a snapshot"),
        (table + 8, small(u32::MAX), "l1_size of a snapshot"),
        (table + 36, small(1025), "extra_data_size of a snapshot"),
        (table + 36, small(u32::MAX), "extra_data_size of a snapshot"),
        (table + 48, number(u64::MAX), "disk size of a snapshot"),
        (table + 48, number(1 << 50), "disk size of a snapshot"),
        (60, small(65536), "nb_snapshots"),
    ];
    let open = |bytes: &[u8]| {
        let storage = Arc::new(MemoryStorage::new(bytes.to_vec()));
        Image::open_over(Path::new(NAME), storage, &options(), None).unwrap()
    };
    for (at, value, words) in listed {
        let mut bad = good.clone();
        bad[at..at + value.len()].copy_from_slice(&value);
        for error in [
            open(&bad).snapshots().unwrap_err(),
            open(&bad).write(0, &[1; 512]).unwrap_err(),
            open(&bad)
                .create_snapshot(&NewSnapshot::new("x"))
                .unwrap_err(),
        ] {
            let said = format!("{:?}", error);
            assert!(said.contains(words), "{words}: {said}");
        }
    }
    // What only an operation on the snapshot finds. The image is not changed then.
    let second = table + (40 + 24 + 1 + 2_usize).next_multiple_of(8);
    let other_l1 = number(u64::from_be_bytes(
        good[second..second + 8].try_into().unwrap(),
    ));
    let used: Vec<(usize, Vec<u8>, &str)> = vec![
        (l1, number(1 << 40), "L2 table before the file's end"),
        (l1, number(l2 + 8), "reserved bit"),
        (l1 + 8, number(l2), "no other entry names"),
        (l1, number(refcount_block), ""),
        (l1, number(0x200), ""),
        (table, other_l1, "overlaps"),
        (
            l2 as usize,
            number(1 << 40),
            "cluster before the file's end",
        ),
        (l2 as usize, number(2 | l2), "reserved bit"),
    ];
    for (at, value, words) in used {
        let mut bad = good.clone();
        bad[at..at + value.len()].copy_from_slice(&value);
        let one = Selector::Id("1".into());
        let (applied, deleted) = (open(&bad), open(&bad));
        for error in [
            applied.apply_snapshot(&one).unwrap_err(),
            deleted.delete_snapshot(&one).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::InvalidData, "{error}");
            let said = format!("{:?}", error);
            assert!(said.contains(words), "{words}: {said}");
        }
        assert_eq!(applied.snapshots().unwrap().len(), 2);
    }
}

/// Damage anywhere in an image with snapshots: errors, no panic, and no snapshot operation takes
/// long.
#[test]
fn damaged_images() {
    let mut lab = new_image(64 << 10, 512, 16, 0);
    let mut ops = Ops::new(5, 64 << 10, 512);
    for _ in 0..2 {
        (0..20).for_each(|_| lab.op(&ops.next()));
        lab.take();
    }
    lab.image.flush().unwrap();
    let good = bytes_of(&*lab.storage);
    let mut random = Random(7);
    let mut refused = 0;
    for _ in 0..3000 {
        let mut bad = good.clone();
        for _ in 0..=random.below(3) {
            let at = random.below(bad.len() as u64) as usize;
            bad[at] ^= 1 << random.below(8);
        }
        let storage = Arc::new(MemoryStorage::new(bad));
        let Ok(image) = Image::open_over(Path::new(NAME), storage, &options(), None) else {
            refused += 1;
            continue;
        };
        let selector = Selector::Id((1 + random.below(2)).to_string());
        let done = match random.below(3) {
            0 => image.create_snapshot(&NewSnapshot::new("x")).map(drop),
            1 => image.apply_snapshot(&selector),
            _ => image.delete_snapshot(&selector),
        };
        refused += u32::from(done.is_err());
        let _ = image.snapshots();
        let _ = image.write(0, &[1; 4096]);
        let _ = image.flush();
    }
    assert!(refused > 100, "{refused}");
}
