//! Encrypted images, ours and QEMU's.

use std::path::Path;
use std::process::Command;

use cowshed_qcow::{
    CreateOptions, Format, Image, KeyCost, NewEncryption, OpenOptions, Secret, create,
};

use super::check::check;
use super::model::{Ops, content, mirror, perform};
use super::{Files, Random, new_file, run};

pub const SIZE: u64 = 1 << 20;

pub fn secret(text: &str) -> Secret {
    Secret::new(text.into())
}

pub fn options(passwords: &[&str]) -> OpenOptions {
    OpenOptions {
        secrets: passwords.iter().map(|text| secret(text)).collect(),
        cache_bytes: 32 << 10,
        ..OpenOptions::new(Format::Qcow2)
    }
}

pub fn luks(password: &str) -> Option<NewEncryption> {
    Some(NewEncryption::Luks {
        secret: secret(password),
        cost: KeyCost::Iterations(1),
    })
}

pub fn open(path: &Path, passwords: &[&str]) -> cowshed_qcow::Result<Image> {
    Image::open(path, &options(passwords), &Files::default())
}

pub fn make(path: &Path, options: &CreateOptions) {
    create(path, new_file(path), options).unwrap();
}

/// An image with the passwords of its chain, as QEMU is told of it.
pub struct Qemu<'a> {
    pub folder: &'a Path,
    pub name: &'a str,
    pub passwords: &'a [&'a str],
}

impl Qemu<'_> {
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        let mut image = format!("driver=qcow2,file.filename={}", self.name);
        for (i, password) in self.passwords.iter().enumerate() {
            arguments.extend(["--object".into(), format!("secret,id=s{i},data={password}")]);
            let backing = "backing.".repeat(i);
            image += &format!(",{backing}encrypt.key-secret=s{i}");
        }
        arguments.extend(["--image-opts".into(), image]);
        arguments
    }

    pub fn run(&self, tool: &str, before: &[&str], after: &[&str]) -> String {
        let between = self.arguments();
        let all = before.iter().copied();
        let all: Vec<&str> = all
            .chain(between.iter().map(|a| &**a))
            .chain(after.iter().copied())
            .collect();
        run(self.folder, tool, &all)
    }

    pub fn content(&self) -> Vec<u8> {
        let name = format!("{}.raw", self.name);
        self.run("qemu-img", &["convert", "-O", "raw"], &[&name]);
        let content = std::fs::read(self.folder.join(&name)).unwrap();
        std::fs::remove_file(self.folder.join(&name)).unwrap();
        content
    }

    pub fn io(&self, commands: &[String]) {
        let mut before = Vec::new();
        for command in commands {
            before.extend(["-c", command]);
        }
        let said = self.run("qemu-io", &before, &[]);
        assert!(
            !said.contains("failed") && !said.contains("rror"),
            "{commands:?}: {said}"
        );
    }

    /// Both checkers find nothing.
    pub fn assert_clean(&self) {
        let report = check(&std::fs::read(self.folder.join(self.name)).unwrap());
        assert!(
            report.corruptions.is_empty(),
            "{}: {:?}",
            self.name,
            report.corruptions
        );
        assert!(
            report.leaks.is_empty(),
            "{}: leaks {:?}",
            self.name,
            report.leaks
        );
        self.run("qemu-img", &["check", "-q"], &[]);
    }
}

/// `qemu-img create` with the password `moo`. It measures how fast it is, and fails when that took
/// no measurable time.
pub fn qemu_create(folder: &Path, name: &str, options: &str) {
    let options = format!("{options},encrypt.key-secret=s0");
    let args = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        "secret,id=s0,data=moo",
        "-o",
        &options,
    ];
    for _ in 0..50 {
        let mut command = Command::new("qemu-img");
        command.args(args).args([name, "1M"]).current_dir(folder);
        let output = command.output().unwrap();
        if output.status.success() {
            return;
        }
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("accurate CPU usage"), "{options}: {said}");
    }
    panic!("qemu-img cannot measure how fast it is");
}

pub fn scribble(seed: u64) -> Vec<String> {
    let mut random = Random(seed);
    (0..12)
        .map(|i| {
            let offset = random.below(SIZE / 512 - 300) * 512;
            let len = (1 + random.below(300)) * 512;
            match i {
                5 => format!("write -z {offset} {len}"),
                _ => format!("write -P {} {offset} {len}", 1 + random.below(255)),
            }
        })
        .collect()
}

/// Requests to an image and to a vector; then QEMU must read the same, and find nothing wrong.
pub fn exercise(qemu: &Qemu<'_>, seed: u64, count: usize) {
    let path = qemu.folder.join(qemu.name);
    let image = open(&path, qemu.passwords).unwrap();
    let mut model = content(&image);
    let mut ops = Ops::new(seed, image.size(), image.cluster_size().into());
    for i in 0..count {
        if i % 3 == 0 {
            write_bytes(&image, &mut model, &mut ops.random);
        }
        let op = ops.next();
        perform(&image, &op).unwrap_or_else(|error| panic!("{}: {error:?}", qemu.name));
        mirror(&mut model, &image, &op);
        assert!(
            i % 16 > 0 || content(&image) == model,
            "{}: after {i} requests",
            qemu.name
        );
    }
    assert!(content(&image) == model, "{}", qemu.name);
    drop(image);
    assert!(
        content(&open(&path, qemu.passwords).unwrap()) == model,
        "{}: again",
        qemu.name
    );
    qemu.assert_clean();
    assert!(
        qemu.content() == model,
        "{}: QEMU reads something else",
        qemu.name
    );
}

/// Writes from any byte to any byte, and reads them back from around there.
pub fn write_bytes(image: &Image, model: &mut [u8], random: &mut Random) {
    let offset = random.below(image.size() - 1);
    let most = [3, 700, 70_000][random.below(3) as usize].min(image.size() - offset);
    let data = vec![random.next() as u8; 1 + random.below(most) as usize];
    image.write(offset, &data).unwrap();
    model[offset as usize..][..data.len()].copy_from_slice(&data);
    let start = offset.saturating_sub(random.below(600));
    let mut around = vec![0xee; (offset - start) as usize + data.len()];
    image.read(start, &mut around).unwrap();
    assert!(
        around == model[start as usize..][..around.len()],
        "bytes from {start:#x}"
    );
}

pub fn new_luks(password: &str) -> CreateOptions {
    CreateOptions {
        encryption: luks(password),
        ..CreateOptions::new(SIZE)
    }
}
