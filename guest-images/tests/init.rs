//! PID 1, booted for real, in QEMU without KVM: the kernel is the small one, which is built on
//! first use.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

mod qemu;
mod tool;

use std::convert::Infallible;
use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;

use cowshed_guest_images::Kernel;
use cowshed_guest_protocol::files::{Receiver, send_tree};
use cowshed_guest_protocol::{Failure, FromGuest, Item, Stamp, Start, ToGuest, VERSION};
use qemu::{Guest, kernel_and_disk};
use tempfile::TempDir;
use tool::tool;

fn started(argv: &[&'static str], env: &[&'static str], cwd: &'static str) -> Guest {
    let (kernel, disk) = kernel_and_disk();
    let mut guest = Guest::boot(&kernel, Some(&disk), "root=/dev/vda");
    guest.hear(|said| assert_eq!(said, FromGuest::Hello { version: VERSION }));
    guest.tell(&ToGuest::Start(Start {
        argv: argv.iter().map(|word| word.as_bytes()).collect(),
        env: env.iter().map(|word| word.as_bytes()).collect(),
        cwd: cwd.as_bytes(),
    }));
    guest
}

fn read(stream: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_command_has_its_streams_environment_folder_and_status() {
    let script = "cat; echo $COLOUR $HOME $PWD >/dev/stderr; exit 3";
    let mut guest = started(&["sh", "-c", script], &["COLOUR=dun", "HOME=/tmp"], "/etc");
    guest.hear(|said| assert_eq!(said, FromGuest::Started));
    let sent: Vec<u8> = (0..200_000u32).map(|number| (number % 251) as u8).collect();
    let mut stdin = &guest.stdin;
    let mut stdout = guest.stdout.try_clone().unwrap();
    let received = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut bytes = vec![0; sent.len()];
            stdout.read_exact(&mut bytes).unwrap();
            bytes
        });
        stdin.write_all(&sent).unwrap();
        // Closed, QEMU would drop what it has not read.
        stdin.shutdown(Shutdown::Write).unwrap();
        reader.join().unwrap()
    });
    assert!(received == sent);
    guest.hear(|said| assert_eq!(said, FromGuest::Exited { code: 3 }));
    assert_eq!(read(&mut guest.stdout), b"");
    assert_eq!(read(&mut guest.stderr), b"dun /tmp /etc\n");
    guest.end();
}

#[test]
fn a_signal_is_forwarded_and_its_end_reported() {
    let mut guest = started(&["sh", "-c", "echo up; sleep 1000"], &[], "");
    guest.hear(|said| assert_eq!(said, FromGuest::Started));
    let mut up = [0; 3];
    guest.stdout.read_exact(&mut up).unwrap();
    guest.tell(&ToGuest::Signal { number: 15 });
    guest.hear(|said| assert_eq!(said, FromGuest::Signaled { number: 15 }));
    guest.end();
}

#[test]
fn a_command_that_is_not_there_is_an_error_of_its_own() {
    for (command, failure) in [
        ("no-such-command", Failure::NotFound),
        ("/etc/passwd", Failure::NotExecutable),
    ] {
        let mut guest = started(&[command], &[], "");
        guest.hear(|said| match said {
            FromGuest::Error { failure: found, .. } => assert_eq!(found, failure),
            other => panic!("{other:?}"),
        });
        guest.end();
    }
}

#[test]
fn streams_can_be_opened_again_and_the_devices_are_there() {
    let script = "echo out >/dev/stdout; echo err >/dev/stderr; cat /dev/stdin; \
        ls -d /dev/null /proc/1 /sys/class /dev/pts/ptmx /dev/shm /run; ping -c1 -q 127.0.0.1 \
        >/dev/null && echo loopback";
    let mut guest = started(&["sh", "-c", script], &[], "");
    guest.hear(|said| assert_eq!(said, FromGuest::Started));
    guest.stdin.write_all(b"in\n").unwrap();
    guest.stdin.shutdown(Shutdown::Write).unwrap();
    guest.hear(|said| assert_eq!(said, FromGuest::Exited { code: 0 }));
    let expected =
        "out\nin\n/dev/null\n/dev/pts/ptmx\n/dev/shm\n/proc/1\n/run\n/sys/class\nloopback\n";
    assert_eq!(
        String::from_utf8(read(&mut guest.stdout)).unwrap(),
        expected
    );
    assert_eq!(read(&mut guest.stderr), b"err\n");
    guest.end();
}

