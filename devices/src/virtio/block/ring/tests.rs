use std::fs::File;
use std::io::{PipeWriter, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::super::disk::{Geometry, Plan};
use super::*;

/// A disk of which a ring wants the files only.
struct Files(Vec<OwnedFd>);

impl Disk for Files {
    fn geometry(&self) -> &Geometry {
        unreachable!()
    }
    fn files(&self) -> Vec<BorrowedFd<'_>> {
        self.0.iter().map(OwnedFd::as_fd).collect()
    }
    fn plan_read(&self, _: u64, _: u64, _: bool) -> io::Result<Plan> {
        unreachable!()
    }
    fn plan_write(&self, _: u64, _: u64, _: bool) -> io::Result<Plan> {
        unreachable!()
    }
    fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        unreachable!()
    }
    fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
        unreachable!()
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        unreachable!()
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        unreachable!()
    }
    fn flush(&self) -> io::Result<()> {
        unreachable!()
    }
}

struct Lab {
    ring: Ring,
    memory: Memory,
    file: File,
    /// What the disk's second file reads from.
    pipe: PipeWriter,
    waker: EventFd,
}

fn lab() -> Lab {
    let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let file = tempfile::tempfile().unwrap();
    let content: Vec<u8> = (0..65536_u32).map(|n| (n / 512 + n) as u8).collect();
    file.write_all_at(&content, 0).unwrap();
    let (reader, pipe) = io::pipe().unwrap();
    let disk: Arc<dyn Disk> =
        Arc::new(Files(vec![file.try_clone().unwrap().into(), reader.into()]));
    let waker = EventFd::new(EFD_NONBLOCK).unwrap();
    let blank = Blank::new().expect("io_uring, which this test is about");
    let ring = Ring::new(blank, &disk, &memory, &[&waker]).unwrap();
    Lab {
        ring,
        memory,
        file,
        pipe,
        waker,
    }
}

impl Lab {
    fn add(&mut self, request: usize, target: Target, address: u64) {
        let slice = self
            .memory
            .get_slice(GuestAddress(address), target.len as usize)
            .unwrap();
        self.ring.add(request, target, &[slice]).unwrap();
    }

    fn wait(&mut self) -> Vec<(usize, bool)> {
        self.ring.wait(None).unwrap();
        self.completed()
    }

    fn completed(&mut self) -> Vec<(usize, bool)> {
        let mut told = Vec::new();
        self.ring
            .completed(|request, result| told.push((request, result.is_ok())))
            .unwrap();
        told
    }

    /// Everything that was added.
    fn all(&mut self, count: usize) -> Vec<(usize, bool)> {
        let mut told = Vec::new();
        while told.len() < count {
            told.extend(self.wait());
        }
        told
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .unwrap();
        data
    }
}

fn target(direction: Direction, file: usize, offset: u64, len: u64) -> Target {
    Target {
        direction,
        file,
        offset,
        len,
    }
}

#[test]
fn neighbours_are_one_operation() {
    let mut lab = lab();
    let read = |offset| target(Direction::Read, 0, offset, 4096);
    // Three in a row, wherever in memory; a gap; backwards; the other direction.
    lab.add(10, read(0), 0x3000);
    lab.add(11, read(4096), 0x9000);
    lab.add(12, read(8192), 0x1000);
    assert_eq!(lab.ring.in_flight, 1);
    lab.add(13, read(16384), 0x5000);
    lab.add(14, read(12288), 0x7000);
    lab.add(15, target(Direction::Write, 0, 16384, 4096), 0x8000);
    assert_eq!(lab.ring.in_flight, 4);
    let mut told = lab.all(6);
    told.sort_unstable();
    assert_eq!(told, (10..16).map(|n| (n, true)).collect::<Vec<_>>());
    assert_eq!(lab.ring.in_flight, 0);
    for (address, offset) in [(0x3000, 0), (0x9000, 4096), (0x1000, 8192)] {
        let mut expected = vec![0; 4096];
        lab.file.read_exact_at(&mut expected, offset).unwrap();
        assert!(lab.bytes(address, 4096) == expected, "{offset}");
    }
}

#[test]
fn many_more_than_the_queues_hold() {
    let mut lab = lab();
    let mut told = 0;
    for round in 0..2000 {
        while !lab.ring.has_room(1) {
            told += lab.wait().len();
        }
        let offset = round * 1024 % 65536;
        lab.add(0, target(Direction::Read, 0, offset, 512), offset);
    }
    told += lab.all(2000 - told).len();
    assert_eq!(told, 2000);
    assert!(lab.ring.operations.len() <= MAX_IN_FLIGHT);
}

