//! Power cuts: after each change of the file, with what no sync covers lost, torn and reordered,
//! the image must check with leaks at worst, and every flushed byte must read back.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use cowshed_qcow::{
    CreateOptions, Format, Image, KeyCost, MemoryStorage, NewEncryption, OpenOptions, Secret,
    Storage, create,
};
use support::check::check;
use support::crash::{Change, CrashStorage, Cuts};
use support::model::{Op, Ops, SECTOR, content, mirror, perform};
use support::{Random, cached, have_qemu, qemu_img, qemu_io, striped_base};

const NAME: &str = "crash.qcow2";

/// What a crash may leave of a sector: its flushed value, or any later one.
type Possible = Vec<Vec<Vec<u8>>>;

/// What was asked of the image, by the length of the log when it began.
struct Event {
    position: usize,
    /// Values that sectors may have from then on; with a flush, all that they may have.
    sectors: Vec<(usize, Vec<u8>)>,
    /// Sectors that may be zeros from then on, or not: they were discarded.
    zeroed: std::ops::Range<usize>,
    flushed: bool,
}

enum Start {
    Create(CreateOptions),
    /// Made by QEMU.
    Bytes(Vec<u8>),
}

struct Trial {
    /// The image to begin with.
    start: Start,
    base_len: usize,
    requests: usize,
    seed: u64,
    /// Crash points that are tried; all of them if there are no more.
    points: usize,
    /// Torn variants of each.
    variants: usize,
}

fn sectors_of(before: &[u8], after: &[u8]) -> Vec<(usize, Vec<u8>)> {
    let pairs = before.chunks(SECTOR).zip(after.chunks(SECTOR)).enumerate();
    pairs
        .filter(|(_, (b, a))| b != a)
        .map(|(i, (_, a))| (i, a.to_vec()))
        .collect()
}

fn run(trial: &Trial) {
    let storage = Arc::new(CrashStorage::default());
    match &trial.start {
        Start::Create(options) => create(Path::new(NAME), storage.clone(), options).unwrap(),
        Start::Bytes(bytes) => {
            storage.write_at(0, bytes).unwrap();
            storage.sync().unwrap();
        }
    }
    let created = storage.position();
    let has_base = trial.base_len > 0;
    let open = |storage: Arc<dyn Storage>| {
        let base = has_base.then(|| striped_base(trial.base_len));
        let encrypted = matches!(&trial.start, Start::Create(new) if new.encryption.is_some());
        let secrets = if encrypted {
            vec![secret()]
        } else {
            Vec::new()
        };
        let options = OpenOptions {
            secrets,
            ..cached(4 << 10)
        };
        Image::open_over(Path::new(NAME), storage, &options, base)
    };
    let image = open(storage.clone()).unwrap();
    let mut model = content(&image);
    let first = model.clone();
    let mut ops = Ops::new(trial.seed, image.size(), image.cluster_size().into());
    let mut events = Vec::new();
    for _ in 0..trial.requests {
        let op = ops.next();
        let position = storage.position();
        let before = model.clone();
        perform(&image, &op).unwrap();
        mirror(&mut model, &image, &op);
        let sectors = sectors_of(&before, &model);
        let zeroed = match op {
            Op::Discard { offset, len } => {
                offset as usize / SECTOR..(offset + len) as usize / SECTOR
            }
            _ => 0..0,
        };
        let flushed = matches!(op, Op::Flush);
        let position = if flushed {
            storage.position()
        } else {
            position
        };
        events.push(Event {
            position,
            sectors,
            zeroed,
            flushed,
        });
    }
    drop(image);
    let log = storage.changes();
    replay(trial, &log, created, &first, &events, &open);
}

