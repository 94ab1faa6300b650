//! `cowshed img` when things go wrong: a full disk, a killed process, Ctrl-C. Nothing that was there
//! is lost, nothing half-made is left behind, and the same words run again finish the work.

#![allow(clippy::unwrap_used)] // A test fails by panicking.
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use cowshed_tests::cowshed::binary;
use cowshed_tests::{process, skip};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;

/// A disk of 3 MiB without zeros.
fn content() -> Vec<u8> {
    (0..3_u32 << 20).map(|i| (i / 5000) as u8 | 1).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs a script in a folder; `img` in it is `cowshed img`.
fn shell(program: &[&str], folder: &Path, script: &str) -> Output {
    let script = format!("set -eu\nimg() {{ \"$COWSHED\" img \"$@\"; }}\n{script}");
    let (program, words) = program.split_first().unwrap();
    Command::new(program)
        .args(words)
        .args(["sh", "-c", &script])
        .env("COWSHED", binary())
        .current_dir(folder)
        .output()
        .unwrap()
}

/// Runs a script in an empty folder where `small` has room for 2 MiB, until `room SIZE` says otherwise.
/// `fails WORDS` wants `cowshed img WORDS` to end with 1 because of that. There is no such folder for
/// who can make no namespaces.
fn with_little_room(script: &str) {
    const NAMESPACE: [&str; 2] = ["unshare", "-rm"];
    let folder = TempDir::new().unwrap();
    let probe = shell(&NAMESPACE, folder.path(), "mount -t tmpfs none .");
    if !probe.status.success() {
        skip::say(&format!("no namespaces: {}", text(&probe.stderr)));
        return;
    }
    fs::write(folder.path().join("raw"), content()).unwrap();
    let script = format!(
        "mkdir small
        mount -t tmpfs -o size=2M none small
        room() {{ mount -o remount,size=$1 small; }}
        fails() {{
            status=0
            img \"$@\" > /dev/null 2> said || status=$?
            [ $status = 1 ] || {{ echo \"$*: $status\"; exit 1; }}
            grep -q 'No space left' said || {{ cat said; exit 1; }}
            grep -q small/ said || {{ cat said; exit 1; }}
        }}
        sound() {{ for image; do qemu-img check -q $image > /dev/null || [ $? = 3 ]; done; }}
        {script}"
    );
    let output = shell(&NAMESPACE, folder.path(), &script);
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(output.status.success(), "{said}");
}

#[test]
fn without_room_there_is_no_target() {
    with_little_room(
        "for target in raw qcow2; do
            fails convert -f raw -O $target raw small/new
            fails convert -f raw -O $target -W -m 4 raw small/new
            fails create -f $target -o preallocation=full small/new 16M
        done
        fails convert -f raw -O qcow2 -o data_file=small/data raw new
        [ -z \"$(ls -A small)\" ] || { ls -A small; exit 1; }
        [ ! -e new ]
        echo old > small/old
        fails convert -f raw -O qcow2 raw small/old
        [ \"$(cat small/old)\" = old ]",
    );
}

#[test]
fn a_mount_point_is_no_target() {
    with_little_room(
        "touch small/disk
        img create -q -f qcow2 small/old 1M
        cp small/old before
        mount --bind small/old small/disk
        for words in 'create -f qcow2 small/disk 1M' 'convert -f raw -O qcow2 raw small/disk'; do
            status=0
            img $words 2> said || status=$?
            [ $status = 1 ] || { echo \"$words: $status\"; exit 1; }
            grep -q 'small/disk is a mount point' said || { cat said; exit 1; }
        done
        cmp small/old before
        [ \"$(ls -A small | tr '\\n' ' ')\" = 'disk old ' ]",
    );
}

#[test]
fn a_commit_without_room_is_run_again() {
    with_little_room(
        "img create -q -f qcow2 small/base 3M
        img convert -f raw -O qcow2 -B small/base -F qcow2 raw top
        fails commit top
        sound small/base top
        qemu-img compare -q -f raw raw top
        room 8M
        img commit -q top
        qemu-img compare -q -f raw raw small/base
        qemu-img compare -q -f raw raw top
        sound small/base top",
    );
}

#[test]
fn a_rebase_without_room_is_run_again() {
    with_little_room(
        "img create -q -f qcow2 -b ../raw -F raw small/top
        fails rebase -b '' small/top
        sound small/top
        qemu-img compare -q -f raw raw small/top
        room 8M
        img rebase -b '' small/top
        sound small/top
        rm raw.moved 2> /dev/null || mv raw raw.moved
        qemu-img compare -q -f raw raw.moved small/top",
    );
}

#[test]
fn tables_without_room_stay_as_they_were() {
    with_little_room(
        "img create -q -f qcow2 -o cluster_size=4k small/disk 1G
        qemu-io -f qcow2 -c 'write -P 7 1M 64k' small/disk > /dev/null
        cat /dev/zero > small/rest 2> /dev/null || true
        fails snapshot -c one small/disk
        fails bitmap --add -g 512 small/disk bits
        fails amend -o refcount_bits=64 small/disk
        sound small/disk
        qemu-io -f qcow2 -c 'read -P 7 1M 64k' small/disk > /dev/null
        rm small/rest
        img snapshot -c one small/disk
        img bitmap --add -g 512 small/disk bits
        sound small/disk",
    );
}

/// Runs `words` again and again, ended by a signal at each of its first calls of the kinds that change a
/// file, on what `make` makes; `holds` is true after each, and after the same words have run to their end.
fn ended_anywhere(signal: &str, words: &str, make: &str, holds: &str) {
    const TRACE: [&str; 1] = ["env"];
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    let probe = shell(&TRACE, folder, "strace -f -o /dev/null true");
    if !probe.status.success() {
        skip::say(&format!("no strace: {}", text(&probe.stderr)));
        return;
    }
    fs::write(folder.join("raw"), content()).unwrap();
    let script = format!(
        "ended=0
        for call in pwrite64 fallocate fdatasync ftruncate; do
            for n in 1 2 3 5 8 13 21 34; do
                {make}
                status=0
                env --default-signal strace -f -o /dev/null -e trace=$call -e inject=$call:signal={signal}:when=$n \
                    \"$COWSHED\" img {words} || status=$?
                if [ $status = 0 ]; then break; fi
                [ $status -gt 128 ] || {{ echo \"$call $n: $status\"; exit 1; }}
                ended=$((ended + 1))
                {{ {holds} }} || {{ echo \"$call $n: lost\"; exit 1; }}
                img {words} || {{ echo \"$call $n: not again\"; exit 1; }}
                {{ {holds} }} || {{ echo \"$call $n: lost when run again\"; exit 1; }}
            done
        done
        echo ended $ended times
        [ $ended -ge 3 ]"
    );
    let output = shell(&TRACE, folder, &script);
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(output.status.success(), "{said}");
}

const SOUND: &str =
    "for image in base top; do qemu-img check -q $image > /dev/null || [ $? = 3 ] || exit 1; done";

#[test]
fn a_killed_commit_is_run_again() {
    ended_anywhere(
        "KILL",
        "commit -q top",
        "rm -f base top
        qemu-img create -q -f qcow2 -o cluster_size=4k base 2M
        qemu-img create -q -f qcow2 -o cluster_size=4k -b base -F qcow2 top 3M
        qemu-io -f qcow2 -c 'write -P 5 0 1M' base > /dev/null
        qemu-img convert -n -f raw -O qcow2 raw top",
        &format!("{SOUND}; qemu-img compare -q -f raw raw top;"),
    );
}

#[test]
fn a_killed_rebase_is_run_again() {
    ended_anywhere(
        "KILL",
        "rebase -b other -F raw top",
        "rm -f base top
        head -c 1M raw > other
        head -c 1M /dev/zero | tr '\\0' x >> other
        qemu-img convert -f raw -O qcow2 -o cluster_size=4k raw base
        qemu-img create -q -f qcow2 -o cluster_size=4k -b base -F qcow2 top",
        &format!("{SOUND}; qemu-img compare -q -f raw raw top;"),
    );
}

/// A signal is as good as a crash: what was begun has no name yet.
#[test]
fn ctrl_c_leaves_the_source_and_no_target() {
    for (format, signal) in [("qcow2", "INT"), ("raw", "INT"), ("qcow2", "KILL")] {
        ended_anywhere(
            signal,
            &format!("convert -f raw -O {format} -o preallocation=falloc raw new"),
            "rm -f new",
            &format!(
                "[ \"$(ls -A | tr '\\n' ' ')\" = 'raw ' ] || \
                 qemu-img compare -q -f raw -F {format} raw new;"
            ),
        );
    }
}

/// Where the file system makes no files without a name, a new image has a temporary one: nobody is left
/// with that.
#[test]
fn a_signal_takes_the_temporary_name_away() {
    const CONVERT: &str = "img convert -f raw -O qcow2 -r 64k raw new";
    let (folder, beside) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let folder = folder.path();
    let log = beside.path().join("log");
    fs::write(folder.join("raw"), content()).unwrap();
    // The call that asks for one, by its number.
    let words = CONVERT.replace("-r 64k ", "");
    let find = format!(
        "strace -o {log} -e trace=open,openat \"$COWSHED\" {words}
        rm new
        call=$(grep O_TMPFILE {log} | head -n 1 | cut -d'(' -f1)
        number=$(grep \"^$call(\" {log} | grep -n O_TMPFILE | head -n 1 | cut -d: -f1)
        echo $call:error=EOPNOTSUPP:when=$number",
        log = log.display()
    );
    let found = shell(&["env"], folder, &find);
    if !found.status.success() {
        skip::say(&format!("no strace: {}", text(&found.stderr)));
        return;
    }
    let inject = format!("inject={}", text(&found.stdout).trim());
    let names = || {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    for (signal, old) in [
        (Signal::INT, None),
        (Signal::TERM, None),
        (Signal::HUP, Some("old")),
    ] {
        if let Some(old) = old {
            fs::write(folder.join("new"), old).unwrap();
        }
        let before = names();
        // Who started the tests may ignore signals.
        let mut child = Command::new("env")
            .args([
                "--default-signal",
                "strace",
                "-o",
                "/dev/null",
                "-e",
                "trace=open,openat",
                "-e",
                &inject,
            ])
            .arg(binary())
            .args(CONVERT.split(' '))
            .current_dir(folder)
            .spawn()
            .unwrap();
        let limit = Duration::from_secs(60);
        let id = process::until("a temporary name", limit, || {
            let name = names()
                .into_iter()
                .find(|name| name.starts_with(".cowshed-"))?;
            name.split('-').nth(1)?.parse().ok()
        });
        rustix::process::kill_process(Pid::from_raw(id).unwrap(), signal).unwrap();
        let status = process::wait(&mut child, limit).expect("it ends");
        assert!(!status.success(), "{signal:?}: {status}");
        assert_eq!(names(), before, "{signal:?}");
    }
    assert_eq!(fs::read(folder.join("new")).unwrap(), b"old");
}
