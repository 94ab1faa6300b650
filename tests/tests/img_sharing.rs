//! Several at one image: readers share it, a writer has it alone, and who is refused is told why.

#![allow(clippy::unwrap_used)] // A test fails by panicking.
use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use cowshed_tests::cowshed::{Cowshed, binary};
use cowshed_tests::skip::kvm_is_here;
use cowshed_tests::{guest, process};
use tempfile::TempDir;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn img(folder: &Path, words: &str) -> Command {
    let mut command = Command::new(binary());
    command
        .arg("img")
        .args(words.split(' '))
        .current_dir(folder);
    command
}

fn run(folder: &Path, words: &str) -> Output {
    img(folder, words).output().unwrap()
}

fn ok(folder: &Path, words: &str) {
    let output = run(folder, words);
    let said = text(&output.stderr);
    assert!(output.status.success(), "{words}: {said}");
}

/// The words are refused with 1 (compare: 2) and a line that names the image, the holder, and what to do.
fn refused(folder: &Path, words: &str, image: &str, holder: &str) {
    let output = run(folder, words);
    let said = text(&output.stderr);
    let status = if words.starts_with("compare") { 2 } else { 1 };
    assert_eq!(output.status.code(), Some(status), "{words}: {said}");
    for part in [image, "another process", holder] {
        assert!(said.contains(part), "{words}: no {part:?}: {said}");
    }
    let advice = ["wait for that to end", "end that first"];
    assert!(
        advice.iter().any(|words| said.contains(words)),
        "{words}: {said}"
    );
}

/// `cowshed img` at work on its image, which takes minutes; ended when dropped.
struct Holder(Child);

impl Holder {
    /// `words` ask for progress, of which the first word says that all is open.
    fn start(folder: &Path, words: &str) -> Self {
        let mut command = img(folder, words);
        let child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut holder = Holder(child);
        let mut first = [0; 1];
        holder
            .0
            .stderr
            .as_mut()
            .unwrap()
            .read_exact(&mut first)
            .unwrap();
        holder
    }

    fn name(&self) -> String {
        format!("cowshed {}", self.0.id())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        process::kill(&mut self.0);
    }
}

/// A disk of 8 MiB, an overlay over it, and what else the commands need.
fn folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    let at = folder.path();
    fs::write(at.join("raw"), vec![5; 8 << 20]).unwrap();
    ok(at, "convert -f raw -O qcow2 raw disk");
    ok(at, "snapshot -c one disk");
    ok(at, "create -q -f qcow2 -b disk -F qcow2 over");
    ok(at, "create -q -f qcow2 -b disk -F qcow2 other");
    folder
}

/// Each reads `disk`.
const READERS: [&str; 10] = [
    "info disk",
    "info --backing-chain over",
    "check disk",
    "map disk",
    "map over",
    "measure -O qcow2 disk",
    "compare disk over",
    "snapshot -l disk",
    "convert -O raw disk copy",
    "create -q -f qcow2 -b disk -F qcow2 third",
];

/// Each writes `disk`.
const WRITERS: [&str; 12] = [
    "resize disk 9M",
    "snapshot -c two disk",
    "snapshot -a one disk",
    "snapshot -d one disk",
    "bitmap --add disk bits",
    "amend -o lazy_refcounts=on disk",
    "check -r all disk",
    "rebase -u -b  disk",
    "commit over",
    "convert -n -f raw -O qcow2 raw disk",
    "convert -f raw -O qcow2 raw disk",
    "create -f qcow2 disk 1M",
];

#[test]
fn readers_share_and_keep_writers_out() {
    let folder = folder();
    let folder = folder.path();
    let before = fs::read(folder.join("disk")).unwrap();
    let holder = Holder::start(folder, "convert -p -r 4k -O raw disk slow");
    for words in READERS {
        ok(folder, words);
    }
    for words in WRITERS {
        refused(folder, words, "disk", &holder.name());
    }
    // Looking nevertheless is no writing nevertheless.
    refused(folder, "resize -U disk 9M", "disk", &holder.name());
    // An overlay is written while others read its base.
    ok(folder, "resize -q over 9M");
    ok(folder, "rebase -b  other");
    drop(holder);
    assert!(fs::read(folder.join("disk")).unwrap() == before);
    ok(folder, "resize -q disk 9M");
}

#[test]
fn a_writer_is_alone() {
    let folder = folder();
    let folder = folder.path();
    let holder = Holder::start(folder, "convert -p -r 4k -n -f raw -O qcow2 raw disk");
    for words in READERS.iter().chain(&WRITERS) {
        refused(folder, words, "disk", &holder.name());
    }
    let said = text(&run(folder, "info disk").stderr);
    assert!(said.contains("-U"), "{said}");
    for words in READERS {
        let output = run(folder, &format!("{words} -U"));
        // What is being written may not make sense just now, but it is not refused.
        let said = text(&output.stderr);
        assert!(!said.contains("another process"), "{words}: {said}");
    }
    drop(holder);
    ok(folder, "check -q disk");
    ok(folder, "convert -n -f raw -O qcow2 raw disk");
    ok(folder, "compare -f raw -F qcow2 raw disk");
}

