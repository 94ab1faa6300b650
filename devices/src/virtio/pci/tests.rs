use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;

use super::*;
use crate::virtio::device::Activation;
use crate::virtio::rng::Rng;
use crate::virtio::testing::{Driver, EVENT_IDX, Plain, Router, VERSION_1, WRITE};

/// A device that counts how often it is started and stopped.
#[derive(Default)]
struct Counter {
    started: Arc<AtomicU32>,
    stopped: Arc<AtomicU32>,
    link: Arc<Mutex<Option<Arc<DriverLink>>>>,
}

impl VirtioDevice for Counter {
    fn id(&self) -> u16 {
        2
    }
    fn class(&self) -> u32 {
        0x01_00_00
    }
    fn features(&self) -> u64 {
        1 << 5
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![64, 16]
    }
    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    }
    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.started.fetch_add(1, Ordering::SeqCst);
        *self.link.lock().unwrap() = Some(activation.link);
        Ok(())
    }
    fn stop(&mut self) {
        self.stopped.fetch_add(1, Ordering::SeqCst);
    }
}

fn driver() -> (Driver, Counter) {
    let counter = Counter::default();
    let Counter {
        started,
        stopped,
        link,
    } = &counter;
    let device = Counter {
        started: started.clone(),
        stopped: stopped.clone(),
        link: link.clone(),
    };
    (Driver::new(Box::new(device)), counter)
}

/// The capabilities by offset and bytes.
fn capabilities(function: &VirtioPci) -> Vec<(u16, Vec<u8>)> {
    let mut all = Vec::new();
    let mut at = function.config_read(13) as u16 & 0xff;
    while at != 0 {
        let words = (at / 4..at / 4 + 5).map(|register| function.config_read(register));
        let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        let next = u16::from(bytes[1]);
        all.push((at, bytes));
        at = next;
    }
    all
}

#[test]
fn the_function_is_a_modern_virtio_device() {
    let (driver, _) = driver();
    let function = &driver.function;
    assert_eq!(function.config_read(0), 0x1042_1af4);
    assert_eq!(function.config_read(2), 0x0100_0001);
    assert_eq!(function.config_read(11), 0x0040_1af4);
    assert_eq!(function.config_read(15), 0, "no interrupt pin");
    let all = capabilities(function);
    let kinds: Vec<_> = all.iter().map(|(_, cap)| (cap[0], cap[3])).collect();
    assert_eq!(kinds[..5], [(9, 1), (9, 3), (9, 4), (9, 2), (9, 5)]);
    assert_eq!(kinds[5].0, 0x11);
    let (_, notify) = &all[3];
    assert_eq!(notify[2], 20);
    assert_eq!(notify[8..], [0, 4, 0, 0, 8, 0, 0, 0, 4, 0, 0, 0]);
    let (_, msix) = &all[5];
    assert_eq!(msix[2..4], [2, 0], "three vectors");
    let bars = function.bars();
    assert_eq!((bars.len(), bars[0].size), (1, 0x4000));
    for (_, cap) in &all[..4] {
        let word = |at: usize| u32::from_le_bytes(cap[at..at + 4].try_into().unwrap());
        assert!(u64::from(word(8)) + u64::from(word(12)) <= layout::TABLE);
    }
}

#[test]
fn doorbells_are_where_the_driver_looks_for_them() {
    let (driver, _) = driver();
    let doorbells = driver.function.doorbells();
    let places: Vec<_> = doorbells.iter().map(|d| (d.bar, d.offset)).collect();
    assert_eq!(places, [(0, 0x400), (0, 0x404)]);
    driver.function.bar_write(0, 0x404, &[1, 0]);
    assert!(doorbells[0].event.read().is_err());
    assert!(doorbells[1].event.read().is_ok());
    driver.function.bar_write(0, 0x408, &[2, 0]);
}

#[test]
fn features_are_negotiated() {
    let (mut driver, counter) = driver();
    assert_eq!(driver.offered(), 1 << 5 | VERSION_1 | EVENT_IDX | 1 << 28);
    assert_eq!(driver.negotiate(VERSION_1 | 1 << 5), 0xb);
    // Too late for another choice.
    driver.set::<4>(8, 0);
    driver.set::<4>(12, 0xffff_ffff);
    assert_eq!(driver.get::<4>(12), 1 << 5);

    assert_eq!(driver.negotiate(1 << 5), 3, "not without VERSION_1");
    assert_eq!(driver.negotiate(VERSION_1 | 1), 3, "not offered");
    driver.set::<1>(20, 0xf);
    assert_eq!(driver.status() & 4, 0, "no DRIVER_OK without FEATURES_OK");
    assert_eq!(counter.started.load(Ordering::SeqCst), 0);
}

