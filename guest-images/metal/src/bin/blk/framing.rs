//! Requests cut into descriptors in uncommon ways: a device must not care (VIRTIO 1.2, 2.7.4).

use core::ops::Range;

use metal::blk::{self, Disk, NO_STATUS, SECTOR};
use metal::memory::Region;
use metal::outcome::{Outcome, ensure};
use metal::pci::Function;
use metal::queue::{Descriptor, INDIRECT, NEXT, WRITE, write_descriptor};
use metal::virtio::{Device, NO_VECTOR};
use metal::{pattern, queue};

use crate::{CHUNK, succeeded};

/// Lengths of the pieces that data is cut into, over and over.
const PIECES: [u64; 5] = [1, 511, 3000, 8, 4096];
/// Most descriptors of a request.
const LONGEST: u64 = 120;

/// Writes a pattern and reads it back, data and header in pieces of odd lengths.
pub(crate) fn scatter(
    function: Function,
    buffers: Region,
    sectors: Range<u64>,
    seed: u64,
) -> Outcome {
    let mut disk = Disk::open(function, NO_VECTOR)?;
    let table = disk.queue.descriptors;
    round_trip(buffers, sectors, seed, |kind, sector, data| {
        let status = lay_out(table, kind, sector, data, &PIECES);
        disk.queue.offer(0);
        disk.queue.publish();
        ensure(
            disk.queue.wait()?.0 == 0,
            "the disk answers a request that nobody made",
        )?;
        succeeded(status.read(0))
    })?;
    disk.device.reset()
}

/// Writes a pattern and reads it back, each request in a table of its own.
pub(crate) fn indirect(
    function: Function,
    buffers: Region,
    sectors: Range<u64>,
    seed: u64,
) -> Outcome {
    let device = Device::open(function)?;
    let features = device.negotiate(queue::F_INDIRECT)?;
    ensure(
        features & queue::F_INDIRECT != 0,
        "the disk offers no indirect descriptors",
    )?;
    let mut queue = device.queue(0, 16, NO_VECTOR)?;
    device.start()?;
    let table = Region::allocate(16 * LONGEST, 16);
    round_trip(buffers, sectors, seed, |kind, sector, data| {
        let status = lay_out(table, kind, sector, data, &[4096]);
        let (address, len, flags) = (table.address(), table.size(), INDIRECT);
        queue.describe(
            0,
            Descriptor {
                address,
                len,
                flags,
                next: 0,
            },
        );
        queue.offer(0);
        queue.publish();
        ensure(
            queue.wait()?.0 == 0,
            "the disk answers a request that nobody made",
        )?;
        succeeded(status.read(0))
    })?;
    device.reset()
}

/// Writes the pattern of a seed, a chunk at a time, and sees whether it reads back.
fn round_trip(
    buffers: Region,
    sectors: Range<u64>,
    seed: u64,
    mut request: impl FnMut(u32, u64, Region) -> Outcome,
) -> Outcome {
    for sector in sectors.clone().step_by((CHUNK / SECTOR) as usize) {
        let count = (sectors.end - sector).min(CHUNK / SECTOR);
        let data = buffers.part(0, count * SECTOR);
        pattern::fill(seed, sector, data);
        request(blk::OUT, sector, data)?;
        pattern::fill(!seed, sector, data);
        request(blk::IN, sector, data)?;
        let mismatch = pattern::mismatch(seed, sector, data);
        ensure(
            mismatch.is_none(),
            "the disk has other data than was written",
        )?;
    }
    Ok(())
}

/// Lays out a request as a chain from the first entry of a table on. Returns its status byte.
fn lay_out(table: Region, kind: u32, sector: u64, data: Region, pieces: &[u64]) -> Region {
    let memory = Region::allocate(32, 32);
    memory.write(0, kind);
    memory.write(8, sector);
    memory.write(16, NO_STATUS);
    let status = memory.part(16, 1);
    let write = if kind == blk::IN { WRITE } else { 0 };

    let mut index = 0;
    let mut add = |region: Region, flags: u16| {
        let (address, len) = (region.address(), region.size());
        write_descriptor(
            table,
            index,
            Descriptor {
                address,
                len,
                flags,
                next: index + 1,
            },
        );
        index += 1;
    };
    add(memory.part(0, 8), NEXT);
    add(memory.part(8, 8), NEXT);
    let (mut offset, mut lengths) = (0, pieces.iter().cycle());
    while offset < data.size().into() {
        let left = u64::from(data.size()) - offset;
        let len = lengths.next().map_or(left, |&len| len.min(left));
        add(data.part(offset, len), NEXT | write);
        offset += len;
    }
    add(status, WRITE);
    status
}
