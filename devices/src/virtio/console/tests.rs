use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::output::LIMIT;
use super::*;
use crate::virtio::testing::{Driver, END, EVENT_IDX, WRITE};

const MULTIPORT: u64 = 1 << 1;
const CONTROL_IN: usize = 2;
const CONTROL_OUT: usize = 3;

/// The receive queue of a port; the next one transmits.
fn queue(port: usize) -> usize {
    if port == 0 { 0 } else { 2 + 2 * port }
}

/// A driver like Linux's: it keeps the control queue filled.
struct Guest {
    driver: Driver,
    handle: ConsoleHandle,
    posted: VecDeque<u64>,
}

impl Guest {
    fn new(ports: Vec<Port>) -> Self {
        let (console, handle) = Console::new(ports).unwrap();
        let driver = Driver::new(Box::new(console));
        let mut guest = Self {
            driver,
            handle,
            posted: VecDeque::new(),
        };
        guest.start();
        guest
    }

    fn start(&mut self) {
        self.driver.start(MULTIPORT | EVENT_IDX);
        self.posted.clear();
        for _ in 0..16 {
            self.post_control();
        }
        self.driver.kick(CONTROL_IN);
    }

    fn post_control(&mut self) {
        let at = self.driver.alloc(64);
        self.driver.add(CONTROL_IN, &[(at, 64, WRITE)]);
        self.posted.push_back(at);
    }

    fn say(&mut self, port: u32, event: u16, value: u16) {
        let mut message = port.to_le_bytes().to_vec();
        message.extend_from_slice(&event.to_le_bytes());
        message.extend_from_slice(&value.to_le_bytes());
        let at = self.driver.put(&message);
        self.driver.add(CONTROL_OUT, &[(at, 8, 0)]);
        self.driver.run(CONTROL_OUT, 1);
    }

    /// The next message: port, event, value and what follows.
    fn hear(&mut self) -> (u8, u8, u8, Vec<u8>) {
        let (_, len) = self.driver.next_used(CONTROL_IN);
        let at = self.posted.pop_front().unwrap();
        let bytes = self.driver.bytes(at, len as usize);
        self.post_control();
        self.driver.kick(CONTROL_IN);
        assert_eq!([bytes[1], bytes[2], bytes[3], bytes[5], bytes[7]], [0; 5]);
        (bytes[0], bytes[4], bytes[6], bytes[8..].to_vec())
    }

    /// Sets up a port and opens it, expecting that the host has it open.
    fn open(&mut self, port: u32) {
        self.say(port, 3, 1);
        while self.hear() != (port as u8, 6, 1, vec![]) {}
        self.say(port, 6, 1);
    }

    fn close(&mut self, port: u32) {
        self.say(port, 6, 0);
    }

    /// Puts data into a port's transmit queue in one chain.
    fn send(&mut self, port: usize, data: &[u8]) {
        let at = self.driver.put(data);
        self.driver
            .add(queue(port) + 1, &[(at, data.len() as u32, 0)]);
        self.driver.kick(queue(port) + 1);
    }

    /// Waits until the device has taken that many chains.
    fn sent(&mut self, port: usize, count: usize) {
        for _ in 0..count {
            self.driver.next_used(queue(port) + 1);
        }
    }

    /// Offers a buffer and waits for it to be filled.
    fn receive(&mut self, port: usize, len: usize) -> Vec<u8> {
        let at = self.driver.alloc(len);
        self.driver.add(queue(port), &[(at, len as u32, WRITE)]);
        let (_, len) = self.driver.run(queue(port), 1)[0];
        self.driver.bytes(at, len as usize)
    }
}

fn output(name: &str) -> (Port, io::PipeReader) {
    let (reader, writer) = io::pipe().unwrap();
    (
        Port {
            name: name.into(),
            output: Some(writer.into()),
            ..Port::default()
        },
        reader,
    )
}

