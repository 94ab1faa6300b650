//! Power cuts and failing storages beside bitmaps: a bitmap is right afterwards, or it says that
//! it was in use.

#![allow(clippy::unwrap_used)] // A test fails by panicking.
#![allow(clippy::single_range_in_vec_init)] // A list of ranges may have one.

mod support;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{
    CreateOptions, Error, Format, Image, MemoryStorage, OpenOptions, ResizeOptions, Storage, create,
};
use support::bitmaps::all;
use support::check::check;
use support::crash::{CrashStorage, Cuts, crashes};
use support::model::{Ops, content, perform};
use support::storages::FaultStorage;
use support::{Random, have_qemu, qemu_img};

/// Enabled before anything is written, and never changed otherwise.
const ALWAYS: &str = "always";
const SIZE: u64 = 64 << 10;

fn open(storage: Arc<dyn Storage>) -> Result<Image, Error> {
    let options = OpenOptions {
        cache_bytes: 4 << 10,
        ..OpenOptions::new(Format::Qcow2)
    };
    Image::open_over(Path::new("crash"), storage, &options, None)
}

fn empty(cluster_size: u32) -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions {
        cluster_size,
        ..CreateOptions::new(SIZE)
    };
    create(Path::new("crash"), storage.clone(), &options).unwrap();
    storage.to_vec()
}

/// The bitmaps that can be used: whether each is enabled, and what it has marked.
type State = BTreeMap<String, (bool, Vec<Range<u64>>)>;

fn state(image: &Image) -> State {
    let bitmaps = image.bitmaps().unwrap().into_iter();
    bitmaps
        .filter(|bitmap| bitmap.inconsistent.is_none())
        .map(|bitmap| {
            let marked = all(image, &bitmap.name);
            (bitmap.name, (bitmap.enabled, marked))
        })
        .collect()
}

/// One random step: a request, or something with a bitmap.
fn step(image: &Image, ops: &mut Ops) -> Result<(), Error> {
    let names = ["a", "b", "c"];
    let name = names[ops.random.below(3) as usize];
    let other = names[ops.random.below(3) as usize];
    let sector = ops.random.below(SIZE / 512) * 512;
    let done = match ops.random.below(24) {
        0 | 1 => image.add_bitmap(name, Some(512 << ops.random.below(3)), sector > SIZE / 3),
        2 => image.remove_bitmap(name),
        3 => image.clear_bitmap(name),
        4 => image.enable_bitmap(name),
        5 => image.disable_bitmap(name),
        6 => image.merge_bitmap(name, other),
        7 => image.merge_bitmap(name, ALWAYS),
        8 => image.mark_bitmap(name, &[sector..SIZE.min(sector + 9000)]),
        9 => image.store_bitmaps(),
        10 => {
            let shrink = ResizeOptions {
                shrink: true,
                ..ResizeOptions::default()
            };
            let done = image.resize(SIZE + ops.random.below(9) * 4096 + 512, &shrink);
            done.and_then(|()| image.resize(SIZE, &shrink))
        }
        _ => perform(image, &ops.next()),
    };
    match done {
        // Such a bitmap is not there, or is there already.
        Err(Error::Bitmap { .. }) => Ok(()),
        done => done,
    }
}

fn crash(start: &[u8], seed: u64, steps: usize, points: u64) {
    let storage = Arc::new(CrashStorage::default());
    storage.write_at(0, start).unwrap();
    storage.sync().unwrap();
    let first = storage.position();
    let mut image = open(storage.clone()).unwrap();
    image.add_bitmap(ALWAYS, Some(512), true).unwrap();
    let mut ops = Ops::new(seed, SIZE, image.cluster_size().into());
    // Where each step began, and what the bitmaps were then.
    let mut states = vec![(first, State::new()), (storage.position(), state(&image))];
    for i in 0..steps {
        step(&image, &mut ops).unwrap();
        if i % 16 == 15 {
            image.close().unwrap();
            image = open(storage.clone()).unwrap();
        }
        states.push((storage.position(), state(&image)));
    }
    image.close().unwrap();
    let log = storage.changes();

    let mut random = Random(seed ^ 0xb17);
    let (mut cuts, mut at) = (Cuts::default(), 0);
    let mut seen = [0; 2];
    for position in 1..=log.len() {
        cuts.push(&log[position - 1]);
        while states.get(at + 1).is_some_and(|next| next.0 < position) {
            at += 1;
        }
        if position < first || random.below(log.len() as u64) >= points {
            continue;
        }
        // Steps that wrote nothing may lie between: all of them are possible.
        let later = states[at..].iter().position(|next| next.0 >= position);
        let end = later.map_or(states.len(), |later| at + later + 1);
        for variant in 0..4 {
            let bytes = cuts.cut(variant, &mut random);
            let what = format!("seed {seed} at {position}, variant {variant}");
            let right = survive(bytes, &states[at..end], &what);
            seen[usize::from(right)] += 1;
        }
    }
    assert!(seen[0] > 0 && seen[1] > 0, "seed {seed}: {seen:?}");
}

