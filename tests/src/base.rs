//! A small root file system of the tests' own, as a qcow2 base: busybox, a known file, and programs
//! to be PID 1.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::{image, skip};

/// Where [`DATA_SIZE`] bytes of the letter `d` lie in the guest.
pub const DATA: &str = "/data";

/// Size of the file [`DATA`].
pub const DATA_SIZE: usize = 1 << 20;

/// Programs that can be PID 1 (`init=`) in the guest.
const INITS: [(&str, &str); 3] = [
    // Answers one line of the console, then powers off.
    (
        "echo",
        "echo ready; read -r line; echo \"answer: $line\"; poweroff -f",
    ),
    ("reboot", "reboot -f"),
    // PID 1 must not end: the kernel panics.
    ("end", "exit 0"),
];

/// Makes the base `base.qcow2` in `folder` and gives its path.
///
/// # Panics
/// When a tool fails or is missing (packages busybox-static, e2fsprogs, qemu-utils).
pub fn make(folder: &Path) -> PathBuf {
    let root = TempDir::new().expect("a temporary folder");
    lay_out(root.path());
    let raw = folder.join("base.raw");
    let mkfs = skip::program("mkfs.ext4").expect("mkfs.ext4 (package e2fsprogs)");
    let made = Command::new(mkfs)
        .arg("-qFd")
        .arg(root.path())
        .arg(&raw)
        .arg("64M")
        .output()
        .expect("run mkfs.ext4");
    let why = String::from_utf8_lossy(&made.stderr);
    assert!(made.status.success(), "mkfs.ext4: {why}");
    let base = folder.join("base.qcow2");
    image::from_raw(&raw, &base);
    fs::remove_file(raw).expect("remove the raw image");
    base
}

fn lay_out(root: &Path) {
    for folder in [
        "bin", "dev", "etc", "inits", "mnt", "proc", "root", "run", "sys", "tmp",
    ] {
        fs::create_dir(root.join(folder)).expect("create a folder");
    }
    let busybox = skip::program("busybox").expect("busybox (package busybox-static)");
    fs::copy(&busybox, root.join("bin/busybox")).expect("copy busybox");
    let tools = Command::new(&busybox)
        .arg("--list")
        .output()
        .expect("run busybox");
    for tool in String::from_utf8_lossy(&tools.stdout)
        .lines()
        .filter(|&tool| tool != "busybox")
    {
        symlink("busybox", root.join("bin").join(tool)).expect("link a tool");
    }
    fs::write(root.join("data"), vec![b'd'; DATA_SIZE]).expect("write the known file");
    for (name, script) in INITS {
        let path = root.join("inits").join(name);
        let text = format!("#!/bin/sh\nexport PATH=/bin\n{script}\n");
        fs::write(&path, text).expect("write a script");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod a script");
    }
}