#[test]
fn the_device_starts_once_and_stops_on_reset() {
    let (mut driver, counter) = driver();
    driver.start(0);
    driver.set::<1>(20, 0xf);
    assert_eq!(counter.started.load(Ordering::SeqCst), 1);
    let before = counter.stopped.load(Ordering::SeqCst);
    driver.set::<1>(20, 0);
    assert_eq!(counter.stopped.load(Ordering::SeqCst), before + 1);
    assert_eq!(driver.status(), 0);
    driver.set::<2>(22, 0);
    let fresh = [
        driver.get::<2>(24),
        driver.get::<2>(26),
        driver.get::<2>(28),
        driver.get::<8>(32),
    ];
    assert_eq!(fresh, [64, 0xffff, 0, 0]);
    driver.start(0);
    assert_eq!(counter.started.load(Ordering::SeqCst), 2);
}

#[test]
fn queues_are_selected_and_frozen_when_enabled() {
    let (mut driver, _) = driver();
    driver.negotiate(VERSION_1);
    assert_eq!(driver.get::<2>(18), 2);
    driver.set::<2>(22, 1);
    assert_eq!((driver.get::<2>(24), driver.get::<2>(30)), (16, 1));
    driver.set::<2>(24, 8);
    driver.set::<4>(32, 0x1000);
    driver.set::<4>(36, 1);
    assert_eq!(driver.get::<8>(32), 0x1_0000_1000);
    driver.set::<2>(28, 1);
    driver.set::<2>(24, 16);
    driver.set::<4>(32, 0x2000);
    driver.set::<2>(28, 0);
    let now = [
        driver.get::<2>(24),
        driver.get::<2>(28),
        driver.get::<8>(32),
    ];
    assert_eq!(now, [8, 1, 0x1_0000_1000]);
    driver.set::<2>(22, 2);
    assert_eq!(driver.get::<2>(24), 0, "there is no third queue");
    driver.set::<2>(24, 4);
}

#[test]
fn vectors_that_do_not_exist_become_none() {
    let (mut driver, _) = driver();
    driver.negotiate(VERSION_1);
    for at in [16, 26] {
        driver.set::<2>(at, 2);
        assert_eq!(driver.get::<2>(at), 2);
        driver.set::<2>(at, 3);
        assert_eq!(driver.get::<2>(at), 0xffff);
    }
}

#[test]
fn impossible_queues_cost_the_device() {
    let wrongs: [(u64, u64); 6] = [
        (24, 63),         // no power of two
        (24, 128),        // over the maximum
        (32, 0x1_0008),   // misaligned
        (40, 0x1_1001),   // misaligned
        (48, 0x100_0000), // no memory
        (40, 0xffff_ffff_ffff_fffe),
    ];
    for (register, value) in wrongs {
        let (mut driver, counter) = driver();
        driver.negotiate(VERSION_1);
        driver.set::<2>(22, 0);
        driver.set::<8>(32, 0x1_0000);
        driver.set::<8>(40, 0x1_1000);
        driver.set::<8>(48, 0x1_2000);
        match register {
            24 => driver.set::<2>(register, value),
            _ => driver.set::<8>(register, value),
        }
        driver.set::<2>(28, 1);
        driver.set::<1>(20, 0xf);
        assert_eq!(driver.status(), 0x4f, "{register} {value:#x}");
        assert_eq!(counter.started.load(Ordering::SeqCst), 0);
    }
}

#[test]
fn device_configuration_is_read_and_its_changes_announced() {
    let (mut driver, counter) = driver();
    driver.start(0);
    assert_eq!(driver.get::<4>(0x200), 0x0403_0201);
    assert_eq!(driver.get::<4>(0x208), 0x0a09, "zeros after the end");
    let generation = driver.get::<1>(21);
    counter
        .link
        .lock()
        .unwrap()
        .as_ref()
        .unwrap()
        .config_changed();
    driver.wait_vector(0);
    assert_ne!(driver.get::<1>(21), generation);
    assert_eq!(driver.get::<1>(0x100), 2);
    assert_eq!(driver.get::<1>(0x100), 0, "reading acknowledges");
}

