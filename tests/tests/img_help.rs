//! What a newcomer has of `cowshed img`: the help. Each command shows how it is called, and all of that
//! runs.

#![allow(clippy::unwrap_used)] // A test fails by panicking.
use std::path::Path;
use std::process::Command;

use cowshed_tests::cowshed::binary;
use tempfile::TempDir;

fn help(words: &[&str]) -> String {
    let output = Command::new(binary()).args(words).arg("--help").output();
    let output = output.unwrap();
    assert!(output.status.success(), "{words:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The commands that `cowshed img --help` lists.
fn commands() -> Vec<String> {
    let help = help(&["img"]);
    let (_, list) = help.split_once("\nCommands:\n").unwrap();
    let (list, _) = list.split_once("\n\n").unwrap();
    let names = list.lines().filter(|line| !line.starts_with("   "));
    let names = names.map(|line| line.split_whitespace().next().unwrap().to_owned());
    names.filter(|name| name != "help").collect()
}

/// The examples of a help text, each with the lines that go on with it.
fn examples(help: &str) -> Vec<String> {
    let (_, examples) = help.split_once("\nExamples:\n").expect("examples");
    let mut found: Vec<String> = Vec::new();
    for line in examples.lines() {
        if let Some(line) = line
            .strip_prefix("  ")
            .filter(|line| line.starts_with("cowshed "))
        {
            // What is said of it stands to its right.
            let words = line.split("   ").next().unwrap();
            found.push(words.to_owned());
        } else if let Some(line) = line.strip_prefix("    ") {
            let last = found.last_mut().unwrap();
            *last = format!("{}{line}", last.strip_suffix('\\').unwrap());
        }
    }
    found
}

/// Runs a script in a folder with the disks that the examples name.
fn walk(folder: &Path, script: &str) {
    let script = format!(
        "set -eu
        cowshed() {{ \"$COWSHED\" \"$@\"; }}
        rm -rf ./*
        head -c 2M /dev/urandom > disk.raw
        truncate -s 4M disk.raw
        printf moo > password
        printf moo > old
        printf new > new
        cowshed img convert -f raw -O qcow2 disk.raw base.qcow2
        cp base.qcow2 newer.qcow2
        cp base.qcow2 moved.qcow2
        cp base.qcow2 disk.qcow2
        cp base.qcow2 small.qcow2
        cowshed img snapshot -c before disk.qcow2
        cowshed img snapshot -c before-upgrade disk.qcow2
        cowshed img create -q -f qcow2 -o compat=0.10 old.qcow2 4M
        cowshed img create -q -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
        cowshed img create -q -f qcow2 -b base.qcow2 -F qcow2 middle.qcow2
        cowshed img create -q -f qcow2 -b middle.qcow2 -F qcow2 top.qcow2
        cowshed img create -q -f qcow2 --object secret,id=k,file=password \
            -o encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10 secret.qcow2 4M
        {script}"
    );
    let output = Command::new("sh")
        .args(["-c", &script])
        .env("COWSHED", binary())
        .current_dir(folder)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {said}");
}

#[test]
fn every_example_runs() {
    let folder = TempDir::new().unwrap();
    let mut count = 0;
    for name in std::iter::once(None).chain(commands().into_iter().map(Some)) {
        let words: Vec<&str> = ["img"].into_iter().chain(name.as_deref()).collect();
        let examples = examples(&help(&words));
        assert!(!examples.is_empty(), "{words:?}");
        for example in examples {
            // Whatever a disk needs first so that the example makes sense of it.
            let before = match example.as_str() {
                words if words.contains("encrypt.key-secret=old") => {
                    "rm disk.qcow2
                    cowshed img create -q -f qcow2 --object secret,id=k,file=old \
                        -o encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10 disk.qcow2 4M"
                }
                words if words.contains("backing.encrypt.key-secret") => {
                    "rm top.qcow2
                    cowshed img create -q -f qcow2 -u -b secret.qcow2 -F qcow2 top.qcow2 4M"
                }
                words if words.contains("since-monday") && !words.contains("--add") => {
                    "cowshed img bitmap --add disk.qcow2 since-monday
                    cowshed img bitmap --add disk.qcow2 all"
                }
                words if words.contains("resize --shrink") => {
                    "cowshed img snapshot -d before disk.qcow2
                    cowshed img snapshot -d before-upgrade disk.qcow2
                    cowshed img resize -q disk.qcow2 40G"
                }
                words if words.contains(" snapshot -c") => {
                    "cowshed img snapshot -d before disk.qcow2
                    cowshed img snapshot -d before-upgrade disk.qcow2"
                }
                words if words.contains("-s 1G") => "cowshed img resize -q disk.qcow2 4G",
                _ => "",
            };
            walk(folder.path(), &format!("{before}\n{example}"));
            count += 1;
        }
    }
    assert!(count > 30, "{count}");
}

/// What a person does with disks, in the words of the help.
#[test]
fn a_walk_through_the_help() {
    let folder = TempDir::new().unwrap();
    let from_help = help(&["img"]);
    let walked = "\
        img create -f qcow2 disk.qcow2 20G
        img create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
        img info overlay.qcow2
        img resize disk.qcow2 +10G
        img snapshot -c before disk.qcow2
        img snapshot -a before disk.qcow2
        img convert -O qcow2 -c overlay.qcow2 small.qcow2
        img commit overlay.qcow2
        img rebase -b '' overlay.qcow2
        img check disk.qcow2";
    for line in walked.lines() {
        assert!(from_help.contains(line.trim()), "{line}");
    }
    walk(
        folder.path(),
        "rm disk.qcow2 overlay.qcow2
        says() { wanted=$1; shift; cowshed \"$@\" > said; grep -q \"$wanted\" said || { cat said; exit 1; }; }
        cowshed img create -f qcow2 disk.qcow2 20G
        says '20.00 GiB' img info disk.qcow2
        cowshed img create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
        says 'backing file.*base.qcow2' img info overlay.qcow2
        qemu-io -f qcow2 -c 'write -P 7 0 64k' overlay.qcow2 > /dev/null
        cowshed img resize disk.qcow2 +10G
        says '30.00 GiB' img info disk.qcow2
        cowshed img snapshot -c before disk.qcow2
        qemu-io -f qcow2 -c 'write -P 9 0 64k' disk.qcow2 > /dev/null
        says before img snapshot disk.qcow2
        cowshed img snapshot -a before disk.qcow2
        qemu-io -f qcow2 -c 'read -P 0 0 64k' disk.qcow2 > said
        if grep failed said; then exit 1; fi
        cowshed img convert -O qcow2 -c overlay.qcow2 small.qcow2
        cowshed img compare overlay.qcow2 small.qcow2
        cowshed img convert -O raw overlay.qcow2 flat.raw
        cowshed img compare -f raw -F qcow2 flat.raw overlay.qcow2
        cowshed img commit overlay.qcow2
        cowshed img compare -f raw -F qcow2 flat.raw base.qcow2
        mkdir elsewhere
        mv base.qcow2 elsewhere
        cowshed img rebase -u -b elsewhere/base.qcow2 -F qcow2 overlay.qcow2
        cowshed img compare -f raw -F qcow2 flat.raw overlay.qcow2
        cowshed img rebase -b '' overlay.qcow2
        rm -r elsewhere
        cowshed img compare -f raw -F qcow2 flat.raw overlay.qcow2
        cowshed img check overlay.qcow2
        cowshed img check disk.qcow2",
    );
}

/// What a newcomer gets wrong is answered with what to write instead.
#[test]
fn errors_say_what_to_write() {
    let folder = TempDir::new().unwrap();
    let tell = |words: &str, advice: &str| {
        walk(
            folder.path(),
            &format!(
                "if cowshed img {words} > /dev/null 2> said; then exit 1; fi
                grep -q -e '{advice}' said || {{ cat said >&2; exit 1; }}"
            ),
        );
    };
    tell("info disk.raw", "-f raw");
    tell("convert disk.raw out.qcow2", "-f raw");
    tell("convert -f raw disk.raw", "target");
    tell("convert -O qcow2 base.qcow2", "target");
    tell("convert -c -f raw -O raw disk.raw out", "-O qcow2");
    tell("create -f qcow2 new.qcow2", "size");
    tell("create -f qcow2 -b base.qcow2 new.qcow2", "-F");
    tell("create -f qcow2 new.qcow2 20GB", "k, M, G");
    tell(
        "create -f qcow2 -b nowhere.qcow2 -F qcow2 new.qcow2",
        "nowhere.qcow2",
    );
    tell("create -f qcow2 -o cluster_sise=4k new.qcow2 1G", "-o help");
    tell("resize disk.qcow2 1M", "--shrink");
    tell("snapshot -a nothing disk.qcow2", "nothing");
    tell("rebase -b newer.qcow2 overlay.qcow2", "-F");
    tell("commit base.qcow2", "backing file");
    tell("convert -O raw secret.qcow2 out", "--object");
    tell("convert -O vmdk base.qcow2 out", "qemu-img");
    tell("create -f luks new 1G", "encrypt.format=luks");
    tell("dd if=disk.raw of=out", "convert");
    tell("bench disk.qcow2", "qemu-img");
    tell("info nowhere", "nowhere");
    tell("snapshot disk.raw", "-f raw");
    tell("info nbd://host/disk", "nbd: is none");
    tell("convert -O qcow2 json:{} out.qcow2", "json: is none");
    tell(
        "convert -f raw -O raw disk.raw ssh://host/out",
        "ssh: is none",
    );
    // The header extension with the format is one that nobody knows.
    tell(
        "create -q -f qcow2 -b base.qcow2 -F qcow2 unsaid.qcow2 && \
         LC_ALL=C sed -i 's/\\xe2y\\*\\xca/none/' unsaid.qcow2 && \
         cowshed img convert -O qcow2 unsaid.qcow2 out",
        "not recorded",
    );
    let devices = std::fs::read_dir("/sys/block").unwrap();
    let names = devices.map(|device| device.unwrap().file_name());
    let device = names
        .map(|name| Path::new("/dev").join(name))
        .find(|path| path.exists());
    match device {
        Some(device) => {
            let device = device.display();
            tell(&format!("info -f raw {device}"), "block device");
            tell(
                &format!("convert -f raw -O raw disk.raw {device}"),
                "block device",
            );
        }
        None => eprintln!("skipped: no block device here"),
    }
}
