use super::*;
use crate::virtio::testing::{Driver, END, EVENT_IDX, WRITE};

fn driver(features: u64) -> Driver {
    let mut driver = Driver::new(Box::new(Rng::new()));
    driver.start(features);
    driver
}

#[test]
fn buffers_are_filled() {
    for features in [0, EVENT_IDX] {
        let mut driver = driver(features);
        for _ in 0..200 {
            let at = driver.put(&[0; 64]);
            let head = driver.add(0, &[(at, 32, WRITE), (at + 32, 32, WRITE)]);
            assert_eq!(driver.run(0, 1), [(head, 64)]);
            // 32 zero bytes in a row are less likely than a broken machine.
            assert_ne!(driver.bytes(at, 32), [0; 32]);
            assert_ne!(driver.bytes(at + 32, 32), [0; 32]);
        }
    }
}

#[test]
fn a_request_gets_a_bounded_amount() {
    let mut driver = driver(EVENT_IDX);
    let at = driver.alloc(1 << 20);
    driver.add(0, &[(at, 1 << 20, WRITE)]);
    assert_eq!(driver.run(0, 1)[0].1, 64 << 10);
    assert_eq!(driver.bytes(at + (64 << 10), 16), [0; 16]);
}

#[test]
fn a_buffer_outside_of_memory_costs_the_device() {
    let mut driver = driver(0);
    driver.add(0, &[(END, 64, WRITE)]);
    driver.kick(0);
    driver.wait_for_needs_reset();
    driver.start(0);
    let at = driver.alloc(8);
    driver.add(0, &[(at, 8, WRITE)]);
    assert_eq!(driver.run(0, 1).len(), 1);
}
