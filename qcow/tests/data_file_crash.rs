//! Power cuts and failing calls while an image with a data file is written: two files, of which
//! each is synced apart.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{
    CreateOptions, DataFile, Format, Image, MemoryStorage, OpenOptions, Storage, create,
};
use support::check::check;
use support::crash::{CrashStorage, Cuts};
use support::model::{Op, Ops, SECTOR, content, mirror, perform};
use support::{Random, cached, striped_base};

/// Sectors with the values that a crash from a position of the log on may leave there.
struct Event {
    position: usize,
    sectors: Vec<(usize, Vec<u8>)>,
    flushed: bool,
}

fn open(image: Arc<dyn Storage>, data: Arc<dyn Storage>, with_base: bool) -> Image {
    let options = OpenOptions {
        data_file: Some(data),
        ..cached(4 << 10)
    };
    let base = with_base.then(|| striped_base(40 << 10));
    Image::open_over(Path::new("disk"), image, &options, base).unwrap()
}

/// ARCHITECTURE.md's "crash safe", with two files of which each is synced apart.
fn crash(seed: u64, raw: bool, with_base: bool, extended_l2: bool) {
    let [file, data] = CrashStorage::pair();
    let options = CreateOptions {
        cluster_size: if extended_l2 { 16384 } else { 1024 },
        extended_l2,
        backing: with_base.then(|| ("base".into(), Format::Raw)),
        data_file: Some(DataFile {
            name: "data".into(),
            raw,
            storage: data.clone(),
        }),
        ..CreateOptions::new(96 << 10)
    };
    create(Path::new("disk"), file.clone(), &options).unwrap();
    if !raw {
        data.write_at(0, &vec![0xdd; 96 << 10]).unwrap();
        data.sync().unwrap();
    }
    let created = file.position();
    let image = open(file.clone(), data, with_base);
    let first = content(&image);
    let mut model = first.clone();
    let mut ops = Ops::new(seed, image.size(), image.cluster_size().into());
    ops.compressed = false;
    let mut events = Vec::new();
    for _ in 0..80 {
        let op = ops.next();
        let (before, from) = (model.clone(), file.position());
        perform(&image, &op).unwrap();
        mirror(&mut model, &image, &op);
        let flushed = matches!(op, Op::Flush);
        let zeros = match op {
            Op::Discard { offset, len } => offset as usize..(offset + len) as usize,
            _ => 0..0,
        };
        let mut sectors = Vec::new();
        for at in (0..model.len()).step_by(SECTOR) {
            if zeros.contains(&at) {
                sectors.push((at / SECTOR, vec![0; SECTOR]));
            }
            if zeros.contains(&at) || before[at..at + SECTOR] != model[at..at + SECTOR] {
                sectors.push((at / SECTOR, model[at..at + SECTOR].to_vec()));
            }
        }
        events.push(Event {
            position: if flushed { file.position() } else { from },
            sectors,
            flushed,
        });
    }
    drop(image);
    let log = file.all_changes();
    let mut random = Random(seed);
    let mut possible: Vec<Vec<Vec<u8>>> = first
        .chunks(SECTOR)
        .map(|sector| vec![sector.to_vec()])
        .collect();
    let mut latest: Vec<Vec<u8>> = first.chunks(SECTOR).map(<[u8]>::to_vec).collect();
    let mut events = events.into_iter().peekable();
    let mut cuts = [Cuts::default(), Cuts::default()];
    for position in 0..=log.len() {
        if let Some((file, change)) = position.checked_sub(1).map(|i| &log[i]) {
            cuts[*file].push(change);
        }
        while let Some(event) = events.next_if(|event| {
            event.position < position || event.flushed && event.position == position
        }) {
            for (i, value) in event.sectors {
                possible[i].push(value.clone());
                latest[i] = value;
            }
            if event.flushed {
                possible = latest.iter().map(|value| vec![value.clone()]).collect();
            }
        }
        if position < created || random.below(log.len() as u64) >= 150 {
            continue;
        }
        for variant in 0..4 {
            let [file, data] = cuts.each_ref().map(|cuts| cuts.cut(variant, &mut random));
            let what = format!("seed {seed} at {position}, variant {variant}");
            check(&file).assert_sound(&what);
            let storage = |bytes: &Vec<u8>| Arc::new(MemoryStorage::new(bytes.clone()));
            let now = content(&open(storage(&file), storage(&data), with_base));
            for (i, (found, possible)) in now.chunks(SECTOR).zip(&possible).enumerate() {
                let known = possible.iter().any(|value| value == found);
                assert!(known, "{what}: sector {i} is {:02x?}", &found[..8]);
            }
            assert!(!raw || data == now, "{what}: the data file is another disk");
        }
    }
}

#[test]
fn crash_safe() {
    for seed in 0..4 {
        crash(seed, false, true, false);
        crash(seed + 10, true, false, false);
    }
    crash(20, false, false, false);
    crash(21, false, true, true);
    crash(22, true, false, true);
}
