//! Every target without libFuzzer: what crashed once, then random inputs, the same in each run.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

use std::path::Path;
use std::time::{Duration, Instant};

use cowshed_fuzz::{TARGETS, from_hex, random_input};

/// Random inputs of each target, unless `FUZZ_SECONDS` says for how long.
const INPUTS: u64 = 4000;

fn target(name: &str) -> fn(&[u8]) {
    TARGETS.iter().find(|(of, _)| *of == name).unwrap().1
}

fn replay(name: &str) {
    let run = target(name);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("regressions")
        .join(name);
    let Ok(files) = std::fs::read_dir(folder) else {
        return;
    };
    for file in files {
        let path = file.unwrap().path();
        eprintln!("{}", path.display());
        run(&from_hex(&std::fs::read_to_string(path).unwrap()));
    }
}

fn random(name: &str) {
    let run = target(name);
    let bound = std::env::var("FUZZ_SECONDS").map(|s| Duration::from_secs(s.parse().unwrap()));
    let began = Instant::now();
    for seed in 0.. {
        let over = bound
            .as_ref()
            .map_or(seed >= INPUTS, |&bound| began.elapsed() >= bound);
        if over {
            break;
        }
        eprintln!("{name} {seed}"); // Shown if it panics.
        run(&random_input(seed));
    }
}

#[test]
fn header() {
    replay("header");
    random("header");
}

#[test]
fn open_read() {
    replay("open_read");
    random("open_read");
}

#[test]
fn ops() {
    replay("ops");
    random("ops");
}

#[test]
fn compressed() {
    replay("compressed");
    random("compressed");
}

#[test]
fn check() {
    replay("check");
    random("check");
}

#[test]
fn luks() {
    replay("luks");
    random("luks");
}

#[test]
fn transport() {
    replay("transport");
    random("transport");
}

#[test]
fn requests() {
    replay("requests");
    random("requests");
}