#[test]
fn needs_reset_is_the_devices_to_say() {
    let (mut driver, counter) = driver();
    driver.start(0);
    driver.set::<1>(20, 0x4f);
    assert_eq!(driver.status(), 0xf);
    counter.link.lock().unwrap().as_ref().unwrap().fail(&"test");
    driver.wait_for_needs_reset();
    driver.set::<1>(20, 0xf);
    assert_eq!(driver.status(), 0x4f);
}

#[test]
fn the_window_in_configuration_space_reaches_the_bar() {
    let (mut driver, _) = driver();
    driver.negotiate(VERSION_1);
    let (at, _) = capabilities(&driver.function)[4];
    let write = |offset: u16, value: u32| {
        driver
            .function
            .config_write(at + offset, &value.to_le_bytes());
    };
    write(8, 18);
    write(12, 2);
    assert_eq!(
        driver.function.config_read((at + 16) / 4),
        2,
        "number of queues"
    );
    write(8, 22);
    write(16, 1);
    assert_eq!(driver.get::<2>(22), 1, "queue select");
    for (bar, offset, len) in [(1, 0, 4), (0, 2, 4), (0, 0, 3), (0, 0x4000, 4), (0, 0, 0)] {
        driver.function.config_write(at + 4, &[bar]);
        write(8, offset);
        write(12, len);
        write(16, 0xffff_ffff);
        driver.function.config_read((at + 16) / 4);
    }
}

#[test]
fn a_reset_in_flight_is_quiet_afterwards() {
    let mut driver = Driver::new(Box::new(Rng::new()));
    for _ in 0..50 {
        driver.start(EVENT_IDX);
        let at = driver.alloc(4096);
        for n in 0..32 {
            driver.add(0, &[(at + n * 128, 128, WRITE)]);
        }
        driver.kick(0);
        driver.set::<1>(20, 0);
        driver.memory_is_quiet(at, 4096);
    }
}

impl Driver {
    /// The device no longer changes that memory.
    fn memory_is_quiet(&self, at: u64, len: usize) {
        let before = self.bytes(at, len);
        std::thread::yield_now();
        assert_eq!(self.bytes(at, len), before);
    }
}

/// An access to the function.
#[derive(Clone, Debug)]
enum Access {
    ConfigWrite(u16, Vec<u8>),
    ConfigRead(u16),
    Write(u64, Vec<u8>),
    Read(u64, usize),
}

fn access() -> impl Strategy<Value = Access> {
    let data = || {
        let byte = prop_oneof![Just(0), Just(1), Just(0xf), Just(0xff), any::<u8>()];
        (proptest::collection::vec(byte, 8), 0..4_usize).prop_map(|(mut data, log)| {
            data.truncate(1 << log);
            data
        })
    };
    let offset = || prop_oneof![0..64_u64, 0..0x5000_u64, any::<u64>()];
    prop_oneof![
        (0..300_u16, data()).prop_map(|(at, data)| Access::ConfigWrite(at, data)),
        any::<u16>().prop_map(Access::ConfigRead),
        (offset(), data()).prop_map(|(at, data)| Access::Write(at, data)),
        (offset(), 0..9_usize).prop_map(|(at, len)| Access::Read(at, len)),
    ]
}

proptest! {
    #[test]
    fn any_access_is_survived(accesses in proptest::collection::vec(access(), 0..200)) {
        let memory = Memory::from_ranges(&[(vm_memory::GuestAddress(0), 0x10_0000)]).unwrap();
        let router = Arc::<Router>::default();
        let function = VirtioPci::new(Box::new(Rng::new()), memory, router, Arc::new(Plain)).unwrap();
        for access in accesses {
            match access {
                Access::ConfigWrite(at, data) => function.config_write(at, &data),
                Access::ConfigRead(register) => drop(function.config_read(register)),
                Access::Write(at, data) => function.bar_write(0, at, &data),
                Access::Read(at, len) => function.bar_read(0, at, &mut vec![0; len]),
            }
        }
        function.bar_write(0, 20, &[0]);
        let mut status = [0xff];
        function.bar_read(0, 20, &mut status);
        prop_assert_eq!(status, [0]);
    }
}
