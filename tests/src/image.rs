//! Disk images, made and judged by QEMU's `qemu-img`.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use crate::process;

/// Runs `qemu-img` and gives its output, whatever its status.
///
/// # Panics
/// When there is no `qemu-img`.
pub fn qemu_img<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Output {
    let mut command = Command::new("qemu-img");
    command.args(args);
    loop {
        let output = command.output();
        let output = output.expect("run qemu-img (package qemu-utils)");
        if !cannot_time_a_key(&output) {
            return output;
        }
    }
}

/// QEMU 7.2 measures how long a password takes, and gives up now and then when that is no time at all.
pub fn cannot_time_a_key(output: &Output) -> bool {
    String::from_utf8_lossy(&output.stderr).contains("accurate CPU usage")
}

/// Runs `qemu-img`, which must succeed.
///
/// # Panics
/// When it does not.
pub fn qemu_img_ok<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) {
    let output = qemu_img(args);
    assert!(
        output.status.success(),
        "qemu-img: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Makes an empty qcow2 image of `size` (such as `64M`) at `path`.
///
/// # Panics
/// When `qemu-img` fails.
pub fn create(path: &Path, size: &str) {
    qemu_img_ok([
        OsStr::new("create"),
        "-qf".as_ref(),
        "qcow2".as_ref(),
        path.as_ref(),
        size.as_ref(),
    ]);
}

/// Makes the qcow2 image `target` with what the raw image `source` has.
///
/// # Panics
/// When `qemu-img` fails.
pub fn from_raw(source: &Path, target: &Path) {
    let flags = ["convert", "-f", "raw", "-O", "qcow2"].map(OsStr::new);
    qemu_img_ok(flags.into_iter().chain([source.as_ref(), target.as_ref()]));
}

/// Waits until nobody uses the qcow2 image at `path`: whoever was killed lets go of its locks when
/// the last of its processes is gone, which is soon.
///
/// # Panics
/// When it is in use for a minute.
pub fn until_free(path: &Path) {
    let info = ["info", "-f", "qcow2"].map(OsStr::new);
    let free = || {
        qemu_img(info.into_iter().chain([path.as_ref()]))
            .status
            .success()
    };
    process::until("the image is let go of", Duration::from_secs(60), || {
        free().then_some(())
    });
}

/// What `qemu-img check` has to say of the qcow2 image at `path`.
#[derive(Debug, PartialEq, Eq)]
pub struct Check {
    /// Errors that lose data.
    pub corruptions: u64,
    /// Clusters that nothing names.
    pub leaks: u64,
}

/// Checks the qcow2 image at `path` with `qemu-img`, which repairs nothing.
///
/// # Panics
/// When `qemu-img` cannot check it at all.
pub fn check(path: &Path) -> Check {
    let flags = ["check", "-f", "qcow2", "--output=json"].map(OsStr::new);
    let output = qemu_img(flags.into_iter().chain([path.as_ref()]));
    // 2: corruptions; 3: leaks only.
    assert!(
        matches!(output.status.code(), Some(0 | 2 | 3)),
        "qemu-img check: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let page: serde_json::Value = serde_json::from_slice(&output.stdout).expect("qemu-img's JSON");
    let count = |key: &str| page.get(key).map_or(0, |v| v.as_u64().expect("a count"));
    assert_eq!(count("check-errors"), 0, "{page}");
    Check {
        corruptions: count("corruptions"),
        leaks: count("leaks"),
    }
}
