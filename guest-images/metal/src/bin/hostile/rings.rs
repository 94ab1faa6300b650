//! Rings that lie, and resets at the worst moment.

use metal::blk::{self, Disk};
use metal::memory;
use metal::outcome::{Outcome, ensure};
use metal::virtio::{Device, NEEDS_RESET, NO_VECTOR, common};
use metal::{pattern, println, time};

use crate::{REACTION, SCRATCH, Victim};

/// Offset of the index in the available ring, and of its first entry.
const INDEX: u64 = 2;
const FIRST: u64 = 4;

/// Tries each lie on its own.
pub(crate) fn attack(victim: &mut Victim) {
    for (name, head) in [
        ("head past the table", 256u16),
        ("head of all ones", 0xffff),
    ] {
        victim.try_disk(name, |disk, _| {
            disk.queue.offer(head);
            disk.queue.publish();
            Ok(())
        });
    }
    for (name, index) in [
        ("index past the ring", 257u16),
        ("index half around", 0x8000),
        ("index back", 0xffff),
    ] {
        victim.try_disk(name, |disk, scratch| {
            disk.submit(0, blk::IN, 0, Some(scratch.part(0, 512)));
            disk.queue.available.write(INDEX, index);
            disk.queue.ring();
            Ok(())
        });
    }
    victim.try_disk("one head many times", |disk, scratch| {
        disk.submit(0, blk::IN, 0, Some(scratch.part(0, 512)));
        let entries = (0..u64::from(disk.queue.size)).map(|entry| FIRST + 2 * entry);
        entries.for_each(|entry| disk.queue.available.write(entry, 0u16));
        disk.queue.available.write(INDEX, disk.queue.size);
        disk.queue.ring();
        Ok(())
    });
    victim.try_disk("a thousand doorbells for nothing", |disk, _| {
        (0..1000).for_each(|_| disk.queue.ring());
        Ok(())
    });
    addresses(victim);
    let outcome = reset_in_flight(victim);
    victim.report_on("reset in flight", outcome);
}

/// Puts each of the three rings where it must not be.
fn addresses(victim: &mut Victim) {
    let places = [
        ("nowhere", 0x7fff_ffff_f000),
        ("at the end of addresses", u64::MAX - 15),
        ("over the end of ram", memory::ram_end() - 16),
        ("misaligned", victim.scratch.address() + 1),
        (
            "in registers",
            victim.function.bars().next().map_or(0, |bar| bar.address),
        ),
    ];
    let rings = [
        ("descriptors", common::QUEUE_DESC),
        ("available ring", common::QUEUE_DRIVER),
        ("used ring", common::QUEUE_DEVICE),
    ];
    for (place, address) in places {
        for (ring, register) in rings {
            println!("{ring} {place}:");
            let outcome = start_with(victim, register, address);
            victim.report_on(ring, outcome);
        }
    }
}

/// Starts the device with one wrong address, and one request on the available ring.
fn start_with(victim: &Victim, register: u64, address: u64) -> Outcome {
    let device = Device::open(victim.function)?;
    device.negotiate(0)?;
    let pages = [
        common::QUEUE_DESC,
        common::QUEUE_DRIVER,
        common::QUEUE_DEVICE,
    ]
    .into_iter();
    device.common.write(common::QUEUE_SELECT, 0u16);
    device.common.write(common::QUEUE_SIZE, 16u16);
    for (page, ring) in (0..).zip(pages) {
        let memory = victim.scratch.part(page * 4096, 4096);
        memory.write(0, 0u16);
        memory.write(INDEX, 1u16);
        device.set_address(
            ring,
            if ring == register {
                address
            } else {
                memory.address()
            },
        );
    }
    device.common.write(common::QUEUE_ENABLE, 1u16);
    // Whether it gives up at once or later is the device's business.
    let _ = device.start();
    device.doorbell(0).write(0, 0u16);
    time::poll(REACTION, || device.status() & NEEDS_RESET != 0);
    device.reset()
}

/// Once a reset is done, no request from before it writes to memory.
fn reset_in_flight(victim: &Victim) -> Outcome {
    for round in 0..20 {
        let mut disk = Disk::open(victim.function, NO_VECTOR)?;
        let depth = disk.depth().min(32);
        let len = SCRATCH / u64::from(depth) / 512 * 512;
        for slot in 0..depth {
            let data = victim.scratch.part(u64::from(slot) * len, len);
            disk.submit(slot, blk::IN, 0, Some(data));
        }
        disk.queue.publish();
        disk.device.reset()?;
        pattern::fill(round, 0, victim.scratch);
        ensure(
            victim.read()? == victim.sum,
            "the disk reads other data than before",
        )?;
        let intact = pattern::mismatch(round, 0, victim.scratch).is_none();
        ensure(intact, "a request from before a reset wrote to memory")?;
    }
    Ok(())
}
