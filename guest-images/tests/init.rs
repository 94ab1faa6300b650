//! PID 1, booted for real, in QEMU without KVM: the kernel is the small one, which is built on
//! first use.
#![allow(missing_docs, reason = "a test")]

mod qemu;

use std::io::{Read, Write};
use std::net::Shutdown;

use cowshed_guest_protocol::{Failure, FromGuest, Start, ToGuest, VERSION};
use qemu::{Guest, kernel_and_disk};

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