fn input(name: &str) -> (Port, io::PipeWriter) {
    let (reader, writer) = io::pipe().unwrap();
    (
        Port {
            name: name.into(),
            input: Some(reader.into()),
            ..Port::default()
        },
        writer,
    )
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n ^ n >> 8 ^ n >> 16) as u8).collect()
}

#[test]
fn ports_are_announced_and_named() {
    let console = Port {
        name: "console".into(),
        is_console: true,
        ..Port::default()
    };
    let (out, _reader) = output("cowshed.stdout");
    let mut guest = Guest::new(vec![console, out]);
    assert_eq!(guest.driver.get::<4>(0x204), 2, "number of ports");
    guest.say(0, 0, 1);
    assert_eq!(guest.hear(), (0, 1, 0, vec![]));
    assert_eq!(guest.hear(), (1, 1, 0, vec![]));
    guest.say(1, 3, 1);
    assert_eq!(guest.hear(), (1, 7, 1, b"cowshed.stdout".to_vec()));
    assert_eq!(guest.hear(), (1, 6, 1, vec![]));
    guest.say(0, 3, 1);
    assert_eq!(guest.hear(), (0, 4, 1, vec![]));
    assert_eq!(guest.hear(), (0, 7, 1, b"console".to_vec()));
    assert_eq!(guest.hear(), (0, 6, 1, vec![]));
}

#[test]
fn output_is_binary_clean_and_complete() {
    let (out, mut reader) = output("out");
    let mut guest = Guest::new(vec![Port::default(), out]);
    guest.open(1);
    let data = pattern(3 << 20);
    let expected = data.clone();
    let reader = std::thread::spawn(move || {
        let mut seen = Vec::new();
        reader.read_to_end(&mut seen).unwrap();
        assert!(seen == expected);
    });
    for chunk in data.chunks(100_000) {
        guest.send(1, chunk);
        guest.sent(1, 1);
    }
    guest.close(1);
    reader.join().unwrap();
}

#[test]
fn a_blocked_reader_stalls_its_own_port_only() {
    let (first, mut blocked) = output("first");
    let (second, mut reader) = output("second");
    let (third, mut writer) = input("third");
    let mut guest = Guest::new(vec![Port::default(), first, second, third]);
    guest.open(1);
    guest.open(2);
    guest.open(3);
    // More than the buffer, a pipe and the writer's hands hold.
    let data = pattern(LIMIT + (256 << 10));
    guest.send(1, &data);
    for round in 0..100_u8 {
        guest.send(2, &[round; 100]);
        guest.sent(2, 1);
        let mut seen = [0; 100];
        reader.read_exact(&mut seen).unwrap();
        assert_eq!(seen, [round; 100]);
        writer.write_all(&[round]).unwrap();
        assert_eq!(guest.receive(3, 16), [round]);
    }
    assert_eq!(guest.driver.used(queue(1) + 1), 0);
    assert!(!guest.handle.drain(Some(Duration::ZERO)));
    let mut seen = vec![0; data.len()];
    blocked.read_exact(&mut seen).unwrap();
    assert!(seen == data);
    guest.sent(1, 1);
    assert!(guest.handle.drain(None));
}

#[test]
fn drain_waits_for_what_is_in_the_queue() {
    let (out, mut reader) = output("out");
    let mut guest = Guest::new(vec![Port::default(), out]);
    guest.open(1);
    for round in 0..50_usize {
        let data = pattern(1 + round * 977);
        // Nobody rings: the driver may not have come to that yet.
        let at = guest.driver.put(&data);
        guest
            .driver
            .add(queue(1) + 1, &[(at, data.len() as u32, 0)]);
        assert!(guest.handle.drain(None));
        let mut seen = vec![0; data.len()];
        reader.read_exact(&mut seen).unwrap();
        assert!(seen == data);
        guest.sent(1, 1);
    }
}

