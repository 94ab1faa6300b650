//! Each allocation held against a full map of what is live: what the file refers to after one flush
//! is no place for anything else until after the next.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{
    CreateOptions, Format, Image, KeyCost, MemoryStorage, NewEncryption, NewSnapshot, OpenOptions,
    Secret, Selector, create,
};
use support::check::{Report, check};
use support::model::{Ops, perform};
use support::{Random, striped_base};

const NAME: &str = "allocation.qcow2";
const SIZE: u64 = 256 << 10;
const BASE: usize = 150_000;

/// A cluster that was live holds nothing that it did not hold before: what it was given to had to
/// find it free. Compressed clusters alone come to lie beside others of their kind.
fn assert_was_free(before: &Report, after: &Report, what: &str) {
    for (cluster, now) in &after.live {
        let Some(old) = before.live.get(cluster) else {
            continue;
        };
        let packed = old.iter().all(|(kind, _)| *kind == "compressed");
        let is_new = |held: &&(&str, u64)| !(packed && held.0 == "compressed");
        let new: Vec<_> = now.difference(old).filter(is_new).collect();
        assert!(
            new.is_empty(),
            "{what}: cluster {cluster} with {old:?} was given to {new:?}"
        );
    }
}

fn snapshots(image: &Image, random: &mut Random) {
    let there = image.snapshots().unwrap();
    let which = |random: &mut Random| {
        let index = random.below(there.len() as u64) as usize;
        Selector::Id(there[index].id.clone())
    };
    match random.below(3) {
        0 if there.len() < 3 => drop(image.create_snapshot(&NewSnapshot::new("one")).unwrap()),
        1 if !there.is_empty() => image.apply_snapshot(&which(random)).unwrap(),
        _ if !there.is_empty() => image.delete_snapshot(&which(random)).unwrap(),
        _ => {}
    }
}

fn trial(what: &str, seed: u64, with_snapshots: bool, options: &CreateOptions) {
    let storage = Arc::new(MemoryStorage::default());
    create(Path::new(NAME), storage.clone(), options).unwrap();
    let open = || {
        let options = OpenOptions {
            secrets: (options.encryption.iter())
                .map(|_| Secret::new(b"moo".to_vec()))
                .collect(),
            ..OpenOptions::new(Format::Qcow2)
        };
        let base = Some(striped_base(BASE));
        Image::open_over(Path::new(NAME), storage.clone(), &options, base).unwrap()
    };
    let mut image = open();
    let mut ops = Ops::new(seed, SIZE, image.cluster_size().into());
    ops.compressed = options.encryption.is_none() && options.refcount_bits > 4;
    let mut random = Random(seed);
    let mut before = check(&storage.to_vec());
    for step in 0..250 {
        match random.below(12) {
            0 if with_snapshots => snapshots(&image, &mut random),
            1 => {
                drop(image);
                image = open();
            }
            _ => perform(&image, &ops.next()).unwrap(),
        }
        image.flush().unwrap();
        let after = check(&storage.to_vec());
        let what = format!("{what}, step {step}");
        assert_was_free(&before, &after, &what);
        after.assert_clean(&what);
        before = after;
    }
}

#[test]
fn what_is_live_is_no_place_for_anything_else() {
    let new = |cluster_size, refcount_bits| CreateOptions {
        cluster_size,
        refcount_bits,
        backing: Some(("base".into(), Format::Raw)),
        ..CreateOptions::new(SIZE)
    };
    let encryption = Some(NewEncryption::Luks {
        secret: Secret::new(b"moo".to_vec()),
        cost: KeyCost::Iterations(1),
    });
    let trials = [
        ("small clusters", true, new(512, 16)),
        ("wide refcounts", true, new(1024, 64)),
        ("narrow refcounts", false, new(1024, 1)),
        ("the usual", true, new(65536, 16)),
        (
            "version 2",
            true,
            CreateOptions {
                version: 2,
                ..new(2048, 16)
            },
        ),
        (
            "subclusters",
            true,
            CreateOptions {
                extended_l2: true,
                ..new(16384, 16)
            },
        ),
        (
            "encrypted",
            true,
            CreateOptions {
                encryption,
                ..new(4096, 16)
            },
        ),
    ];
    for (seed, (what, with_snapshots, options)) in trials.into_iter().enumerate() {
        trial(what, seed as u64, with_snapshots, &options);
    }
}
