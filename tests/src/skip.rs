//! Saying loudly what a machine lacks, instead of passing in silence.

use std::fs::OpenOptions;
use std::path::PathBuf;

/// Prints `skipped: why`, where the harness does not capture it.
pub fn say(why: &str) {
    // A test's `eprintln!` is captured and shown for failures only, a write to the file is not.
    use std::io::Write;
    let _ = writeln!(std::io::stderr().lock(), "skipped: {why}");
}

/// Whether `/dev/kvm` opens; says `skipped: ...` when it does not.
///
/// # Panics
/// When `COWSHED_REQUIRE_KVM=1` is set and it does not.
pub fn kvm_is_here() -> bool {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            let why = format!("no KVM: /dev/kvm: {error}");
            assert!(!required("COWSHED_REQUIRE_KVM"), "{why}");
            say(&why);
            false
        }
    }
}

/// The path of `program`, looked up in `PATH` and the administrator's folders.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// Whether the environment says that a missing `what` is a failure, as CI does.
pub(crate) fn required(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| value == "1")
}