#[test]
fn what_a_command_leaves_behind_ends_with_it_and_its_output_arrives() {
    // One that SIGTERM ends, which says so, and one that it does not.
    let script = "sh -c 'trap \"echo bye; exit\" TERM; >/tmp/a; while :; do sleep 1; done' & \
        sh -c 'trap \"\" TERM; >/tmp/b; while :; do sleep 1; done' & \
        until [ -e /tmp/a ] && [ -e /tmp/b ]; do :; done";
    let mut guest = started(&["sh", "-c", script], &[], "");
    guest.hear(|said| assert_eq!(said, FromGuest::Started));
    guest.hear(|said| assert_eq!(said, FromGuest::Exited { code: 0 }));
    assert_eq!(read(&mut guest.stdout), b"bye\n");
    guest.end();
}

#[test]
fn trees_go_in_and_out() {
    let (kernel, disk) = kernel_and_disk();
    let mut guest = Guest::boot(&kernel, Some(&disk), "root=/dev/vda");
    guest.hear(|said| assert_eq!(said, FromGuest::Hello { version: VERSION }));
    let folder = TempDir::new().unwrap();
    let data: Vec<u8> = (0..100_000u32).map(|number| (number % 253) as u8).collect();
    std::fs::create_dir(folder.path().join("tree")).unwrap();
    std::fs::write(folder.path().join("tree/data"), &data).unwrap();
    guest.tell(&ToGuest::CopyIn {
        destination: b"/tmp",
        name: b"tree",
    });
    let here = File::open(folder.path()).unwrap();
    let mut sink = |item: Item<'_>| {
        guest.tell(&ToGuest::Item(item));
        Ok::<(), Infallible>(())
    };
    send_tree(here.as_fd(), b"tree", &mut sink).unwrap();
    for source in ["/tmp/tree", "/absent"] {
        guest.tell(&ToGuest::CopyOut {
            source: source.as_bytes(),
        });
    }
    let script = b"cat /tmp/tree/data >/tmp/tree/copy; mkfifo /tmp/tree/fifo";
    let argv = vec![&b"sh"[..], b"-c", script];
    guest.tell(&ToGuest::Start(Start {
        argv,
        ..Start::default()
    }));
    guest.hear(|said| assert_eq!(said, FromGuest::Started));
    let mut receiver = Receiver::new(here.into(), b"out", b"tree", u64::MAX);
    let mut skipped = false;
    while !guest.hear(|said| match said {
        FromGuest::Item(item) => {
            skipped |= item == Item::Skipped { name: b"fifo" };
            receiver.item(item).unwrap()
        }
        other => panic!("{other:?}"),
    }) {}
    assert!(skipped);
    assert!(std::fs::read(folder.path().join("out/copy")).unwrap() == data);
    guest.hear(|said| match said {
        FromGuest::Item(Item::Failed { message }) => assert!(message.contains("/absent")),
        other => panic!("{other:?}"),
    });
    guest.hear(|said| assert_eq!(said, FromGuest::Exited { code: 0 }));
    guest.end();
}

#[test]
fn a_tree_that_has_no_place_is_an_error_of_its_own() {
    let (kernel, disk) = kernel_and_disk();
    let mut guest = Guest::boot(&kernel, Some(&disk), "root=/dev/vda ro");
    guest.hear(|said| assert_eq!(said, FromGuest::Hello { version: VERSION }));
    guest.tell(&ToGuest::CopyIn {
        destination: b"/etc/hostname",
        name: b"name",
    });
    let stamp = Stamp {
        mode: 0o644,
        seconds: 0,
        nanoseconds: 0,
    };
    guest.tell(&ToGuest::Item(Item::File { name: b"", stamp }));
    guest.hear(|said| match said {
        FromGuest::Error {
            failure: Failure::CopyIn,
            message,
        } => {
            assert!(
                message.contains("cannot write /etc/hostname: read-only"),
                "{message}"
            );
        }
        other => panic!("{other:?}"),
    });
    guest.end();
}

