use std::sync::Mutex;

use super::*;

/// Reads back the offset; remembers what was written.
#[derive(Default)]
struct Probe(Mutex<Vec<(u64, Vec<u8>)>>);

impl BusDevice for Probe {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap().push((offset, data.to_vec()));
    }
}

fn probe() -> Arc<Probe> {
    Arc::default()
}

#[test]
fn accesses_reach_the_device_with_their_offset() {
    let bus = Bus::default();
    let device = probe();
    bus.insert(0x3f8, 8, device.clone()).unwrap();
    let mut data = [0; 2];
    assert!(bus.read(0x3fe, &mut data));
    assert_eq!(data, [6, 6]);
    assert!(bus.write(0x3f8, &[1, 2, 3]));
    assert_eq!(*device.0.lock().unwrap(), [(0, vec![1, 2, 3])]);
}

#[test]
fn what_nobody_claims_reads_as_ones() {
    let bus = Bus::default();
    bus.insert(0x10, 0x10, probe()).unwrap();
    for addr in [0, 0xf, 0x20, u64::MAX] {
        let mut data = [0];
        assert!(!bus.read(addr, &mut data), "{addr:#x}");
        assert_eq!(data, [0xff]);
        assert!(!bus.write(addr, &data));
    }
}

#[test]
fn an_access_over_a_range_end_is_unclaimed() {
    let bus = Bus::default();
    bus.insert(0x10, 0x10, probe()).unwrap();
    bus.insert(0x20, 0x10, probe()).unwrap();
    let mut data = [0; 4];
    assert!(!bus.read(0x1e, &mut data));
    assert_eq!(data, [0xff; 4]);
    assert!(!bus.read(0xe, &mut data));
    assert!(!bus.write(u64::MAX, &[0, 0]));
    assert!(!bus.write(0x10, &[]));
}

#[test]
fn overlaps_are_refused() {
    let bus = Bus::default();
    bus.insert(0x10, 0x10, probe()).unwrap();
    for (base, len) in [(0x10, 0x10), (0xf, 2), (0x1f, 1), (0, 0x100), (0x14, 4)] {
        let error = bus.insert(base, len, probe()).unwrap_err();
        assert_eq!(
            error,
            Error::Overlap {
                base,
                len,
                other: 0x10
            }
        );
    }
    bus.insert(0xf, 1, probe()).unwrap();
    bus.insert(0x20, 1, probe()).unwrap();
}

#[test]
fn ranges_must_exist() {
    let bus = Bus::default();
    assert!(bus.insert(5, 0, probe()).is_err());
    assert!(bus.insert(u64::MAX, 2, probe()).is_err());
    bus.insert(u64::MAX, 1, probe()).unwrap();
    assert!(bus.read(u64::MAX, &mut [0]));
}

#[test]
fn a_removed_range_is_free_again() {
    let bus = Bus::default();
    bus.insert(0x10, 0x10, probe()).unwrap();
    assert!(bus.remove(0x11).is_none());
    assert!(bus.remove(0x10).is_some());
    assert!(!bus.read(0x10, &mut [0]));
    bus.insert(0x8, 0x10, probe()).unwrap();
}