/// A commit holds the overlay and the base.
#[test]
fn a_commit_holds_both() {
    let folder = folder();
    let folder = folder.path();
    ok(folder, "convert -n -f raw -O qcow2 raw over");
    let holder = Holder::start(folder, "commit -p -r 4k over");
    for (words, image) in [
        ("commit over", "over"),
        ("commit other", "disk"),
        ("snapshot -c two over", "over"),
        ("info over", "over"),
        ("info disk", "disk"),
        ("map other", "disk"),
        ("resize disk 9M", "disk"),
    ] {
        refused(folder, words, image, &holder.name());
    }
    drop(holder);
    ok(folder, "commit -q over");
    ok(folder, "compare -f raw -F qcow2 raw disk");
}

#[test]
fn a_command_that_names_an_image_twice_is_refused() {
    let folder = folder();
    let folder = folder.path();
    let before = fs::read(folder.join("disk")).unwrap();
    for words in [
        "convert -n -O qcow2 disk disk",
        "convert -O qcow2 disk disk",
        "rebase -b disk -F qcow2 disk",
    ] {
        let output = run(folder, words);
        assert_eq!(output.status.code(), Some(1), "{words}");
        assert!(text(&output.stderr).contains("disk"), "{words}");
        assert!(fs::read(folder.join("disk")).unwrap() == before, "{words}");
    }
}

/// What is to be replaced in the end is not written meanwhile: that would be lost.
#[test]
fn a_target_is_locked_until_it_is_replaced() {
    let folder = folder();
    let folder = folder.path();
    fs::rename(folder.join("raw"), folder.join("source")).unwrap();
    ok(folder, "create -q -f qcow2 -o data_file=data split 8M");
    for (words, image) in [
        ("convert -p -r 4k -f raw -O qcow2 source over", "over"),
        (
            "convert -p -r 4k -f raw -O qcow2 -o data_file=data source new",
            "data",
        ),
    ] {
        let holder = Holder::start(folder, words);
        let writers: &[&str] = match image {
            "over" => &[
                "snapshot -c two over",
                "map over",
                "convert -f raw -O raw source over",
            ],
            _ => &["resize -f raw data 9M", "map split"],
        };
        for words in writers {
            refused(folder, words, image, &holder.name());
        }
    }
}

/// A file that came to the target's path while it was made is somebody's.
#[test]
fn what_comes_in_the_way_is_not_replaced() {
    let folder = folder();
    let folder = folder.path();
    fs::write(folder.join("theirs"), "theirs").unwrap();
    for name in ["new", "other"] {
        let words = format!("convert -p -r 4M -f raw -O qcow2 raw {name}");
        let mut holder = Holder::start(folder, &words);
        fs::copy(folder.join("theirs"), folder.join("copy")).unwrap();
        fs::rename(folder.join("copy"), folder.join(name)).unwrap();
        let status = process::wait(&mut holder.0, Duration::from_secs(60)).expect("it ends");
        assert_eq!(status.code(), Some(1));
        let mut said = String::new();
        holder
            .0
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        assert!(
            said.contains(name) && said.contains("run this again"),
            "{said}"
        );
        assert_eq!(fs::read(folder.join(name)).unwrap(), b"theirs");
    }
}

/// A machine writes its overlay and reads its base.
#[test]
fn a_machine_holds_its_disks() {
    if !kvm_is_here() {
        return;
    }
    let folder = folder();
    let folder = folder.path();
    let kernel = guest::builder().metal("soak").expect("build the guest");
    // The guest knows what it finds there.
    ok(folder, "create -q -f qcow2 empty 8M");
    ok(folder, "create -q -f qcow2 -b empty -F qcow2 work");
    let over = folder.join("work");
    let words = "soak seed=1 blocks=1024 queues=1 steps=4000000000";
    let run_of = |disk: String| {
        Cowshed::run()
            .option("--kernel", &kernel)
            .option("--cmdline", words)
            .option("--disk", disk)
    };
    let before = fs::metadata(&over).unwrap().len();
    let machine = run_of(format!("{},overlay=none", over.display())).spawn();
    // What the guest writes makes it grow.
    process::until("the guest writes", Duration::from_secs(60), || {
        (fs::metadata(&over).unwrap().len() > before).then_some(())
    });
    for words in [
        "info work",
        "check work",
        "snapshot -c a work",
        "resize work 9M",
        "commit work",
    ] {
        refused(folder, words, "work", "cowshed ");
    }
    for words in [
        "resize empty 9M",
        "check -r all empty",
        "snapshot -c two empty",
    ] {
        refused(folder, words, "empty", "cowshed ");
    }
    for words in [
        "info -U work",
        "map -U work",
        "info empty",
        "check empty",
        "convert -O raw empty copy",
    ] {
        ok(folder, words);
    }
    // Nor does a second machine get it.
    let second = run_of(format!("{},overlay=none", over.display())).output();
    assert!(
        second.stderr().contains("another process"),
        "{}",
        second.stderr()
    );
    machine.signal(rustix::process::Signal::KILL);
    machine.wait();
    cowshed_tests::image::until_free(&over);
    ok(folder, "check -q -r leaks work");
    // A holder that reads keeps a machine from writing.
    let holder = Holder::start(folder, "convert -p -r 4k -O raw disk slow");
    let refused = run_of(format!("{},overlay=none", folder.join("disk").display())).output();
    let said = refused.stderr();
    assert!(said.contains(&holder.name()), "{said}");
}