fn replay(
    trial: &Trial,
    log: &[Change],
    created: usize,
    first: &[u8],
    events: &[Event],
    open: &dyn Fn(Arc<dyn Storage>) -> cowshed_qcow::Result<Image>,
) {
    let mut random = Random(trial.seed ^ 0xc0ffee);
    let mut possible: Possible = first.chunks(SECTOR).map(|s| vec![s.to_vec()]).collect();
    let mut latest: Vec<Vec<u8>> = first.chunks(SECTOR).map(<[u8]>::to_vec).collect();
    let mut events = events.iter().peekable();
    let mut cuts = Cuts::default();
    for position in 0..=log.len() {
        if let Some(change) = position.checked_sub(1).map(|i| &log[i]) {
            cuts.push(change);
        }
        // A request's values are possible from its first change on; a flush counts when it ended.
        while let Some(event) = events.next_if(|event| {
            if event.flushed {
                event.position <= position
            } else {
                event.position < position
            }
        }) {
            for (i, value) in &event.sectors {
                possible[*i].push(value.clone());
                latest[*i].clone_from(value);
            }
            event
                .zeroed
                .clone()
                .for_each(|i| possible[i].push(vec![0; SECTOR]));
            if event.flushed {
                for (possible, latest) in possible.iter_mut().zip(&latest) {
                    *possible = vec![latest.clone()];
                }
            }
        }
        if position < created || random.below(log.len() as u64) >= trial.points as u64 {
            continue;
        }
        for variant in 0..trial.variants + 3 {
            let bytes = cuts.cut(variant, &mut random);
            let what = format!("seed {} at {position}, variant {variant}", trial.seed);
            survive(bytes, &possible, open, &mut random, &what);
        }
    }
}

/// What is left of the image after a crash must be sound, hold what was flushed, and go on.
fn survive(
    bytes: Vec<u8>,
    possible: &Possible,
    open: &dyn Fn(Arc<dyn Storage>) -> cowshed_qcow::Result<Image>,
    random: &mut Random,
    what: &str,
) {
    let bytes = if is_dirty(&bytes) {
        rebuilt(bytes, open, what)
    } else {
        bytes
    };
    check(&bytes).assert_sound(what);
    if random.below(500) == 0 && have_qemu() {
        assert_qemu_finds_leaks_at_most(&bytes, what);
    }
    let storage = Arc::new(MemoryStorage::new(bytes));
    let image = open(storage.clone()).unwrap_or_else(|error| panic!("{what}: {error:?}"));
    let mut now = content(&image);
    for (i, (found, possible)) in now.chunks(SECTOR).zip(possible).enumerate() {
        let known = possible.iter().any(|value| value == found);
        assert!(known, "{what}: sector {i} is {:02x?}", &found[..8]);
    }
    if random.below(4) == 0 {
        let mut ops = Ops::new(random.next(), image.size(), image.cluster_size().into());
        for _ in 0..6 {
            let op = ops.next();
            perform(&image, &op).unwrap_or_else(|error| panic!("{what}: {op:?}: {error:?}"));
            mirror(&mut now, &image, &op);
        }
        assert!(content(&image) == now, "{what}: goes on wrong");
        drop(image);
        check(&storage.to_vec()).assert_sound(&format!("{what}, later"));
    }
}

/// Whether the header's dirty bit is set.
fn is_dirty(bytes: &[u8]) -> bool {
    bytes.get(79).is_some_and(|features| features & 1 != 0)
}

/// What opening makes of an image whose refcounts may be old.
fn rebuilt(
    bytes: Vec<u8>,
    open: &dyn Fn(Arc<dyn Storage>) -> cowshed_qcow::Result<Image>,
    what: &str,
) -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::new(bytes));
    drop(open(storage.clone()).unwrap_or_else(|error| panic!("{what}: {error:?}")));
    let bytes = storage.to_vec();
    assert!(!is_dirty(&bytes), "{what}: dirty still");
    let report = check(&bytes);
    assert!(report.leaks.is_empty(), "{what}: {:?}", report.leaks);
    bytes
}

