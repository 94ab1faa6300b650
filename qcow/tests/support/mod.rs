//! What the suites share: QEMU's tools, and an opener for plain files.
// Each suite uses a part, and what fails here fails the test.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod bitmaps;
pub mod check;
pub mod crash;
pub mod damage;
pub mod encryption;
pub mod lab;
pub mod model;
pub mod storages;

use std::fs::OpenOptions as FileOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use cowshed_qcow::{
    AmendOptions, CreateOptions, DataFile, FileStorage, Format, Image, MemoryStorage, OpenOptions,
    Opener, Storage, create,
};

/// Opens files, locks nothing, and remembers what was opened for writing.
#[derive(Default)]
pub struct Files {
    pub written: Mutex<Vec<PathBuf>>,
}

impl Opener for Files {
    fn open(&self, path: &Path, writable: bool) -> io::Result<Arc<dyn Storage>> {
        if writable {
            self.written.lock().unwrap().push(path.to_owned());
        }
        let file = FileOptions::new().read(true).write(writable).open(path)?;
        Ok(Arc::new(FileStorage::new(file)))
    }
}

/// A cache of so many bytes: with a few slices tables come and go.
pub fn cached(cache_bytes: usize) -> OpenOptions {
    OpenOptions {
        cache_bytes,
        ..OpenOptions::new(Format::Qcow2)
    }
}

pub fn open_file(path: &Path, options: &OpenOptions) -> Image {
    Image::open(path, options, &Files::default()).unwrap()
}

/// A raw disk that is only read: a base.
pub fn base(bytes: Vec<u8>) -> Image {
    let raw = OpenOptions {
        read_only: true,
        ..OpenOptions::new(Format::Raw)
    };
    let storage = Arc::new(MemoryStorage::new(bytes));
    Image::open_over(Path::new("base"), storage, &raw, None).unwrap()
}

/// A base whose bytes tell their sector.
pub fn striped_base(len: usize) -> Image {
    base((0..len).map(|i| 0x80 | (i / 512) as u8).collect())
}

/// Whether QEMU's tools are here; says so if they are not.
pub fn have_qemu() -> bool {
    let there = |tool| Command::new(tool).arg("--version").output().is_ok();
    let have = there("qemu-img") && there("qemu-io");
    if !have {
        eprintln!("skipped: qemu-img and qemu-io are not installed (Debian: qemu-utils)");
    }
    have
}

/// Runs a tool in a folder and returns its standard output; panics with its messages if it fails.
pub fn run(folder: &Path, tool: &str, args: &[&str]) -> String {
    let output = Command::new(tool)
        .args(args)
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{tool} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn qemu_img(folder: &Path, args: &[&str]) -> String {
    run(folder, "qemu-img", args)
}

/// QEMU's new qcow2 image, with `-o options`.
pub fn qemu_create(folder: &Path, options: &str, name: &str, size: &str) {
    let create = ["create", "-q", "-f", "qcow2", "-o", options, name, size];
    qemu_img(folder, &create);
}

/// Runs qemu-io commands on an image. qemu-io reports a failed command on its output only.
pub fn qemu_io(folder: &Path, image: &str, commands: &[String]) {
    let mut args = vec!["-f", "qcow2"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(image);
    let said = run(folder, "qemu-io", &args);
    assert!(
        !said.contains("failed") && !said.contains("error"),
        "{args:?}: {said}"
    );
}

/// What QEMU says the disk's content is.
pub fn qemu_content(folder: &Path, image: &str, format: &str) -> Vec<u8> {
    qemu_img(
        folder,
        &["convert", "-f", format, "-O", "raw", image, "content.raw"],
    );
    let content = std::fs::read(folder.join("content.raw")).unwrap();
    std::fs::remove_file(folder.join("content.raw")).unwrap();
    content
}

/// A new file, which must not be there yet.
pub fn new_file(path: &Path) -> Arc<FileStorage> {
    let options = FileOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .clone();
    Arc::new(FileStorage::new(options.open(path).unwrap()))
}

/// A new image in a new file.
pub fn make(folder: &Path, name: &str, options: &CreateOptions) {
    let path = folder.join(name);
    create(&path, new_file(&path), options).unwrap();
}

/// Makes `name` with the data file `name.data`.
pub fn make_with_data(folder: &Path, name: &str, raw: bool, options: CreateOptions) {
    let data = format!("{name}.data");
    let storage = new_file(&folder.join(&data));
    let data_file = Some(DataFile {
        name: data,
        raw,
        storage,
    });
    let options = CreateOptions {
        data_file,
        ..options
    };
    make(folder, name, &options);
}

/// A small, seeded generator: the suites' choices are the same in each run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}

/// Another version, and nothing else.
pub fn to_version(version: u32) -> AmendOptions {
    AmendOptions {
        version: Some(version),
        ..AmendOptions::default()
    }
}

/// Another refcount width, and nothing else.
pub fn to_bits(bits: u32) -> AmendOptions {
    AmendOptions {
        refcount_bits: Some(bits),
        ..AmendOptions::default()
    }
}