#[test]
fn drain_waits_for_a_chain_that_is_half_taken() {
    let (out, mut reader) = output("out");
    let mut guest = Guest::new(vec![Port::default(), out]);
    guest.open(1);
    let data = pattern(4 * LIMIT);
    guest.send(1, &data);
    let handle = guest.handle.clone();
    let drain = std::thread::spawn(move || handle.drain(None));
    let mut seen = vec![0; data.len()];
    reader.read_exact(&mut seen[..3 * LIMIT]).unwrap();
    // A pipe holds less than the rest, so it cannot be over.
    assert!(!drain.is_finished());
    reader.read_exact(&mut seen[3 * LIMIT..]).unwrap();
    assert!(drain.join().unwrap());
    assert!(seen == data);
}

#[test]
fn a_drain_during_another_ends_too() {
    let (out, mut reader) = output("out");
    let mut guest = Guest::new(vec![Port::default(), out]);
    guest.open(1);
    let data = pattern(2 * LIMIT);
    let mut seen = vec![0; data.len()];
    for _ in 0..10 {
        guest.send(1, &data);
        assert!(!guest.handle.drain(Some(Duration::ZERO)));
        // What is heard after that has the first drain begun, and time for the second.
        guest.say(0, 99, 0);
        let handle = guest.handle.clone();
        let drain = std::thread::spawn(move || handle.drain(None));
        for _ in 0..20 {
            guest.say(0, 99, 0);
        }
        reader.read_exact(&mut seen).unwrap();
        assert!(seen == data);
        assert!(drain.join().unwrap());
        guest.sent(1, 1);
    }
}

#[test]
fn a_reset_loses_no_output() {
    let (out, mut reader) = output("out");
    let mut guest = Guest::new(vec![Port::default(), out]);
    guest.open(1);
    let data = pattern(LIMIT + (256 << 10));
    guest.send(1, &data);
    guest.driver.set::<1>(20, 0);
    assert!(!guest.handle.drain(Some(Duration::ZERO)));
    let mut seen = vec![0; data.len()];
    reader.read_exact(&mut seen).unwrap();
    assert!(seen == data);
    assert!(guest.handle.drain(None));
    // And the next driver goes on with the same ports.
    guest.start();
    guest.open(1);
    guest.send(1, b"again");
    reader.read_exact(&mut seen[..5]).unwrap();
    assert_eq!(&seen[..5], b"again");
}

#[test]
fn input_arrives_and_its_end_closes_the_port() {
    let (port, mut writer) = input("in");
    let mut guest = Guest::new(vec![Port::default(), port]);
    guest.open(1);
    let data = pattern(1 << 20);
    let expected = data.clone();
    let writer = std::thread::spawn(move || writer.write_all(&data).unwrap());
    let mut seen = Vec::new();
    while seen.len() < expected.len() {
        let part = guest.receive(1, 4096);
        assert!(!part.is_empty());
        seen.extend(part);
    }
    writer.join().unwrap();
    assert!(seen == expected);
    // A reader that waits for more learns that there is none.
    let at = guest.driver.alloc(16);
    guest.driver.add(queue(1), &[(at, 16, WRITE)]);
    guest.driver.kick(queue(1));
    assert_eq!(guest.hear(), (1, 6, 0, vec![]));
    assert_eq!(
        guest.driver.used(queue(1)),
        seen.len().div_ceil(4096) as u16
    );
}

#[test]
fn the_last_bytes_come_before_the_end() {
    let (port, mut writer) = input("in");
    writer.write_all(b"last words").unwrap();
    drop(writer);
    let mut guest = Guest::new(vec![Port::default(), port]);
    guest.open(1);
    assert_eq!(guest.receive(1, 4), b"last");
    assert_eq!(guest.receive(1, 64), b" words");
    let at = guest.driver.alloc(16);
    guest.driver.add(queue(1), &[(at, 16, WRITE)]);
    guest.driver.kick(queue(1));
    assert_eq!(guest.hear(), (1, 6, 0, vec![]));
    // A driver that starts afterwards never sees it open.
    guest.start();
    guest.say(1, 3, 1);
    assert_eq!(guest.hear(), (1, 7, 1, b"in".to_vec()));
    guest.say(0, 3, 1);
    assert_eq!(guest.hear(), (0, 7, 1, vec![]));
}

