//! A disk's driver that sets its queue up well, and then asks for anything.

use std::ops::Range;

use arbitrary::{Arbitrary, Unstructured};
use vm_memory::{Bytes, GuestAddress};

use crate::guest::{DISK, Guest, MEMORY, block};

/// Entries of the queue.
const SIZE: u16 = 32;
const RINGS: u64 = 0;
const EACH: u64 = 0x1000;
const AVAILABLE: u64 = RINGS + EACH / 4;
const USED: u64 = RINGS + EACH / 2;
/// Tables of indirect descriptors, one a request.
const TABLES: u64 = 0x1000;
const TABLE: u64 = 0x100;
/// Headers and ranges, one place a request.
const HEADERS: u64 = 0x4000;
const HEADER: u64 = 0x100;
/// From here on there is only data.
const DATA: u64 = 0x8000;
/// What memory for data has before a device writes there.
const UNTOUCHED: u8 = 0xa5;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

#[derive(Arbitrary, Debug)]
struct Input {
    read_only: bool,
    refused: u32,
    requests: Vec<Request>,
}

#[derive(Arbitrary, Debug)]
struct Request {
    kind: u8,
    sector: u16,
    flags: u8,
    /// Sectors, written as a discard's or write-zeroes' range.
    sectors: u16,
    indirect: bool,
    /// What lies between the header and the status.
    data: Vec<Piece>,
    /// The status byte is forgotten.
    silent: bool,
}

#[derive(Arbitrary, Debug)]
struct Piece {
    address: u32,
    len: u16,
    write: bool,
}

type Descriptor = (u64, u32, u16);

/// Offers all requests at once and waits until each is answered or the device gives up. Nothing is
/// written to memory that no descriptor gives to the device.
pub fn run(data: &[u8]) {
    let Ok(input) = Input::arbitrary(&mut Unstructured::new(data)) else {
        return;
    };
    let guest = Guest::new(block(input.read_only));
    guest.put(DATA, &vec![UNTOUCHED; (MEMORY - DATA) as usize]);
    let mut given = Vec::new();
    let (mut free, mut offered) = (0, 0_u16);
    // Without event indices: each answer can be seen by its index alone.
    guest.start(u64::from(input.refused) | 1 << 29, SIZE, RINGS, EACH);
    for (request, number) in input.requests.iter().zip(0..16) {
        let chain = chain(&guest, request, number);
        given.extend(writable(&chain));
        let direct = if request.indirect {
            let table = TABLES + number * TABLE;
            put_chain(&guest, table, 0, &chain, u16::MAX);
            vec![(table, chain.len() as u32 * 16, INDIRECT)]
        } else {
            chain
        };
        if usize::from(free) + direct.len() > usize::from(SIZE) {
            break;
        }
        put_chain(&guest, RINGS, free, &direct, SIZE);
        let slot = AVAILABLE + 4 + u64::from(offered) * 2;
        guest.put(slot, &free.to_le_bytes());
        free += direct.len() as u16;
        offered += 1;
    }
    guest.put(AVAILABLE + 2, &offered.to_le_bytes());
    guest.kick(0);
    let answered = || {
        guest
            .memory
            .read_obj::<u16>(GuestAddress(USED + 2))
            .unwrap()
    };
    while !guest.needs_reset() && answered() != offered {
        std::thread::yield_now();
    }
    guest.stop();
    check_memory(&guest, &given);
}

/// The descriptors of a request; its header is in memory.
fn chain(guest: &Guest, request: &Request, number: u64) -> Vec<Descriptor> {
    let kind = match request.kind % 8 {
        // Read, write, flush, identify, discard, write zeroes.
        kind @ (0 | 1) => u32::from(kind),
        2 => 4,
        3 => 8,
        4 => 11,
        5 => 13,
        _ => u32::from(request.kind),
    };
    let at = HEADERS + number * HEADER;
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(u64::from(request.sector).to_le_bytes());
    header.extend(u64::from(request.sector).to_le_bytes());
    header.extend(u32::from(request.sectors).to_le_bytes());
    header.extend(u32::from(request.flags).to_le_bytes());
    guest.put(at, &header);
    // Ranges follow the header as more of what the device may read.
    let len = if kind >= 11 { 32 } else { 16 };
    let mut chain = vec![(at, len, 0)];
    for piece in request.data.iter().take(12) {
        let address = DATA + u64::from(piece.address) % (MEMORY + 0x1000 - DATA);
        // Mostly whole sectors: the rest is refused before anything happens.
        let len = u32::from(piece.len) % (DISK as u32 + 0x1000);
        let len = if piece.address & 1 == 0 {
            len & !511
        } else {
            len
        };
        let flags = if piece.write { WRITE } else { 0 };
        chain.push((address & !1, len, flags));
    }
    if !request.silent {
        chain.push((DATA + number, 1, WRITE));
    }
    chain
}

/// Writes descriptors from `first` on; `wrap` is how many there are in the table.
fn put_chain(guest: &Guest, table: u64, first: u16, chain: &[Descriptor], wrap: u16) {
    for (index, &(address, len, flags)) in (first..).zip(chain) {
        let last = usize::from(index - first) + 1 == chain.len();
        let flags = if last { flags } else { flags | NEXT };
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(((index + 1) % wrap).to_le_bytes());
        guest.put(table + u64::from(index) * 16, &bytes);
    }
}

/// Where the device may write for a chain.
fn writable(chain: &[Descriptor]) -> Vec<Range<u64>> {
    chain
        .iter()
        .filter(|(.., flags)| flags & WRITE != 0)
        .map(|&(address, len, _)| address..address + u64::from(len))
        .collect()
}

fn check_memory(guest: &Guest, given: &[Range<u64>]) {
    let mut data = vec![0; (MEMORY - DATA) as usize];
    guest
        .memory
        .read_slice(&mut data, GuestAddress(DATA))
        .unwrap();
    for (byte, at) in data.iter().zip(DATA..) {
        if *byte != UNTOUCHED {
            let allowed = given.iter().any(|range| range.contains(&at));
            assert!(allowed, "{byte:#x} was written at {at:#x}");
        }
    }
}