/// What a crash left must be sound, its bitmaps right or in use; whether the one that is always
/// there is right.
fn survive(bytes: Vec<u8>, possible: &[(usize, State)], what: &str) -> bool {
    check(&bytes).assert_sound(what);
    let storage = Arc::new(MemoryStorage::new(bytes));
    let image = open(storage.clone()).unwrap_or_else(|error| panic!("{what}: {error:?}"));
    let now = state(&image);
    for (name, found) in &now {
        let known = possible
            .iter()
            .any(|(_, state)| state.get(name) == Some(found));
        assert!(known, "{what}: {name} is {found:?}, not of {possible:?}");
    }
    let listed = image.bitmaps().unwrap();
    for bitmap in &listed {
        let enabled = |state: &State| state.get(&bitmap.name).is_some_and(|b| b.0);
        let may = possible.iter().any(|(_, state)| enabled(state));
        assert!(
            may || bitmap.inconsistent.is_none(),
            "{what}: {bitmap:?} was not enabled"
        );
    }
    let marked = now.get(ALWAYS).map(|(_, marked)| marked);
    if let Some(marked) = marked {
        // What is not marked is as it was: zeros.
        for (i, sector) in content(&image).chunks(512).enumerate() {
            let at = i as u64 * 512;
            let covered = marked.iter().any(|range| range.contains(&at));
            let zeros = sector.iter().all(|&byte| byte == 0);
            assert!(covered || zeros, "{what}: {at:#x} is not marked");
        }
    }
    // And it goes on from there.
    image.write(0, &[0xaa; 1024]).unwrap();
    for bitmap in &listed {
        image.remove_bitmap(&bitmap.name).unwrap();
    }
    image.add_bitmap("new", None, true).unwrap();
    image.close().unwrap();
    check(&storage.to_vec()).assert_sound(&format!("{what}, later"));
    marked.is_some()
}

#[test]
fn crash_safe_with_bitmaps() {
    for (seed, cluster) in [512, 1024, 4096].into_iter().enumerate() {
        crash(&empty(cluster), seed as u64, 100, 250);
    }
}

/// An extension that comes and goes moves what lies behind, which may be past the header's first
/// sector: the backing file's name for one.
#[test]
fn a_header_of_several_sectors() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("base"), [0; 512]).unwrap();
    for steps in [0, 50, 400] {
        let name = "./".repeat(steps) + "base";
        let options = "cluster_size=4k";
        let args = [
            "create", "-q", "-u", "-f", "qcow2", "-o", options, "-F", "raw",
        ];
        qemu_img(folder, &[&args[..], &["-b", &name, "disk", "64k"]].concat());
        let start = std::fs::read(folder.join("disk")).unwrap();
        let storage = Arc::new(CrashStorage::default());
        storage.write_at(0, &start).unwrap();
        storage.sync().unwrap();
        let first = storage.position();
        let image = open(storage.clone()).unwrap();
        for _ in 0..2 {
            image.add_bitmap("a", None, true).unwrap();
            image.add_bitmap("b", None, true).unwrap();
            image.remove_bitmap("a").unwrap();
            image.remove_bitmap("b").unwrap();
        }
        image.add_bitmap("a", None, true).unwrap();
        image.close().unwrap();
        std::fs::write(folder.join("disk"), storage.now.to_vec()).unwrap();
        qemu_img(folder, &["check", "-q", "disk"]);
        let log = storage.changes();

        let mut random = Random(steps as u64);
        crashes(&log, first, 20, &mut random, &mut |position, bytes| {
            let what = format!("a name of {} at {position}", name.len());
            check(&bytes).assert_sound(&what);
            let image = open(Arc::new(MemoryStorage::new(bytes)));
            let image = image.unwrap_or_else(|error| panic!("{what}: {error:?}"));
            let backing = image.backing().unwrap();
            assert_eq!(backing.name, name, "{what}");
            assert_eq!(backing.format, Some(Format::Raw), "{what}");
            let bitmaps = image.bitmaps().unwrap();
            assert!(bitmaps.iter().all(|b| b.inconsistent.is_none()), "{what}");
        });
    }
}

/// Every call fails once: the bitmaps are what they were before the step or after it, or in use.
#[test]
fn every_call_fails_once() {
    let mut n = 0;
    while with_fault(n) {
        n += 1;
    }
    assert!(n > 150, "only {n} calls");
}

fn with_fault(n: i64) -> bool {
    let storage = FaultStorage::new(empty(512), ErrorKind::Other);
    let image = open(storage.clone()).unwrap();
    image.add_bitmap(ALWAYS, Some(512), true).unwrap();
    let mut ops = Ops::new(4, SIZE, 512);
    storage.fail_after(n);
    let mut failed = 0;
    for _ in 0..60 {
        failed += usize::from(step(&image, &mut ops).is_err());
    }
    let closed = image.close();
    failed += usize::from(closed.is_err());
    let untouched = !storage.recover();
    check(&storage.inner.to_vec()).assert_sound(&format!("call {n}"));
    let image = open(storage).unwrap();
    match state(&image).get(ALWAYS) {
        Some((_, marked)) => {
            for (i, sector) in content(&image).chunks(512).enumerate() {
                let at = i as u64 * 512;
                let covered = marked.iter().any(|range| range.contains(&at));
                let zeros = sector.iter().all(|&byte| byte == 0);
                assert!(covered || zeros, "call {n}: {at:#x} is not marked");
            }
        }
        None => assert!(failed > 0, "call {n}: the bitmap is lost"),
    }
    !untouched
}
