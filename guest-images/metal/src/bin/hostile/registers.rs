//! Registers written out of order, and at random.

use metal::memory::Region;
use metal::outcome::Outcome;
use metal::pci::Bar;
use metal::random::Random;
use metal::virtio::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, Device, FEATURES_OK, NO_VECTOR, VERSION_1, common,
};

use crate::Victim;

const MSIX: u8 = 0x11;

/// What a driver does with a device that was reset.
type Order = fn(&Device) -> Outcome;

/// Tries each on its own.
pub(crate) fn attack(victim: &mut Victim, random: &mut Random, rounds: u64) {
    let orders: &[(&str, Order)] = &[
        ("started at once", |device| {
            device.set_status(0xff);
            Ok(())
        }),
        ("started with no features", |device| {
            device.queue(0, 16, NO_VECTOR)?.ring();
            device.set_status(ACKNOWLEDGE | DRIVER | DRIVER_OK);
            Ok(())
        }),
        ("all features taken", |device| {
            for select in [0u32, 1, 2, u32::MAX] {
                device.common.write(common::DRIVER_FEATURE_SELECT, select);
                device.common.write(common::DRIVER_FEATURE, u32::MAX);
            }
            device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
            device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
            Ok(())
        }),
        ("started without a queue", |device| {
            device.negotiate(VERSION_1)?;
            device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
            device.doorbell(0).write(0, 0u16);
            Ok(())
        }),
        ("queue sizes of all kinds", |device| {
            device.negotiate(0)?;
            for size in [0u16, 3, 1 << 15, 0xffff] {
                device.common.write(common::QUEUE_SIZE, size);
                device.common.write(common::QUEUE_ENABLE, 1u16);
            }
            device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
            device.doorbell(0).write(0, 0u16);
            Ok(())
        }),
        ("queues that do not exist", |device| {
            device.negotiate(0)?;
            for queue in [1u16, 64, 0x8000, 0xffff] {
                device.common.write(common::QUEUE_SELECT, queue);
                device.common.write(common::QUEUE_SIZE, 16u16);
                device.common.write(common::QUEUE_MSIX_VECTOR, 0xfffeu16);
                device.common.write(common::QUEUE_ENABLE, 1u16);
                device.notify.write(0, queue);
            }
            device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
            Ok(())
        }),
    ];
    for &(name, order) in orders {
        let outcome = Device::open(victim.function).and_then(|device| {
            device.reset()?;
            order(&device)?;
            device.reset()
        });
        victim.report_on(name, outcome);
    }
    let outcome = configuration(victim, random, rounds);
    victim.report_on("random configuration writes", outcome);
    let outcome = registers(victim, random, rounds);
    victim.report_on("random register writes", outcome);
}

/// Writes at random to configuration space, then sets it right.
fn configuration(victim: &Victim, random: &mut Random, rounds: u64) -> Outcome {
    let function = victim.function;
    let mut bars = [None::<Bar>; 6];
    bars.iter_mut()
        .zip(function.bars())
        .for_each(|(slot, bar)| *slot = Some(bar));
    let msix = function
        .capabilities()
        .find(|&(id, _)| id == MSIX)
        .map(|(_, offset)| offset);
    for _ in 0..rounds {
        let (register, value) = (random.below(256) as u8, random.below(1 << 32) as u32);
        // With MSI-X on, this program would send itself interrupts of every kind.
        if msix.is_some_and(|msix| register & !3 == msix) {
            continue;
        }
        match random.below(3) {
            0 => function.write8(register, value as u8),
            1 => function.write16(register & !1, value as u16),
            _ => function.write32(register & !3, value),
        }
    }
    let command = function.command();
    function.set_command(0);
    bars.iter()
        .flatten()
        .for_each(|bar| function.set_bar(*bar, bar.address));
    function.set_command(command);
    Ok(())
}

/// Reads and writes at random in every register, in every width, while the device runs.
fn registers(victim: &Victim, random: &mut Random, rounds: u64) -> Outcome {
    let device = Device::open(victim.function)?;
    let config = device.config.ok_or("a disk has no configuration")?;
    device.reset()?;
    for _ in 0..rounds {
        let (region, rings) = match random.below(3) {
            0 => (device.common, common::QUEUE_DESC..common::QUEUE_DEVICE + 8),
            1 => (config, 0..0),
            _ => (device.notify, 0..0),
        };
        let offset = random.below(region.size().into()) & !7;
        // Rings at random places would let the device write over this program.
        if !rings.contains(&offset) {
            poke(region, offset, random);
        }
    }
    device.reset()
}

/// One write and one read somewhere in the eight bytes at an offset, or what there is of them.
fn poke(region: Region, offset: u64, random: &mut Random) {
    let value = random.below(u64::MAX);
    let left = u64::from(region.size()) - offset;
    match random.below(4) {
        _ if left < 8 => {
            let offset = offset + random.below(left);
            region.write(offset, value as u8);
            region.read::<u8>(offset);
        }
        0 => {
            let offset = offset + random.below(8);
            region.write(offset, value as u8);
            region.read::<u8>(offset);
        }
        1 => {
            let offset = offset + random.below(4) * 2;
            region.write(offset, value as u16);
            region.read::<u16>(offset);
        }
        2 => {
            let offset = offset + random.below(2) * 4;
            region.write(offset, value as u32);
            region.read::<u32>(offset);
        }
        _ if (region.address() + offset).is_multiple_of(8) => {
            region.write(offset, value);
            region.read::<u64>(offset);
        }
        _ => {}
    }
}