/// Now and then QEMU's checker has its say too; a process for each state would take minutes.
fn assert_qemu_finds_leaks_at_most(bytes: &[u8], what: &str) {
    const LEAKS: i32 = 3;
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("base"), []).unwrap();
    std::fs::write(folder.path().join(NAME), bytes).unwrap();
    let encrypted = bytes.get(32..36) != Some(&[0; 4]);
    let args: &[&str] = if encrypted {
        let object = "secret,id=moo,data=moo";
        let image = "driver=qcow2,file.filename=crash.qcow2,encrypt.key-secret=moo";
        &["check", "--object", object, "--image-opts", image]
    } else {
        &["check", "-f", "qcow2", NAME]
    };
    let output = Command::new("qemu-img")
        .args(args)
        .current_dir(folder.path())
        .output()
        .unwrap();
    let code = output.status.code();
    assert!(matches!(code, Some(0 | LEAKS)), "{what}: {output:?}");
}

fn overlay(size: u64, cluster_size: u32, refcount_bits: u32) -> CreateOptions {
    let backing = Some(("base".into(), Format::Raw));
    CreateOptions {
        cluster_size,
        refcount_bits,
        backing,
        ..CreateOptions::new(size)
    }
}

/// ARCHITECTURE.md's "crash safe", at every change of a small overlay's file.
#[test]
fn crash_safe() {
    for seed in 0..8 {
        let create = overlay(64 << 10, 512, 16);
        let trial = Trial {
            start: Start::Create(create),
            base_len: 40 << 10,
            requests: 120,
            seed,
            points: usize::MAX,
            variants: 3,
        };
        run(&trial);
    }
}

/// Encrypted zeros are no zeros: what is new and not written yet must never be seen.
#[test]
fn crash_safe_when_encrypted() {
    let luks = NewEncryption::Luks {
        secret: secret(),
        cost: KeyCost::Iterations(1),
    };
    for (seed, (encryption, cluster_size, base_len, points)) in [
        (NewEncryption::LegacyAes, 512, 40 << 10, 150),
        (NewEncryption::LegacyAes, 4096, 0, 150),
        (luks, 2048, 40 << 10, 20),
    ]
    .into_iter()
    .enumerate()
    {
        let create = CreateOptions {
            backing: (base_len > 0).then(|| ("base".into(), Format::Raw)),
            encryption: Some(encryption),
            ..overlay(64 << 10, cluster_size, 16)
        };
        run(&Trial {
            start: Start::Create(create),
            base_len,
            requests: 120,
            seed: 30 + seed as u64,
            points,
            variants: 2,
        });
    }
}

fn secret() -> Secret {
    Secret::new(b"moo".to_vec())
}

/// Refcounts that wait: after a crash they are rebuilt as the image is opened.
#[test]
fn crash_safe_with_lazy_refcounts() {
    for (seed, (cluster_size, refcount_bits)) in [(512, 16), (512, 64), (1024, 1), (4096, 8)]
        .into_iter()
        .enumerate()
    {
        let create = CreateOptions {
            lazy_refcounts: true,
            ..overlay(64 << 10, cluster_size, refcount_bits)
        };
        let trial = Trial {
            start: Start::Create(create),
            base_len: 40 << 10,
            requests: 120,
            seed: 30 + seed as u64,
            points: 300,
            variants: 3,
        };
        run(&trial);
    }
}

#[test]
fn crash_safe_with_other_geometries() {
    for (seed, (cluster_size, refcount_bits)) in [(1024, 1), (4096, 8), (512, 64), (2048, 2)]
        .into_iter()
        .enumerate()
    {
        let size = 128 << 10;
        let create = CreateOptions {
            cluster_size,
            refcount_bits,
            ..CreateOptions::new(size)
        };
        let seed = 10 + seed as u64;
        run(&Trial {
            start: Start::Create(create),
            base_len: 0,
            requests: 120,
            seed,
            points: 150,
            variants: 2,
        });
    }
}