#[test]
fn input_is_read_only_when_the_guest_wants_it() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&pattern(1 << 20)).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let shared = file.try_clone().unwrap();
    let mut position = |what| assert_eq!(file.stream_position().unwrap(), what);
    let port = Port {
        name: "in".into(),
        input: Some(shared.into()),
        ..Port::default()
    };
    let (out, _reader) = output("out");
    let mut guest = Guest::new(vec![Port::default(), port, out]);
    let at = guest.driver.alloc(100);
    guest.driver.add(queue(1), &[(at, 100, WRITE)]);
    guest.driver.kick(queue(1));
    // What is answered later shows that the queues have been looked at.
    guest.open(2);
    position(0);
    guest.say(1, 6, 1);
    guest.driver.next_used(queue(1));
    assert!(guest.driver.bytes(at, 100) == pattern(100));
    guest.open(2);
    position(64 << 10);
}

#[test]
fn a_broken_pipe_closes_the_port_and_output_goes_on() {
    let (out, reader) = output("out");
    let mut guest = Guest::new(vec![Port::default(), out]);
    guest.open(1);
    drop(reader);
    guest.send(1, &pattern(30_000));
    guest.sent(1, 1);
    assert_eq!(guest.hear(), (1, 6, 0, vec![]));
    for _ in 0..100 {
        guest.send(1, &pattern(30_000));
        guest.sent(1, 1);
    }
    assert!(guest.handle.drain(None));
}

#[test]
fn both_ways_over_a_socket() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let port = Port {
        name: "control".into(),
        input: Some(ours.try_clone().unwrap().into()),
        output: Some(ours.into()),
        ..Port::default()
    };
    let mut guest = Guest::new(vec![Port::default(), port]);
    guest.open(1);
    theirs.write_all(b"ping").unwrap();
    assert_eq!(guest.receive(1, 64), b"ping");
    guest.send(1, b"pong");
    guest.close(1);
    let mut seen = String::new();
    theirs.read_to_string(&mut seen).unwrap();
    assert_eq!(seen, "pong");
    theirs.shutdown(Shutdown::Write).unwrap();
    guest.say(1, 6, 1);
    let at = guest.driver.alloc(16);
    guest.driver.add(queue(1), &[(at, 16, WRITE)]);
    guest.driver.kick(queue(1));
    assert_eq!(guest.hear(), (1, 6, 0, vec![]));
}

#[test]
fn regular_files_and_dev_null_work() {
    let mut file = tempfile::tempfile().unwrap();
    let null = File::open("/dev/null").unwrap();
    let port = Port {
        name: "file".into(),
        input: Some(null.into()),
        output: Some(file.try_clone().unwrap().into()),
        ..Port::default()
    };
    let mut guest = Guest::new(vec![Port::default(), port]);
    guest.open(1);
    guest.send(1, b"to a file");
    assert!(guest.handle.drain(None));
    file.seek(SeekFrom::Start(0)).unwrap();
    assert_eq!(io::read_to_string(file).unwrap(), "to a file");
    let at = guest.driver.alloc(16);
    guest.driver.add(queue(1), &[(at, 16, WRITE)]);
    guest.driver.kick(queue(1));
    assert_eq!(guest.hear(), (1, 6, 0, vec![]));
}

#[test]
fn a_driver_without_multiport_has_the_first_port() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let port = Port {
        input: Some(ours.try_clone().unwrap().into()),
        output: Some(ours.into()),
        ..Port::default()
    };
    let (console, handle) = Console::new(vec![port]).unwrap();
    let driver = Driver::new(Box::new(console));
    let mut guest = Guest {
        driver,
        handle,
        posted: VecDeque::new(),
    };
    guest.driver.start(0);
    theirs.write_all(b"in").unwrap();
    assert_eq!(guest.receive(0, 16), b"in");
    guest.send(0, b"out");
    let mut seen = [0; 3];
    theirs.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"out");
}