#[test]
fn the_root_is_found_by_its_names() {
    const PARTITION: &str = "5d2fb3ba-6c1e-4b8e-9b0e-0123456789ab";
    const FILE_SYSTEM: &str = "0f3c5a7e-1b2d-4c6f-8a90-abcdef012345";
    let folder = TempDir::new().unwrap();
    let tree = folder.path().join("tree");
    std::fs::create_dir_all(tree.join("bin")).unwrap();
    std::fs::copy("/bin/busybox", tree.join("bin/busybox")).unwrap();
    let disk = folder.path().join("disk");
    File::create(&disk).unwrap().set_len(32 << 20).unwrap();
    // The first partition is larger: without a name it would be looked at before the second.
    let table = format!(
        "label: gpt\nsize=16M, name=\"data\"\nsize=8M, uuid={PARTITION}, name=\"system\"\n"
    );
    tool("fdisk", "sfdisk --quiet FILE", &disk, &table);
    let tree = tree.display();
    for (offset, size, uuid, label) in [
        ("1048576", "16M", "random", "other"),
        ("17825792", "8M", FILE_SYSTEM, "rust-root"),
    ] {
        let make =
            format!("mkfs.ext4 -q -d {tree} -U {uuid} -L {label} -E offset={offset} FILE {size}");
        tool("e2fsprogs", &make, &disk, "");
    }
    let (kernel, _) = kernel_and_disk();
    for name in [
        format!("UUID={FILE_SYSTEM}"),
        "LABEL=rust-root".to_owned(),
        format!("PARTUUID={}", PARTITION.to_uppercase()),
        "PARTLABEL=system".to_owned(),
    ] {
        let mut guest = Guest::boot(&kernel, Some(&disk), &format!("root={name}"));
        guest.hear(|said| assert_eq!(said, FromGuest::Hello { version: VERSION }));
        let script = b"/bin/busybox grep ' / ' /proc/mounts";
        let argv = vec![&b"/bin/busybox"[..], b"sh", b"-c", script];
        guest.tell(&ToGuest::Start(Start {
            argv,
            ..Start::default()
        }));
        guest.hear(|said| assert_eq!(said, FromGuest::Started));
        guest.hear(|said| assert_eq!(said, FromGuest::Exited { code: 0 }));
        let mounts = String::from_utf8(read(&mut guest.stdout)).unwrap();
        assert!(mounts.starts_with("/dev/vda2 / ext4"), "{name}: {mounts}");
        guest.end();
    }
}

#[test]
fn without_a_disk_the_command_runs_in_the_initramfs() {
    let (mut kernel, _) = kernel_and_disk();
    // The other tests boot the ELF file.
    kernel.kernel = kernel.bzimage.clone();
    let mut guest = Guest::boot(&kernel, None, "");
    guest.hear(|said| assert_eq!(said, FromGuest::Hello { version: VERSION }));
    let destination = b"/hello";
    guest.tell(&ToGuest::CopyIn {
        destination,
        name: b"",
    });
    let busybox = File::open("/bin").unwrap();
    let mut sink = |item: Item<'_>| {
        guest.tell(&ToGuest::Item(item));
        Ok::<(), Infallible>(())
    };
    send_tree(busybox.as_fd(), b"busybox", &mut sink).unwrap();
    guest.tell(&ToGuest::Start(Start {
        argv: vec![b"/hello", b"false"],
        ..Start::default()
    }));
    guest.hear(|said| assert!(matches!(said, FromGuest::Error { .. } | FromGuest::Started)));
    guest.hear(|said| assert!(matches!(said, FromGuest::Exited { .. })));
    guest.end();
}

#[test]
fn debians_kernel_has_its_modules_loaded_and_their_memory_back() {
    let (_, disk) = kernel_and_disk();
    let kernel = qemu::builder().kernel(Kernel::DebianCloud).unwrap();
    let mut guest = Guest::boot(&kernel, Some(&disk), "root=/dev/vda");
    guest.hear(|said| assert_eq!(said, FromGuest::Hello { version: VERSION }));
    let script = b"grep -c -E '^virtio_(pci|blk|console|rng) ' /proc/modules; \
        awk '/^Unevictable/ { print ($2 < 1000) }' /proc/meminfo; exit 7";
    let argv = vec![&b"sh"[..], b"-c", script];
    guest.tell(&ToGuest::Start(Start {
        argv,
        ..Start::default()
    }));
    guest.hear(|said| assert_eq!(said, FromGuest::Started));
    guest.hear(|said| assert_eq!(said, FromGuest::Exited { code: 7 }));
    assert_eq!(
        String::from_utf8(read(&mut guest.stdout)).unwrap(),
        "4\n1\n"
    );
    guest.end();
}
