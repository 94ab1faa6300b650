//! `cowshed img` and `qemu-img` side by side. All panics when its step fails.

#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    clippy::new_without_default
)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

use crate::cowshed::binary;
use crate::image::cannot_time_a_key;

/// Runs a tool in a folder, with words separated by spaces.
pub fn run(program: &Path, folder: &Path, words: &str) -> Output {
    let img = program.file_name().is_some_and(|name| name == "cowshed");
    Command::new(program)
        .args(img.then_some("img"))
        .args(words.split(' '))
        .current_dir(folder)
        .output()
        .unwrap()
}

/// What a program said.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Two folders in which the same is done by cowshed and by qemu-img.
#[derive(Debug)]
pub struct Both(pub TempDir, pub TempDir);

impl Both {
    /// Two empty ones.
    pub fn new() -> Self {
        Both(TempDir::new().unwrap(), TempDir::new().unwrap())
    }

    /// Runs the same words with both, which must agree about the status.
    pub fn run(&self, words: &str) -> (Output, Output) {
        let ours = run(binary(), self.0.path(), words);
        let mut theirs = run("qemu-img".as_ref(), self.1.path(), words);
        while cannot_time_a_key(&theirs) {
            theirs = run("qemu-img".as_ref(), self.1.path(), words);
        }
        let said = text(&ours.stderr);
        assert_eq!(ours.status.code(), theirs.status.code(), "{words}: {said}");
        (ours, theirs)
    }

    /// Runs the same words with both, which must succeed.
    pub fn ok(&self, words: &str) {
        let (ours, _) = self.run(words);
        assert!(ours.status.success(), "{words}: {}", text(&ours.stderr));
    }

    /// The JSON that both give, which must have the same fields where qemu-img has them.
    pub fn json(&self, words: &str) -> Value {
        let (ours, theirs) = self.run(words);
        let parse = |output: &Output| -> Value { serde_json::from_slice(&output.stdout).unwrap() };
        let (ours, theirs) = (parse(&ours), parse(&theirs));
        within(words, &theirs, &ours);
        ours
    }

    /// Makes a file in both.
    pub fn file(&self, name: &str, bytes: &[u8]) {
        fs::write(self.0.path().join(name), bytes).unwrap();
        fs::write(self.1.path().join(name), bytes).unwrap();
    }

    /// Runs qemu-io on both copies of an image.
    pub fn io(&self, image: &str, command: &str) {
        for folder in [self.0.path(), self.1.path()] {
            let tool = Command::new("qemu-io")
                .args(["-f", "qcow2", "-c", command, image])
                .current_dir(folder)
                .output();
            assert!(tool.unwrap().status.success(), "{command}");
        }
    }

    /// What cowshed made is sound, and has what qemu-img's has.
    pub fn same(&self, name: &str, format: &str) {
        let ours = self.0.path().join(name);
        let theirs = self.1.path().join(name);
        let words = format!(
            "compare -f {format} -F {format} {} {}",
            ours.display(),
            theirs.display()
        );
        let output = run("qemu-img".as_ref(), self.0.path(), &words);
        assert!(output.status.success(), "{name}: {}", text(&output.stdout));
        if format == "qcow2" {
            let words = format!("check -q -f qcow2 {name}");
            let output = run("qemu-img".as_ref(), self.0.path(), &words);
            assert!(output.status.success(), "{name}: {}", text(&output.stdout));
        }
    }
}

/// All that `theirs` has `ours` has too.
fn within(words: &str, theirs: &Value, ours: &Value) {
    match (theirs, ours) {
        (Value::Object(theirs), Value::Object(ours)) => {
            for (key, value) in theirs {
                // Where clusters are is each program's own business, and so are blocks and times.
                let own = [
                    "offset",
                    "image-end-offset",
                    "actual-size",
                    "date-sec",
                    "date-nsec",
                    "uuid",
                    "iters",
                    "master-key-iters",
                ];
                if key == "icount" {
                    continue; // Which qemu-img records as 0 where nothing was counted.
                }
                if key == "virtual-size" && words.contains("children") {
                    continue; // The length of the image's file.
                }
                let found = ours.get(key).unwrap_or_else(|| panic!("{words}: no {key}"));
                if !own.contains(&key.as_str()) {
                    within(&format!("{words}: {key}"), value, found);
                }
            }
        }
        (Value::Array(theirs), Value::Array(ours)) => {
            assert_eq!(theirs.len(), ours.len(), "{words}");
            for (theirs, ours) in theirs.iter().zip(ours) {
                within(words, theirs, ours);
            }
        }
        _ => assert_eq!(theirs, ours, "{words}"),
    }
}

/// A disk of 3 MiB with zeros in it.
pub fn content() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..3_u32 << 20).map(|i| (i / 5000) as u8 | 1).collect();
    bytes[1 << 20..1_500_000].fill(0);
    bytes
}

/// Of the qemu-img that is installed: major and minor number.
pub fn qemu_version() -> (u32, u32) {
    let output = run("qemu-img".as_ref(), ".".as_ref(), "--version");
    let said = text(&output.stdout);
    let mut numbers = said.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.find_map(|word| word.parse().ok()).unwrap();
    (number(), number())
}
