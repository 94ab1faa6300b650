//! Descriptor chains, and requests in them, that are wrong.

use metal::blk;
use metal::memory;
use metal::queue::{Descriptor, INDIRECT, NEXT, WRITE, write_descriptor};

use crate::Victim;

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
    let end = Descriptor {
        flags: WRITE,
        ..data
    };

    let chains: &[(&str, &[Descriptor])] = &[
        ("header loops", &[Descriptor { next: 0, ..header }]),
        ("two loop", &[header, Descriptor { next: 0, ..data }]),
        ("data loops", &[header, Descriptor { next: 1, ..data }]),
        (
            "next past the table",
            &[Descriptor {
                next: 0xffff,
                ..header
            }],
        ),
        ("header only", &[Descriptor { flags: 0, ..header }]),
        (
            "header writable",
            &[
                Descriptor {
                    flags: NEXT | WRITE,
                    ..header
                },
                data,
                status,
            ],
        ),
        (
            "header short",
            &[Descriptor { len: 8, ..header }, data, status],
        ),
        (
            "header empty",
            &[Descriptor { len: 0, ..header }, data, status],
        ),
        (
            "header nowhere",
            &[
                Descriptor {
                    address: nowhere,
                    ..header
                },
                data,
                status,
            ],
        ),
        (
            "header in registers",
            &[
                Descriptor {
                    address: registers,
                    ..header
                },
                data,
                status,
            ],
        ),
        (
            "data nowhere",
            &[
                header,
                Descriptor {
                    address: nowhere,
                    ..data
                },
                status,
            ],
        ),
        (
            "data wraps",
            &[
                header,
                Descriptor {
                    address: u64::MAX - 10,
                    ..data
                },
                status,
            ],
        ),
        (
            "data leaves ram",
            &[
                header,
                Descriptor {
                    address: ram_end - 256,
                    ..data
                },
                status,
            ],
        ),
        (
            "data in registers",
            &[
                header,
                Descriptor {
                    address: registers,
                    ..data
                },
                status,
            ],
        ),
        (
            "data of 4 GiB",
            &[
                header,
                Descriptor {
                    len: u32::MAX,
                    ..data
                },
                status,
            ],
        ),
        (
            "data of 2 GiB",
            &[
                header,
                Descriptor {
                    len: 1 << 31,
                    ..data
                },
                status,
            ],
        ),
        (
            "data empty",
            &[header, Descriptor { len: 0, ..data }, status],
        ),
        (
            "data of 511 bytes",
            &[header, Descriptor { len: 511, ..data }, status],
        ),
        (
            "data read-only",
            &[
                header,
                Descriptor {
                    flags: NEXT,
                    ..data
                },
                status,
            ],
        ),
        ("status missing", &[header, end]),
        (
            "status read-only",
            &[header, data, Descriptor { flags: 0, ..status }],
        ),
        (
            "status empty",
            &[header, data, Descriptor { len: 0, ..status }],
        ),
        (
            "status nowhere",
            &[
                header,
                data,
                Descriptor {
                    address: nowhere,
                    ..status
                },
            ],
        ),
        (
            "all flags",
            &[
                Descriptor {
                    flags: 0xffff,
                    ..header
                },
                data,
                status,
            ],
        ),
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
        ("indirect table loops", 48, Descriptor { next: 0, ..header }),
        (
            "indirect table in a table",
            48,
            Descriptor {
                flags: INDIRECT,
                ..header
            },
        ),
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

/// Well-formed chains whose requests make no sense.
fn requests(victim: &mut Victim) {
    let all = 1 << 20;
    let requests: &[(&str, u32, u64, u64)] = &[
        ("read past the end", blk::IN, 1 << 40, 512),
        (
            "read at the last sector there could be",
            blk::IN,
            u64::MAX,
            512,
        ),
        ("read whose end overflows", blk::IN, u64::MAX / 512, all),
        ("write past the end", blk::OUT, 1 << 40, 512),
        (
            "write at the last sector there could be",
            blk::OUT,
            u64::MAX,
            4096,
        ),
        ("write of no sector", blk::OUT, 0, 0),
        ("write of half a sector", blk::OUT, u64::MAX, 256),
        ("unknown request", 0xdead_beef, 0, 512),
        ("identifier into one byte", blk::GET_ID, 0, 1),
        ("identifier into a megabyte", blk::GET_ID, 0, all),
        ("flush at a sector", blk::FLUSH, u64::MAX, 512),
        ("discard of nonsense", blk::DISCARD, 0, 512),
        ("discard of no segment", blk::DISCARD, 0, 0),
        ("discard of half a segment", blk::DISCARD, 0, 8),
        ("zeros of nonsense", blk::WRITE_ZEROES, 0, 16),
        ("zeros of too many segments", blk::WRITE_ZEROES, 0, all),
    ];
    for &(name, kind, sector, len) in requests {
        victim.try_disk(name, |disk, scratch| {
            // As segments of a discard: sectors that no disk has.
            scratch
                .words()
                .take(128)
                .for_each(|offset| scratch.write(offset, u64::MAX));
            disk.submit(0, kind, sector, Some(scratch.part(0, len)));
            disk.queue.publish();
            Ok(())
        });
    }
}
