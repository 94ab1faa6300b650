//! Power cuts and failing calls while snapshots are taken, applied and deleted: everything is as it
//! was or as it was to be, with leaks at worst, and COPIED clear at refcount one.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{CreateOptions, Format, Image, NewSnapshot, Selector, create};
use support::crash::{CrashStorage, Cuts};
use support::lab::{Lab, Moment, NAME, assert_between, at, go_on, requests};
use support::model::{Ops, content};
use support::storages::FaultStorage;
use support::{Random, have_qemu, qemu_content, qemu_img};

fn crash_trial(seed: u64, cluster_size: u32, refcount_bits: u32, base_len: usize) {
    let storage = Arc::new(CrashStorage::default());
    let options = CreateOptions {
        cluster_size,
        refcount_bits,
        backing: (base_len > 0).then(|| ("base".into(), Format::Raw)),
        ..CreateOptions::new(48 << 10)
    };
    create(Path::new(NAME), storage.clone(), &options).unwrap();
    let mut lab = Lab::new(storage.clone(), base_len);
    let mut ops = requests(&lab, seed, refcount_bits);
    let mut random = Random(seed);
    let mut moments = Vec::new();
    for _ in 0..14 {
        (0..random.below(8)).for_each(|_| lab.op(&ops.next()));
        lab.image.flush().unwrap();
        let moment = |lab: &Lab| Moment {
            position: storage.position(),
            disk: lab.disk.clone(),
            snapshots: lab.snapshots.clone(),
        };
        let before = moment(&lab);
        let count = lab.snapshots.len() as u64;
        match random.below(5) {
            2 if count > 0 => lab.apply(random.below(count) as usize),
            3 if count > 0 => lab.delete(random.below(count) as usize),
            _ if count < 4 => lab.take(),
            _ => lab.delete(0),
        }
        moments.push((before, moment(&lab)));
    }
    let log = storage.changes();
    let (mut cuts, mut done) = (Cuts::default(), 0);
    for (before, after) in &moments {
        for position in before.position..=after.position {
            log[done..position]
                .iter()
                .for_each(|change| cuts.push(change));
            done = position;
            for variant in 0..5 {
                let bytes = cuts.cut(variant, &mut random);
                let what = format!("seed {seed} at {position}, variant {variant}");
                // What has ended is durable.
                let possible = if position == after.position {
                    [after, after]
                } else {
                    [before, after]
                };
                if random.below(200) == 0 && have_qemu() {
                    assert_qemu_repairs(&bytes, base_len, &what);
                }
                let mut lab = assert_between(bytes, base_len, possible, &what);
                if random.below(4) == 0 {
                    go_on(&mut lab, &mut ops, &mut random, &what);
                }
            }
        }
    }
}

/// QEMU repairs what a crash left, and loses nothing.
fn assert_qemu_repairs(bytes: &[u8], base_len: usize, what: &str) {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("base"), vec![0x77; base_len]).unwrap();
    std::fs::write(folder.join(NAME), bytes).unwrap();
    let before = qemu_content(folder, NAME, "qcow2");
    qemu_img(folder, &["check", "-q", "-r", "all", NAME]);
    assert!(qemu_content(folder, NAME, "qcow2") == before, "{what}");
}

#[test]
fn crash_safe_while_taking_applying_and_deleting() {
    for seed in 0..3 {
        crash_trial(seed, 512, 16, 20 << 10);
    }
    crash_trial(3, 1024, 4, 0);
    crash_trial(4, 2048, 64, 0);
}

/// A disk with two snapshots on a storage that can fail.
fn with_two_snapshots() -> (Arc<FaultStorage>, Lab, Ops) {
    let storage = FaultStorage::new(Vec::new(), ErrorKind::StorageFull);
    let options = CreateOptions {
        cluster_size: 512,
        ..CreateOptions::new(96 << 10)
    };
    create(Path::new(NAME), storage.clone(), &options).unwrap();
    let mut lab = Lab::new(storage.clone(), 0);
    let mut ops = Ops::new(1, lab.image.size(), 512);
    for _ in 0..2 {
        (0..30).for_each(|_| lab.op(&ops.next()));
        lab.take();
    }
    (0..30).for_each(|_| lab.op(&ops.next()));
    (storage, lab, ops)
}

