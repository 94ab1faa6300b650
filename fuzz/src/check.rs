//! A damaged image, checked and repaired.

use std::path::Path;
use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use cowshed_qcow::{CheckOptions, CheckReport, Finding, Image, Problem, Repair, check, repair};

use crate::image::Mutated;
use crate::storage::{Bounded, open};

/// What is read of a disk, from its start.
const MOST: u64 = 512 << 10;
const PART: usize = 512;

#[derive(Arbitrary, Debug)]
struct Input {
    mutated: Mutated,
    leaks_only: bool,
}

/// A repair changes no byte that could be read; what it calls clean can be
/// written, and loses nothing.
pub fn run(data: &[u8]) {
    let Ok(input) = Input::arbitrary(&mut Unstructured::new(data)) else {
        return;
    };
    let path = Path::new("fuzzed");
    let bytes = input.mutated.bytes();
    let storage = Bounded::new(bytes.clone());
    let options = CheckOptions::default();
    let few = CheckOptions {
        counter_bytes: 512,
        ..CheckOptions::default()
    };
    let Ok(found) = check(path, storage.clone(), &options) else {
        return;
    };
    if let Ok(again) = check(path, storage.clone(), &few) {
        let counts = |report: &CheckReport| (report.corruptions, report.leaks);
        assert_eq!(
            counts(&found),
            counts(&again),
            "with less memory: {input:?}"
        );
    }
    assert!(storage.to_vec() == bytes, "a check wrote");
    assert!(
        found.corruptions == 0 || !input.mutated.is_valid(),
        "{found:?}"
    );

    let before = open(&storage, true).map(|image| readable(&image));
    let what = if input.leaks_only {
        Repair::Leaks
    } else {
        Repair::All
    };
    let Ok(report) = repair(path, storage.clone(), what, &options) else {
        return;
    };
    if let Ok(before) = before {
        let image = open(&storage, true).unwrap_or_else(|error| panic!("{input:?}: {error:?}"));
        let after = readable(&image);
        for (i, (before, after)) in before.iter().zip(&after).enumerate() {
            assert!(
                before.is_none() || before == after,
                "{input:?}: sector {i} changed"
            );
        }
    }
    if report.is_clean() {
        write(&storage, &input);
    }
}

/// The disk's sectors, those that can be read.
fn readable(image: &Image) -> Vec<Option<Vec<u8>>> {
    (0..image.size().min(MOST))
        .step_by(PART)
        .map(|offset| {
            let mut part = vec![0xee; PART];
            image.read(offset, &mut part).ok().map(|()| part)
        })
        .collect()
}

/// Writes to an image that was called clean: it stays so.
fn write(storage: &Arc<Bounded>, input: &Input) {
    let Ok(image) = open(storage, false) else {
        return;
    };
    if image.size() == 0 || image.size() > MOST {
        return;
    }
    for offset in (0..image.size()).step_by(8192) {
        let _ = image.write(offset, &[7; PART]);
        let _ = image.discard(offset / 2, 4096.min(image.size() - offset / 2));
    }
    drop(image);
    let options = CheckOptions::default();
    let report = check(Path::new("fuzzed"), storage.clone(), &options).unwrap();
    // Where damage made two entries share a cluster, a write through one leaves the other as the
    // only one: without COPIED, which costs a copy and nothing else.
    let harmless = |finding: &Finding| {
        finding.problem == Problem::Copied && finding.what.expected.starts_with("COPIED set")
    };
    let harm = report
        .findings
        .iter()
        .find(|finding| finding.problem != Problem::Leak && !harmless(finding));
    assert!(harm.is_none(), "{input:?}: {report:?}");
}
