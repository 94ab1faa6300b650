//! Entries are made once, whole or not at all.

use std::fs;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use tempfile::TempDir;

use super::{Cache, Key};
use crate::{Error, Progress};

fn cache(folder: &TempDir) -> Cache {
    Cache::new(folder.path().join("cache"), Progress::Silent)
}

#[test]
fn an_entry_is_made_once() {
    let folder = TempDir::new().unwrap();
    let made = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let entry = cache(&folder).entry("x", "x", |recipe| {
                    made.fetch_add(1, Ordering::Relaxed);
                    fs::write(recipe.out.join("a"), "a").unwrap();
                    std::thread::yield_now();
                    fs::write(recipe.out.join("b"), "b").unwrap();
                    Ok(())
                });
                assert!(entry.unwrap().join("b").is_file());
            });
        }
    });
    assert_eq!(made.load(Ordering::Relaxed), 1);
    assert_eq!(
        fs::read_dir(folder.path().join("cache/.making"))
            .unwrap()
            .count(),
        0
    );
}

#[test]
fn an_entry_has_the_checksums_of_its_files() {
    let folder = TempDir::new().unwrap();
    let entry = cache(&folder).entry("x", "x", |recipe| {
        recipe
            .run(recipe.shell("mkdir \"$OUT/sub\"; echo hello > \"$OUT/sub/file\""))
            .map(drop)
    });
    let check = Command::new("sha256sum")
        .args(["--check", "--strict", "--quiet", "SHA256SUMS"])
        .current_dir(entry.unwrap())
        .status();
    assert!(check.unwrap().success());
}

#[test]
fn a_failure_leaves_nothing_but_the_log_it_names() {
    let folder = TempDir::new().unwrap();
    let cache = cache(&folder);
    let failed = cache.entry("x", "making x", |recipe| {
        recipe
            .run(recipe.shell("echo half > \"$OUT/half\"; echo oh no >&2; false"))
            .map(drop)
    });
    let Err(Error::Command { log, tail, .. }) = &failed else {
        panic!("{failed:?}")
    };
    assert_eq!(
        (fs::read_to_string(log).unwrap().as_str(), tail.as_str()),
        ("oh no\n", "oh no\n")
    );
    assert!(!cache.folder().join("x").exists());
    assert_eq!(
        fs::read_dir(cache.folder().join(".making"))
            .unwrap()
            .count(),
        0
    );
}

/// A process killed amid a recipe: this test runs itself again and kills that.
#[test]
fn what_a_killed_process_left_is_removed_and_made_anew() {
    const FOLDER: &str = "COWSHED_TEST_CACHE";
    if let Some(folder) = std::env::var_os(FOLDER) {
        let cache = Cache::new(folder.into(), Progress::Silent);
        let _ = cache.entry("x", "x", |recipe| {
            fs::write(recipe.out.join("half"), "half").unwrap();
            fs::write(recipe.work.join("ready"), "").unwrap();
            loop {
                std::thread::park();
            }
        });
        return;
    }
    let folder = TempDir::new().unwrap();
    let cache = cache(&folder);
    let mut other = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "cache::tests::what_a_killed_process_left_is_removed_and_made_anew",
        ])
        .env(FOLDER, cache.folder())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let half_made = cache.folder().join(".making/x");
    while !half_made.join("work/ready").exists() {
        assert!(
            other.try_wait().unwrap().is_none(),
            "the other process has ended"
        );
        std::thread::yield_now();
    }
    other.kill().unwrap();
    other.wait().unwrap();
    assert!(half_made.join("out/half").exists());

    // Another entry's making sweeps it, and its own starts from nothing.
    cache.entry("y", "y", |_| Ok(())).unwrap();
    assert!(!half_made.exists());
    let entry = cache.entry("x", "x", |recipe| {
        assert_eq!(fs::read_dir(&recipe.out).unwrap().count(), 0);
        Ok(())
    });
    assert!(entry.unwrap().is_dir());
}

#[test]
fn inputs_are_set_off_from_each_other() {
    let key = |inputs: &[&str]| {
        inputs
            .iter()
            .fold(Key::default(), |key, input| key.with(input.as_bytes()))
            .finish()
    };
    assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
    assert_eq!(key(&["ab", "c"]).len(), 16);
}