#[test]
fn a_closed_console_stays() {
    let (mut console, mut reader) = output("console");
    console.is_console = true;
    let mut guest = Guest::new(vec![console]);
    guest.open(0);
    guest.close(0);
    // The turn in which the device heard of it is over when it hears something else.
    guest.say(0, 99, 0);
    guest.send(0, b"still here");
    let mut seen = [0; 10];
    reader.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"still here");
}

#[test]
fn odd_control_messages_are_ignored() {
    let mut guest = Guest::new(vec![Port::default()]);
    for (port, event, value) in [
        (0, 99, 1),
        (7, 3, 1),
        (u32::MAX, 6, 0),
        (0, 3, 0),
        (0, 0, 0),
    ] {
        guest.say(port, event, value);
    }
    let at = guest.driver.put(&[0; 7]);
    guest.driver.add(CONTROL_OUT, &[(at, 7, 0)]);
    guest.driver.add(CONTROL_OUT, &[(at, 7, WRITE)]);
    guest.driver.run(CONTROL_OUT, 2);
    guest.say(0, 0, 1);
    assert_eq!(guest.hear(), (0, 1, 0, vec![]));
}

#[test]
fn a_driver_that_asks_and_does_not_listen_has_to_wait() {
    let (console, handle) = Console::new(vec![Port::default()]).unwrap();
    let mut guest = Guest {
        driver: Driver::new(Box::new(console)),
        handle,
        posted: VecDeque::new(),
    };
    guest.driver.start(MULTIPORT | EVENT_IDX);
    let at = guest.driver.put(&[0, 0, 0, 0, 0, 0, 1, 0]);
    for _ in 0..30 {
        guest.driver.add(CONTROL_OUT, &[(at, 8, 0)]);
    }
    guest.driver.run(CONTROL_OUT, 5);
    // What has been heard by the end of a drain is all that will be.
    guest.handle.drain(None);
    assert_eq!(guest.driver.used(CONTROL_OUT), 5);
    for _ in 0..30 {
        guest.post_control();
    }
    guest.driver.kick(CONTROL_IN);
    for _ in 0..30 {
        guest.driver.next_used(CONTROL_IN);
    }
    assert_eq!(guest.driver.used(CONTROL_OUT), 30);
}

#[test]
fn buffers_outside_of_memory_cost_the_device() {
    let (port, mut writer) = input("in");
    writer.write_all(b"data").unwrap();
    let mut guest = Guest::new(vec![Port::default(), port]);
    for (queue, flags) in [(5, 0), (CONTROL_OUT, 0), (4, WRITE)] {
        guest.open(1);
        guest.driver.add(queue, &[(END, 16, flags)]);
        guest.driver.kick(queue);
        guest.driver.wait_for_needs_reset();
        assert!(guest.handle.drain(None));
        guest.start();
    }
    guest.open(1);
    assert_eq!(
        guest.receive(1, 16),
        b"data",
        "nothing was taken by the bad buffer"
    );
}

#[test]
fn dropping_the_device_ends_the_streams() {
    let (out, mut reader) = output("out");
    let (port, mut writer) = input("in");
    let mut guest = Guest::new(vec![Port::default(), out, port]);
    guest.open(1);
    guest.open(2);
    guest.send(1, b"end");
    guest.driver.alloc(0);
    writer.write_all(b"x").unwrap();
    assert_eq!(guest.receive(2, 1), b"x");
    drop(guest);
    let mut seen = String::new();
    reader.read_to_string(&mut seen).unwrap();
    assert_eq!(seen, "end");
    while writer.write_all(b"x").is_ok() {}
}

#[test]
fn impossible_ports_are_refused() {
    assert!(Console::new(vec![]).is_err());
    assert!(Console::new((0..65).map(|_| Port::default()).collect()).is_err());
    assert!(
        Console::new(vec![Port {
            name: "a\0b".into(),
            ..Port::default()
        }])
        .is_err()
    );
}