#[test]
fn what_comes_short_or_fails_is_not_done() {
    let mut lab = lab();
    lab.add(1, target(Direction::Read, 0, 65536 - 512, 4096), 0);
    lab.add(2, target(Direction::Read, 0, 1 << 40, 512), 0x2000);
    // The pipe's reading end cannot be written to.
    lab.add(3, target(Direction::Write, 1, 0, 512), 0x4000);
    let mut told = lab.all(3);
    told.sort_unstable();
    assert_eq!(told, [(1, false), (2, false), (3, false)]);
}

#[test]
fn a_sync_is_told_of_like_a_transfer() {
    let mut lab = lab();
    lab.add(1, target(Direction::Write, 0, 0, 512), 0);
    lab.ring.sync(2, 0).unwrap();
    // Nothing joins it, and a pipe has nothing to sync.
    lab.add(3, target(Direction::Write, 0, 0, 512), 0);
    lab.ring.sync(4, 1).unwrap();
    let mut told = lab.all(4);
    told.sort_unstable();
    assert_eq!(told, [(1, true), (2, true), (3, true), (4, false)]);
}

#[test]
fn what_cannot_be_waited_for_keeps_memory_and_files() {
    let mut lab = lab();
    let disk = Arc::downgrade(&lab.ring._disk);
    lab.add(1, target(Direction::Read, 1, 0, 512), 0);
    lab.ring.submit().unwrap();
    // The ring's number is another file's now, which the kernel does not take for a ring.
    // SAFETY: both descriptors are open, and the ring has no use for its own any more.
    unsafe { libc::dup2(lab.file.as_raw_fd(), lab.ring.ring.as_raw_fd()) };
    assert!(lab.ring.finish().is_err());
    drop(lab.ring);
    assert_eq!(disk.strong_count(), 1);
}

#[test]
fn a_waker_ends_each_wait() {
    let mut lab = lab();
    for _ in 0..3 {
        lab.waker.write(1).unwrap();
        assert!(lab.wait().is_empty());
    }
    lab.ring.wait(Some(Duration::from_millis(1))).unwrap();
    assert!(lab.completed().is_empty(), "the time is over");
}

#[test]
fn operations_complete_out_of_order() {
    let mut lab = lab();
    lab.add(1, target(Direction::Read, 1, 0, 512), 0);
    lab.add(2, target(Direction::Read, 0, 0, 512), 0x2000);
    assert_eq!(lab.all(1), [(2, true)]);
    lab.pipe.write_all(&[7; 512]).unwrap();
    assert_eq!(lab.all(1), [(1, true)]);
    assert_eq!(lab.bytes(0, 512), [7; 512]);
}

#[test]
fn its_end_waits_for_what_is_in_flight() {
    let (memory, pipe) = {
        let (sender, receiver) = std::sync::mpsc::channel();
        let (done, ended) = std::sync::mpsc::channel();
        // A ring belongs to its thread.
        let thread = std::thread::spawn(move || {
            let mut lab = lab();
            lab.add(1, target(Direction::Read, 1, 0, 512), 0);
            lab.ring.submit().unwrap();
            sender.send((lab.memory.clone(), lab.pipe)).unwrap();
            drop(lab.ring);
            done.send(()).unwrap();
        });
        let (memory, mut pipe) = receiver.recv().unwrap();
        assert!(ended.try_recv().is_err(), "it ends while its read goes on");
        pipe.write_all(&[9; 512]).unwrap();
        thread.join().unwrap();
        (memory, pipe)
    };
    let mut data = [0; 512];
    memory.read_slice(&mut data, GuestAddress(0)).unwrap();
    assert_eq!(data, [9; 512]);
    drop(pipe);
}

#[test]
fn a_blank_cannot_be_made_to_do_more() {
    let Blank(blank) = Blank::new().unwrap();
    let refused = blank
        .submitter()
        .register_restrictions(&mut [Restriction::sqe_op(opcode::Socket::CODE)]);
    assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EBUSY));
    // Nor anything while it is disabled.
    let refused = blank.submit_and_wait(0);
    assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EBADFD));
}

#[test]
fn nothing_else_can_be_asked_of_it() {
    let mut lab = lab();
    let submit = |lab: &mut Lab, entry: squeue::Entry| {
        // SAFETY: none of these is given memory.
        unsafe { lab.ring.ring.submission().push(&entry).unwrap() };
        lab.ring.ring.submit_and_wait(1).unwrap();
        let entry = lab.ring.ring.completion().next().unwrap();
        entry.result()
    };
    let any = io_uring::types::Fd(lab.file.as_raw_fd());
    for entry in [
        opcode::Nop::new().build(),
        opcode::Fallocate::new(Fixed(0), 4096).build(),
        opcode::Close::new(any).build(),
        // What is allowed, but of a file that was not registered.
        opcode::PollAdd::new(any, libc::POLLIN as u32).build(),
    ] {
        assert_eq!(submit(&mut lab, entry), -libc::EACCES);
    }
    let submitter = lab.ring.ring.submitter();
    let refused = submitter.register_files_update(0, &[lab.file.as_raw_fd()]);
    assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EACCES));
}
