use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use crate::pci::PciFunction;
use crate::virtio::rng::Rng;
use crate::virtio::testing::{Driver, EVENT_IDX, INDIRECT, NEXT, WRITE};

fn driver(features: u64) -> Driver {
    let mut driver = Driver::new(Box::new(Rng::new()));
    driver.start(features);
    driver
}

/// The device ends after what `wrong` does to its queue, and works again after a reset.
fn costs_the_device(wrong: impl FnOnce(&mut Driver)) {
    let mut driver = driver(0);
    wrong(&mut driver);
    driver.kick(0);
    driver.wait_for_needs_reset();
    assert_eq!(driver.used(0), 0);
    driver.start(EVENT_IDX);
    let at = driver.alloc(8);
    driver.add(0, &[(at, 8, WRITE)]);
    assert_eq!(driver.run(0, 1)[0].1, 8);
}

#[test]
fn a_looping_chain_costs_the_device() {
    costs_the_device(|driver| {
        let at = driver.alloc(8);
        driver.descriptor(0, 0, (at, 8, WRITE | NEXT, 1));
        driver.descriptor(0, 1, (at, 8, WRITE | NEXT, 0));
        driver.offer(0, 0);
    });
}

#[test]
fn a_chain_that_leaves_the_table_costs_the_device() {
    costs_the_device(|driver| {
        driver.descriptor(0, 0, (0, 8, WRITE | NEXT, 64));
        driver.offer(0, 0);
    });
    costs_the_device(|driver| driver.offer(0, 64));
    costs_the_device(|driver| driver.offer(0, 0xffff));
}

#[test]
fn a_readable_buffer_after_a_writable_one_costs_the_device() {
    costs_the_device(|driver| {
        driver.add(0, &[(0x1000, 8, WRITE), (0x1000, 8, 0)]);
    });
}

#[test]
fn an_index_past_the_ring_costs_the_device() {
    costs_the_device(|driver| driver.set_available(0, 65));
    costs_the_device(|driver| driver.set_available(0, 0xffff));
}

#[test]
fn a_chain_over_4_gib_costs_the_device() {
    costs_the_device(|driver| {
        driver.add(0, &[(0, u32::MAX, WRITE), (0, 1, WRITE)]);
    });
}

#[test]
fn indirect_tables_work_and_do_not_nest() {
    let mut driver = driver(EVENT_IDX);
    let (table, at) = (driver.alloc(64), driver.alloc(16));
    driver.raw_descriptor(table, (at, 8, WRITE | NEXT, 1));
    driver.raw_descriptor(table + 16, (at + 8, 8, WRITE, 0));
    driver.add(0, &[(table, 32, INDIRECT)]);
    assert_eq!(driver.run(0, 1)[0].1, 16);

    for (address, len) in [
        (table, 32),
        (table, 31),
        (0xffff_ffff_ffff_fff0, 32),
        (table, 0),
    ] {
        costs_the_device(|driver| {
            driver.raw_descriptor(table, (table, 32, INDIRECT, 0));
            driver.add(0, &[(address, len, INDIRECT)]);
        });
    }
}

#[test]
fn an_indirect_chain_is_no_longer_than_the_queue() {
    costs_the_device(|driver| {
        let table = driver.alloc(65 * 16);
        for n in 0..65 {
            let flags = if n < 64 { WRITE | NEXT } else { WRITE };
            driver.raw_descriptor(table + n * 16, (0x1000, 1, flags, n as u16 + 1));
        }
        driver.add(0, &[(table, 65 * 16, INDIRECT)]);
    });
}

#[test]
fn interrupts_are_left_out_when_the_driver_declines() {
    let mut driver = driver(0);
    let at = driver.alloc(8);
    // VRING_AVAIL_F_NO_INTERRUPT of queue 0.
    let flags = GuestAddress(0x1_0000 + 0x1000);
    driver.memory.write_obj(1_u16, flags).unwrap();
    driver.add(0, &[(at, 8, WRITE)]);
    driver.kick(0);
    while driver.used(0) == 0 {
        std::thread::yield_now();
    }
    // The decision comes after the used index, and before the thread's end.
    driver.function.stop();
    assert_eq!(driver.get::<1>(0x100) & 1, 0, "interrupt status");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the rings hold, the device answers, stops or ignores it, and a reset mends it.
    #[test]
    fn any_ring_is_survived(
        descriptors in proptest::collection::vec(
            (0..0x100_0100_u64, 0..0x2_0000_u32, 0..8_u16, 0..70_u16), 64),
        heads in proptest::collection::vec(0..80_u16, 0..32),
        index in prop_oneof![0..70_u16, any::<u16>()],
        event_idx in any::<bool>(),
    ) {
        let mut driver = driver(if event_idx { EVENT_IDX } else { 0 });
        for (n, descriptor) in descriptors.into_iter().enumerate() {
            driver.descriptor(0, n as u16, descriptor);
        }
        for head in heads {
            driver.offer(0, head);
        }
        driver.set_available(0, index);
        driver.kick(0);
        driver.settle(0, index);
        driver.start(EVENT_IDX);
        let at = driver.alloc(8);
        driver.add(0, &[(at, 8, WRITE)]);
        prop_assert_eq!(driver.run(0, 1)[0].1, 8);
    }
}
