//! Random load on a disk whose machine is killed at random: what was flushed must be there.
//!
//! A guest without an operating system (`metal::soak`) makes requests that follow from a seed, and says
//! what is durable. After each run the image is read with `qemu-img` and held against what the seed
//! says. `SOAK_SECONDS=3600` goes on for an hour instead of a few runs:
//!
//!   SOAK_SECONDS=3600 cargo test --release --package cowshed-tests --test soak -- --nocapture

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cowshed_tests::cowshed::{Cowshed, binary};
use cowshed_tests::random::Random;
use cowshed_tests::skip::kvm_is_here;
use cowshed_tests::soak::{self, AHEAD, BLOCK, Kind, Step, Writer};
use cowshed_tests::{guest, image};
use rustix::process::Signal;
use tempfile::TempDir;

const BLOCKS: u64 = 4096;
/// Runs, unless `SOAK_SECONDS` says for how long.
const RUNS: u64 = 12;
/// What an image may have beside the disk: its tables, and what a flush has not let go of yet.
const BESIDE: u64 = 4 << 20;

/// How each run's disk is used: keys of `--disk`, and queues.
const WAYS: [(&str, u64); 6] = [
    ("", 1),
    (",queues=4", 4),
    (",queues=2,cache=none", 2),
    (",io=threads,queues=2", 2),
    (",iops=20000,bps=100M", 1),
    (",cache-size=64k", 1),
];

/// What a block may have been left with.
type Found = Option<Writer>;

struct Disk {
    folder: TempDir,
    /// What is known of each block, once it was read.
    blocks: Vec<Found>,
}

impl Disk {
    /// A base with content and an overlay without.
    fn new() -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        let base = folder.path().join("base.qcow2");
        image::create(&base, &format!("{}K", BLOCKS * BLOCK / 1024));
        let disk = Disk {
            folder,
            blocks: vec![None; BLOCKS as usize],
        };
        // The base itself is written for a while, and never again.
        let run = disk.run(0, 1, "overlay=none", 2000).output();
        let run = run.expect_status(0);
        assert!(run.stdout().ends_with("PASS\n"), "{}", run.stdout());
        let blocks = disk.read(&base);
        Disk { blocks, ..disk }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, seed: u64, queues: u64, keys: &str, steps: u64) -> Cowshed {
        let kernel = guest::builder().metal("soak").expect("build the guest");
        let base = self.path("base.qcow2");
        let words = format!("soak seed={seed} blocks={BLOCKS} queues={queues} steps={steps}");
        Cowshed::run()
            .option("--kernel", kernel)
            .option("--cmdline", words)
            .option("--disk", format!("{},{keys}", base.display()))
    }

    /// Reads every block, by another program than ours.
    fn read(&self, path: &Path) -> Vec<Found> {
        let raw = self.path("raw");
        image::qemu_img_ok([
            "convert".as_ref(),
            "-fqcow2".as_ref(),
            "-Oraw".as_ref(),
            path.as_os_str(),
            raw.as_os_str(),
        ]);
        let bytes = std::fs::read(&raw).expect("read the content");
        let blocks = bytes.chunks_exact(BLOCK as usize).zip(0..);
        blocks
            .map(|(bytes, block)| {
                let word = |at: u64| {
                    let at = at as usize * 8;
                    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
                };
                soak::writer(block, word).unwrap_or_else(|why| panic!("block {block}: {why}"))
            })
            .collect()
    }

    /// Holds what the blocks have now against what they had and what the run did since. All before
    /// step `durable` is there; of what follows, as much as was begun may be.
    fn compare(&mut self, now: Vec<Found>, seed: u64, durable: u64) {
        let mut may: Vec<Vec<Found>> = self.blocks.iter().map(|&was| vec![was]).collect();
        let end = durable + AHEAD + 2;
        for index in 0..end {
            let step = Step::new(seed, index, BLOCKS);
            let new = match step.kind {
                Kind::Write => Some(Writer { seed, index }),
                Kind::Zero | Kind::Discard => None,
                Kind::Read | Kind::Flush => continue,
            };
            for block in step.first..step.first + step.count {
                let may = &mut may[block as usize];
                if index < durable && step.kind != Kind::Discard {
                    may.clear();
                }
                may.push(new);
            }
        }
        for (block, (now, may)) in now.iter().zip(&may).enumerate() {
            assert!(
                may.contains(now),
                "seed {seed}, durable {durable}: block {block} has {now:?}, not one of {may:?}"
            );
        }
        self.blocks = now;
    }
}

