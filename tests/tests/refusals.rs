//! What `run` refuses before anything boots, and says what to do about.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use cowshed_tests::cowshed::Cowshed;
use cowshed_tests::skip::kvm_is_here;
use cowshed_tests::{image, process};
use tempfile::TempDir;

/// The status for an error on the host's side.
const HOST_ERROR: i32 = 125;

/// Runs `cowshed run IMAGE` with `options`; gives the refusal.
fn refusal(image: impl AsRef<OsStr>, options: &[&OsStr]) -> String {
    let run = options.iter().fold(Cowshed::run(), Cowshed::arg);
    let output = run
        .arg(image)
        .command(["true"])
        .output()
        .expect_status(HOST_ERROR);
    assert_eq!(output.stdout(), "");
    output.stderr()
}

/// Makes the qcow2 image `overlay` over the qcow2 image `base`, which it names as given.
fn overlay(overlay: &Path, base: &OsStr) {
    let flags = ["create", "-qf", "qcow2", "-F", "qcow2", "-b"].map(OsStr::new);
    image::qemu_img_ok(flags.into_iter().chain([base, overlay.as_ref()]));
}

#[test]
fn a_raw_image_whose_format_is_not_named() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().unwrap();
    let raw = work.path().join("disk.img");
    fs::write(&raw, [0; 1 << 20]).unwrap();
    let said = refusal(&raw, &[]);
    assert!(
        said.contains("disk.img") && said.contains("format=raw"),
        "{said}"
    );
}

#[test]
fn an_overlay_of_another_base() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().unwrap();
    let [base, other, mine] = ["base", "other", "mine"].map(|name| work.path().join(name));
    image::create(&base, "16M");
    image::create(&other, "16M");
    overlay(&mine, other.as_ref());
    let before = fs::read(&mine).unwrap();
    let said = refusal(&base, &["--overlay".as_ref(), mine.as_ref()]);
    assert!(said.contains("mine") && said.contains("other"), "{said}");
    assert_eq!(fs::read(&mine).unwrap(), before);
}

#[test]
fn a_backing_file_outside_the_images_folder() {
    if !kvm_is_here() {
        return;
    }
    let [work, elsewhere] = [TempDir::new().unwrap(), TempDir::new().unwrap()];
    let secret = elsewhere.path().join("secret.qcow2");
    image::create(&secret, "16M");
    let image = work.path().join("image.qcow2");
    overlay(&image, secret.as_ref());
    let said = refusal(&image, &[]);
    assert!(
        said.contains("secret.qcow2") && said.contains("allow-outside"),
        "{said}"
    );
}

#[test]
fn a_base_that_qemu_has_open_for_writing() {
    if !kvm_is_here() {
        return;
    }
    let work = TempDir::new().unwrap();
    let base = work.path().join("base.qcow2");
    image::create(&base, "16M");
    let mut qemu = Command::new("qemu-io")
        .args(["-f", "qcow2"])
        .arg(&base)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // It answers when it has the image open, and keeps that until its input ends.
    qemu.stdin
        .as_mut()
        .unwrap()
        .write_all(b"write 0 512\n")
        .unwrap();
    let mut answer = String::new();
    BufReader::new(qemu.stdout.as_mut().unwrap())
        .read_line(&mut answer)
        .unwrap();
    let said = refusal(&base, &[]);
    process::kill(&mut qemu);
    assert!(
        said.contains("base.qcow2") && said.contains("another process"),
        "{answer}{said}"
    );
}
