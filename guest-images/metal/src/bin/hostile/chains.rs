//! Descriptor chains, and requests in them, that are wrong.

use metal::blk;
use metal::memory;
use metal::outcome::ensure;
use metal::queue::{Descriptor, INDIRECT, NEXT, WRITE, write_descriptor};
use metal::time;

use crate::{REACTION, Victim};

fn at(descriptor: Descriptor, address: u64) -> Descriptor {
    Descriptor {
        address,
        ..descriptor
    }
}

fn len(descriptor: Descriptor, len: u32) -> Descriptor {
    Descriptor { len, ..descriptor }
}

fn flags(descriptor: Descriptor, flags: u16) -> Descriptor {
    Descriptor {
        flags,
        ..descriptor
    }
}

fn next(descriptor: Descriptor, next: u16) -> Descriptor {
    Descriptor { next, ..descriptor }
}

/// Tries each chain on its own.
pub(crate) fn attack(victim: &mut Victim) {
    let (scratch, ram_end) = (victim.scratch, memory::ram_end());
    let registers = victim.function.bars().next().map_or(0, |bar| bar.address);
    let (at_header, at_data) = (scratch.address(), scratch.address() + 4096);
    let at_status = scratch.address() + 64;
    let nowhere = 0x7fff_ffff_f000;
    let descriptor = |address, len, flags, next| Descriptor {
        address,
        len,
        flags,
        next,
    };

    // What is right; each attack below changes one part of it.
    let header = descriptor(at_header, 16, NEXT, 1);
    let data = descriptor(at_data, 512, NEXT | WRITE, 2);
    let status = descriptor(at_status, 1, WRITE, 0);
    let end = flags(data, WRITE);

    #[rustfmt::skip]
    let chains: &[(&str, &[Descriptor])] = &[
        ("header loops", &[next(header, 0)]),
        ("two loop", &[header, next(data, 0)]),
        ("data loops", &[header, next(data, 1)]),
        ("next past the table", &[next(header, 0xffff)]),
        ("header only", &[flags(header, 0)]),
        ("header writable", &[flags(header, NEXT | WRITE), data, status]),
        ("header short", &[len(header, 8), data, status]),
        ("header empty", &[len(header, 0), data, status]),
        ("header nowhere", &[at(header, nowhere), data, status]),
        ("header in registers", &[at(header, registers), data, status]),
        ("data nowhere", &[header, at(data, nowhere), status]),
        ("data wraps", &[header, at(data, u64::MAX - 10), status]),
        ("data leaves ram", &[header, at(data, ram_end - 256), status]),
        ("data in registers", &[header, at(data, registers), status]),
        ("data of 4 GiB", &[header, len(data, u32::MAX), status]),
        ("data of 2 GiB", &[header, len(data, 1 << 31), status]),
        ("data empty", &[header, len(data, 0), status]),
        ("data of 511 bytes", &[header, len(data, 511), status]),
        ("data read-only", &[header, flags(data, NEXT), status]),
        ("status missing", &[header, end]),
        ("status read-only", &[header, data, flags(status, 0)]),
        ("status empty", &[header, data, len(status, 0)]),
        ("status nowhere", &[header, data, at(status, nowhere)]),
        ("all flags", &[flags(header, 0xffff), data, status]),
        ("empty chain", &[Descriptor::default()]),
    ];
    for &(name, chain) in chains {
        victim.try_disk(name, |disk, scratch| {
            scratch.write(0, blk::IN);
            scratch.write(8, 0u64);
            for (index, descriptor) in (0..).zip(chain) {
                disk.queue.describe(index, *descriptor);
            }
            disk.queue.offer(0);
            disk.queue.publish();
            Ok(())
        });
    }

    // Indirect tables, which were not negotiated.
    let tables: &[(&str, u32, Descriptor)] = &[
        ("indirect table", 48, header),
        ("indirect table loops", 48, next(header, 0)),
        ("indirect table in a table", 48, flags(header, INDIRECT)),
        ("indirect table empty", 0, header),
        ("indirect table of odd length", 47, header),
        ("indirect table of 4 GiB", 0xffff_fff0, header),
    ];
    for &(name, len, first) in tables {
        victim.try_disk(name, |disk, scratch| {
            let table = scratch.part(8192, 48);
            for (index, entry) in (0..).zip([first, data, status]) {
                write_descriptor(table, index, entry);
            }
            disk.queue
                .describe(0, descriptor(table.address(), len, INDIRECT, 0));
            disk.queue.offer(0);
            disk.queue.publish();
            Ok(())
        });
    }

    requests(victim);
}

/// Well-formed chains whose requests make no sense; the last column: may they succeed?
fn requests(victim: &mut Victim) {
    let all = 1 << 20;
    #[rustfmt::skip]
    let requests: &[(&str, u32, u64, u64, bool)] = &[
        ("read past the end", blk::IN, 1 << 40, 512, false),
        ("read at the last of sectors", blk::IN, u64::MAX, 512, false),
        ("read whose end overflows", blk::IN, u64::MAX / 512, all, false),
        ("write past the end", blk::OUT, 1 << 40, 512, false),
        ("write at the last of sectors", blk::OUT, u64::MAX, 4096, false),
        ("write of no sector", blk::OUT, 0, 0, true),
        ("write of half a sector", blk::OUT, u64::MAX, 256, false),
        ("unknown request", 0xdead_beef, 0, 512, false),
        ("identifier into one byte", blk::GET_ID, 0, 1, true),
        ("identifier into a megabyte", blk::GET_ID, 0, all, true),
        ("flush at a sector", blk::FLUSH, u64::MAX, 512, true),
        ("discard of nonsense", blk::DISCARD, 0, 512, false),
        ("discard of no segment", blk::DISCARD, 0, 0, true),
        ("discard of half a segment", blk::DISCARD, 0, 8, false),
        ("zeros of nonsense", blk::WRITE_ZEROES, 0, 16, false),
        ("zeros of too many segments", blk::WRITE_ZEROES, 0, all, false),
    ];
    for &(name, kind, sector, len, may_succeed) in requests {
        victim.try_disk(name, |disk, scratch| {
            // As segments of a discard: sectors that no disk has.
            scratch
                .words()
                .take(128)
                .for_each(|offset| scratch.write(offset, u64::MAX));
            disk.submit(0, kind, sector, Some(scratch.part(0, len)));
            disk.queue.publish();
            time::poll(REACTION, || disk.queue.has_used());
            ensure(
                may_succeed || disk.status(0) != blk::OK,
                "the request succeeds",
            )
        });
    }
}
