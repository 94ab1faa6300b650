//! The tools that make volumes.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Runs one of the administrator's programs, which is in the Debian package `package`. `FILE` among
/// its words stands for `file`; `input` is its standard input.
pub(crate) fn tool(package: &str, words: &str, file: &Path, input: &str) {
    let mut words = words.split(' ');
    let name = words.next().unwrap();
    let path = std::env::var("PATH").unwrap() + ":/usr/sbin:/sbin";
    let mut child = Command::new(name)
        .args(words.map(|word| match word {
            "FILE" => file.as_os_str(),
            word => word.as_ref(),
        }))
        .env("PATH", path)
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("{name} (package {package}): {error}"));
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    assert!(child.wait().unwrap().success(), "{name}");
}