/// What an image says it has.
fn moment(lab: &Lab) -> Moment {
    let listed = lab.image.snapshots().unwrap().into_iter();
    let with_disk = |id: String| {
        let disk = content(&at(&lab.storage, Selector::Id(id.clone()), 0));
        (id, disk)
    };
    Moment {
        position: 0,
        disk: content(&lab.image),
        snapshots: listed.map(|snapshot| with_disk(snapshot.id)).collect(),
    }
}

/// Each call of the storage in an operation fails once: an error, and everything is as it was or
/// as it was to be.
fn fault_trial(operation: &dyn Fn(&Image) -> cowshed_qcow::Result<()>) {
    let (_, lab, _) = with_two_snapshots();
    let before = moment(&lab);
    operation(&lab.image).unwrap();
    let after = moment(&lab);
    for n in 0.. {
        let (storage, mut lab, mut ops) = with_two_snapshots();
        storage.fail_after(n);
        let done = operation(&lab.image);
        let untouched = !storage.recover();
        assert!(done.is_ok() || !untouched, "{:?}", done.err());
        let what = format!("call {n}");
        let stopped = lab.image.flush().is_err();
        let possible = if done.is_ok() {
            [&after, &after]
        } else {
            [&before, &after]
        };
        let mut again = assert_between(storage.inner.to_vec(), 0, possible, &what);
        let mut random = Random(n as u64);
        if !stopped {
            // It was one failure: the same image goes on.
            let now = moment(&lab);
            assert!(
                now.disk == again.disk && now.snapshots == again.snapshots,
                "{what}"
            );
            (lab.disk, lab.snapshots) = (now.disk, now.snapshots);
            go_on(&mut lab, &mut ops, &mut random, &what);
        }
        go_on(&mut again, &mut ops, &mut random, &what);
        if untouched {
            assert!(n > 10, "only {n} calls");
            return;
        }
    }
}

#[test]
fn every_call_fails_once() {
    fault_trial(&|image| image.create_snapshot(&NewSnapshot::new("x")).map(drop));
    fault_trial(&|image| image.apply_snapshot(&Selector::Id("1".into())));
    fault_trial(&|image| image.delete_snapshot(&Selector::Id("1".into())));
}

/// Each call fails once while VM state is written beside one that a snapshot has, and taken: an
/// error, the disk and its snapshots as they were, and the next try succeeds.
#[test]
fn every_call_fails_once_while_vm_state_is_written() {
    let state: Vec<u8> = (0..9_000).map(|i| (i / 512) as u8 | 1).collect();
    let new = NewSnapshot {
        vm_state_size: state.len() as u64,
        ..NewSnapshot::new("running")
    };
    for n in 0.. {
        let (storage, mut lab, mut ops) = with_two_snapshots();
        let older = vec![0xaa; 6_000];
        lab.image.write_vm_state(100, &older).unwrap();
        lab.take();
        let before = moment(&lab);
        let mut after = before.clone();
        after.snapshots.push(("4".into(), before.disk.clone()));
        storage.fail_after(n);
        // In pieces, so that clusters are written in part and the L1 table moves.
        let written = (state.chunks(1_700).zip(0..))
            .try_for_each(|(part, i)| lab.image.write_vm_state(i * 1_700, part));
        let taken = written.and_then(|()| lab.image.create_snapshot(&new));
        let untouched = !storage.recover();
        assert!(taken.is_ok() || !untouched, "{:?}", taken.err());
        let what = format!("call {n}");
        let goes_on = lab.image.flush().is_ok();
        if goes_on && lab.image.snapshots().unwrap().len() == 3 {
            assert!(content(&lab.image) == before.disk, "{what}");
            lab.image.write_vm_state(0, &state).unwrap();
            lab.image.create_snapshot(&new).unwrap();
        }
        let possible = [if goes_on { &after } else { &before }, &after];
        let mut again = assert_between(storage.inner.to_vec(), 0, possible, &what);
        let mut read = vec![0; state.len()];
        if again
            .image
            .snapshots()
            .unwrap()
            .iter()
            .any(|s| s.name == "running")
        {
            let running = Selector::Name("running".into());
            at(&again.storage, running, 0)
                .read_vm_state(0, &mut read)
                .unwrap();
            assert!(read == state, "{what}");
        }
        let third = at(&again.storage, Selector::Id("3".into()), 0);
        third.read_vm_state(100, &mut read[..older.len()]).unwrap();
        assert!(read[..older.len()] == older, "{what}: the older state");
        go_on(&mut again, &mut ops, &mut Random(n as u64), &what);
        if untouched {
            assert!(n > 50, "only {n} calls");
            return;
        }
    }
}
