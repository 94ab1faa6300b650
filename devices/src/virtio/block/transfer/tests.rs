use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;

use vm_memory::GuestAddress;

use super::*;
use crate::virtio::buffers::Segment;

#[test]
fn short_transfers_go_on_where_they_stopped() {
    // A file of the kernel's that gives about a page at a time, however much is asked for.
    const PATH: &str = "/proc/kallsyms";
    const LEN: usize = 64 << 10;
    let mut expected = vec![0; LEN];
    let Ok(mut file) = File::open(PATH) else {
        eprintln!("skipped: {PATH} cannot be opened");
        return;
    };
    if file.read_exact(&mut expected).is_err() {
        eprintln!("skipped: {PATH} is short");
        return;
    }
    let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let mut buffers = Buffers::default();
    for (address, len) in [(0x100, 20_000), (0x8000, LEN as u32 - 20_000)] {
        buffers.push(Segment {
            address: GuestAddress(address),
            len,
        });
    }
    let slices = buffers.slices(&memory).unwrap();
    move_bytes(file.as_fd(), 0, slices, Direction::Read, 0).unwrap();
    let mut data = vec![0; LEN];
    buffers.read(&memory, 0, &mut data).unwrap();
    assert!(data == expected);
}

#[test]
fn more_pieces_than_a_call_takes() {
    let file = tempfile::tempfile().unwrap();
    let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let mut pieces = Buffers::default();
    let mut back = Buffers::default();
    let count = 3 * MAX_PIECES as u64 + 7;
    for n in 0..count {
        pieces.push(Segment {
            address: GuestAddress(n * 16),
            len: 3,
        });
        back.push(Segment {
            address: GuestAddress(0x8_0000 + n * 16),
            len: 3,
        });
    }
    let data: Vec<u8> = (0..count * 3).map(|n| (n % 251) as u8).collect();
    pieces.write(&memory, 0, &data).unwrap();
    move_bytes(
        file.as_fd(),
        5,
        pieces.slices(&memory).unwrap(),
        Direction::Write,
        0,
    )
    .unwrap();
    move_bytes(
        file.as_fd(),
        5,
        back.slices(&memory).unwrap(),
        Direction::Read,
        0,
    )
    .unwrap();
    let mut seen = vec![0; data.len()];
    back.read(&memory, 0, &mut seen).unwrap();
    assert!(seen == data);
}
