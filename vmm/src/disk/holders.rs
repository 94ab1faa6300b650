//! Who else has a file open: for the message that says why it is not to be had.

use std::fs;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

/// As many as are named.
const MOST: usize = 3;

/// The processes that have `file` open too, as ` (name 4711, name 4712)`; empty where that cannot be
/// seen: those of others, or in other namespaces.
pub(super) fn holders(file: &File) -> String {
    let this = Path::new("/proc/self/fd").join(file.as_raw_fd().to_string());
    // Reading a link never waits, as looking at what it leads to can.
    let Ok(target) = fs::read_link(this) else {
        return String::new();
    };
    let own = std::process::id();
    let mut names = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let id = process
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        let Some(id) = id.filter(|id: &u32| *id != own) else {
            continue;
        };
        let handles = fs::read_dir(process.path().join("fd"));
        let has = |handle: fs::DirEntry| fs::read_link(handle.path()).is_ok_and(|to| to == target);
        if names.len() < MOST && handles.into_iter().flatten().flatten().any(has) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            names.push(format!("{} {id}", name.trim_end()));
        }
    }
    if names.is_empty() {
        return String::new();
    }
    format!(" ({})", names.join(", "))
}