/// How a run ends.
#[derive(Clone, Copy, Debug)]
enum End {
    /// The whole program is killed.
    Killed,
    /// Only the process with the machine is.
    MachineKilled,
    /// It is asked to.
    Asked,
}

/// Lets a machine work until it has said often enough that something is durable, and ends it. Returns
/// what it said last.
fn work(run: Cowshed, flushes: u64, end: End) -> u64 {
    let mut running = run.spawn();
    let lines = BufReader::new(running.take_stdout()).lines();
    let mut durable = 0;
    let mut left = flushes;
    for line in lines {
        let line = line.expect("read the guest's words");
        // The last line may have been cut off by the kill.
        match line.strip_prefix("flushed ").map(str::parse) {
            Some(Ok(step)) if left > 0 || step > durable => durable = step,
            _ if left == 0 => break,
            _ => panic!("the guest says: {line}"),
        }
        left = left.saturating_sub(1);
        if left == 0 {
            match end {
                End::Killed => running.signal(Signal::KILL),
                End::MachineKilled => running.kill_children(),
                End::Asked => running.signal(Signal::TERM),
            }
        }
    }
    let output = running.wait();
    match end {
        End::Killed => {}
        End::MachineKilled => assert_eq!(output.code(), 125, "{}", output.stderr()),
        End::Asked => assert_eq!(output.code(), 143, "{}", output.stderr()),
    }
    durable
}

#[test]
fn what_was_flushed_survives_a_killed_machine() {
    if !kvm_is_here() {
        return;
    }
    let seconds = std::env::var("SOAK_SECONDS").ok();
    let long = seconds.map(|text| Duration::from_secs(text.parse().expect("SOAK_SECONDS")));
    let began = Instant::now();
    let mut disk = Disk::new();
    let overlay = disk.path("overlay.qcow2");
    let base = std::fs::read(disk.path("base.qcow2")).expect("read the base");
    let (mut steps, mut leaks) = (0, 0);
    for run in 1.. {
        if long.map_or(run > RUNS, |long| began.elapsed() >= long) {
            break;
        }
        let mut random = Random::new(run);
        let (keys, queues) = WAYS[random.below(WAYS.len() as u64) as usize];
        let end = [End::Killed, End::MachineKilled, End::Asked][random.below(3) as usize];
        let flushes = 1 + random.below(40);
        let keys = format!("overlay={}{keys}", overlay.display());
        eprintln!("run {run}: {end:?} after {flushes} flushes, {keys}, {queues} queues");
        let durable = work(disk.run(run, queues, &keys, u64::MAX), flushes, end);
        image::until_free(&overlay);
        let found = image::check(&overlay);
        assert_eq!(found.corruptions, 0, "run {run}");
        if found.leaks > 0 {
            let repair = std::process::Command::new(binary())
                .args(["img", "check", "-q", "-r", "leaks"])
                .arg(&overlay)
                .status();
            assert!(repair.expect("run cowshed img").success(), "run {run}");
            assert_eq!(image::check(&overlay).leaks, 0, "run {run}");
        }
        let now = disk.read(&overlay);
        disk.compare(now, run, durable);
        let len = overlay.metadata().expect("the overlay").len();
        assert!(
            len <= BLOCKS * BLOCK + BESIDE,
            "the overlay has {len} bytes"
        );
        steps += durable;
        leaks += found.leaks;
    }
    let after = std::fs::read(disk.path("base.qcow2")).expect("read the base");
    assert!(base == after, "the base was changed");
    eprintln!("{steps} durable steps, {leaks} clusters leaked and got back");
}

#[test]
fn what_was_flushed_is_in_the_overlay_that_a_killed_machine_leaves() {
    if !kvm_is_here() {
        return;
    }
    let mut disk = Disk::new();
    let kept = disk.path("kept.qcow2");
    let run = disk.run(1, 2, "queues=2", u64::MAX);
    let run = run.option("--keep-overlay", &kept);
    let durable = work(run, 20, End::MachineKilled);
    image::until_free(&kept);
    assert_eq!(image::check(&kept).corruptions, 0);
    let now = disk.read(&kept);
    disk.compare(now, 1, durable);
}