/// Internal snapshots, compressed clusters and zero clusters of QEMU's making: shared clusters
/// are copied, and what only the active disk dropped is freed.
#[test]
fn crash_safe_beside_snapshots() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let source: Vec<u8> = (0..80_u32 << 10).map(|i| (i / 3000) as u8).collect();
    std::fs::write(folder.join("source"), source).unwrap();
    for (seed, options) in [
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=32",
        "cluster_size=1k,compat=0.10",
    ]
    .into_iter()
    .enumerate()
    {
        let args = [
            "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "source", "disk",
        ];
        qemu_img(folder, &args);
        qemu_io(
            folder,
            "disk",
            &["write -P 5 1k 9k".into(), "write -z 20k 8k".into()],
        );
        qemu_img(folder, &["snapshot", "-c", "one", "disk"]);
        qemu_io(folder, "disk", &["write -P 6 4k 9k".into()]);
        let start = Start::Bytes(std::fs::read(folder.join("disk")).unwrap());
        let seed = 20 + seed as u64;
        run(&Trial {
            start,
            base_len: 0,
            requests: 80,
            seed,
            points: 150,
            variants: 3,
        });
    }
}

/// Clusters of 16 KiB whose subclusters have a sector each.
#[test]
fn crash_safe_with_subclusters() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (seed, base_len) in [0, 150 << 10].into_iter().enumerate() {
        let options = "extended_l2=on,cluster_size=16k";
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
        if base_len > 0 {
            args.extend(["-u", "-b", "base", "-F", "raw"]);
        }
        args.extend(["disk", "200k"]);
        qemu_img(folder, &args);
        if base_len == 0 {
            qemu_io(folder, "disk", &["write -P 5 1k 90k".into()]);
            qemu_img(folder, &["snapshot", "-c", "one", "disk"]);
            qemu_io(folder, "disk", &["write -P 6 4k 9k".into()]);
        }
        run(&Trial {
            start: Start::Bytes(std::fs::read(folder.join("disk")).unwrap()),
            base_len,
            requests: 120,
            seed: 30 + seed as u64,
            points: 150,
            variants: 2,
        });
    }
}

/// 512-byte clusters and 64-bit refcounts: one cluster of the refcount table counts 2 MiB.
#[test]
fn crash_safe_while_the_refcount_table_moves() {
    let mut create = overlay(4 << 20, 512, 64);
    create.backing = None;
    let storage = Arc::new(CrashStorage::default());
    create_and_fill(&storage, &create);
    let log = storage.changes();
    // The header is written when the table has moved: look around these points.
    let moves: Vec<usize> = log
        .iter()
        .enumerate()
        .filter(|(_, change)| matches!(change, Change::Write(0, _)))
        .map(|(i, _)| i)
        .skip(1) // Its creation.
        .collect();
    assert!(!moves.is_empty(), "the table did not move");
    let mut random = Random(5);
    let mut cuts = Cuts::default();
    for (position, change) in log.iter().enumerate() {
        if moves
            .iter()
            .any(|&moved| position + 8 >= moved && position < moved + 12)
        {
            for _ in 0..4 {
                check(&cuts.cut(3, &mut random)).assert_sound(&format!("{position}"));
            }
        }
        cuts.push(change);
    }
}

fn create_and_fill(storage: &Arc<CrashStorage>, options: &CreateOptions) {
    create(Path::new(NAME), storage.clone(), options).unwrap();
    let open = OpenOptions::new(Format::Qcow2);
    let image = Image::open_over(Path::new(NAME), storage.clone(), &open, None).unwrap();
    for i in 0..60 {
        image.write(i * 65536, &vec![i as u8 + 1; 65536]).unwrap();
        image.flush().unwrap();
    }
    drop(image);
    check(&storage.now.to_vec()).assert_clean("filled");
}
