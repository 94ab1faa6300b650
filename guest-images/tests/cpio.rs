//! Archives are what `cpio` takes for one.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::io::Write;
use std::process::{Command, Stdio};

use cowshed_guest_images::cpio::Archive;
use cowshed_guest_images::initramfs;

/// What `cpio` lists, or `None` where there is no `cpio`.
fn list(archive: &[u8]) -> Option<Vec<String>> {
    let cpio = Command::new("cpio")
        .args(["--list", "--verbose", "--numeric-uid-gid", "--quiet"])
        .env("TZ", "UTC")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut cpio) = cpio else {
        eprintln!("skipped: there is no cpio here (apt-get install cpio)");
        return None;
    };
    cpio.stdin.take().unwrap().write_all(archive).unwrap();
    let output = cpio.wait_with_output().unwrap();
    assert!(output.status.success());
    let lines = String::from_utf8(output.stdout).unwrap();
    Some(
        lines
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect(),
    )
}

#[test]
fn cpio_lists_what_was_put_in() {
    for size in 0..9 {
        let mut archive = Archive::default();
        archive.directory("etc");
        archive.character_device("dev-console", 5, 1);
        archive.file("etc/odd", 0o640, &vec![b'x'; size]);
        archive.file("etc/after", 0o755, b"after");
        let archive = archive.finish();
        assert_eq!(archive.len() % 4, 0);
        let Some(listed) = list(&archive) else { return };
        assert_eq!(
            listed,
            [
                "drwxr-xr-x 1 0 0 0 Jan 1 1970 etc".to_owned(),
                "crw------- 1 0 0 5, 1 Jan 1 1970 dev-console".to_owned(),
                format!("-rw-r----- 1 0 0 {size} Jan 1 1970 etc/odd"),
                "-rwxr-xr-x 1 0 0 5 Jan 1 1970 etc/after".to_owned(),
            ]
        );
    }
}

#[test]
fn cpio_unpacks_init() {
    let folder = tempfile::TempDir::new().unwrap();
    let archive = folder.path().join("archive");
    std::fs::write(&archive, initramfs(b"#!/bin/true\n")).unwrap();
    let cpio = Command::new("cpio")
        .args(["--extract", "--quiet", "init", "tmp"])
        .current_dir(folder.path())
        .stdin(std::fs::File::open(&archive).unwrap())
        .status();
    if cpio.is_err() {
        eprintln!("skipped: there is no cpio here (apt-get install cpio)");
        return;
    }
    assert_eq!(
        std::fs::read(folder.path().join("init")).unwrap(),
        b"#!/bin/true\n"
    );
    assert!(folder.path().join("tmp").is_dir());
}
