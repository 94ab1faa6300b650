use proptest::prelude::*;

use super::*;

const IDENTITY: Identity = Identity {
    vendor: 0x1af4,
    device: 0x1042,
    revision: 1,
    class: 0x01_00_00,
    subsystem_vendor: 0x1af4,
    subsystem: 0x40,
};

fn configuration() -> Configuration {
    let mut configuration = Configuration::new(&IDENTITY);
    configuration.add_memory_bar(0, 0x4000).unwrap();
    configuration
}

#[test]
fn header_says_who_it_is() {
    let configuration = configuration();
    assert_eq!(configuration.read(0), 0x1042_1af4);
    assert_eq!(configuration.read(2), 0x0100_0001);
    assert_eq!(configuration.read(11), 0x0040_1af4);
    assert_eq!(
        configuration.read(3) >> 16 & 0xff,
        0,
        "type 0, one function"
    );
    assert_eq!(configuration.read(15) >> 8 & 0xff, 0, "no interrupt pin");
    assert_eq!(configuration.read(64), 0);
    assert_eq!(configuration.read(u16::MAX), 0);
}

#[test]
fn identity_cannot_be_written() {
    let mut configuration = configuration();
    configuration.write(0, &[0xff; 4]);
    configuration.write(8, &[0xff; 4]);
    assert_eq!(configuration.read(0), 0x1042_1af4);
    assert_eq!(configuration.read(2), 0x0100_0001);
}

#[test]
fn bars_are_sized_by_writing_ones() {
    let mut configuration = configuration();
    configuration.write(0x10, &[0xff; 4]);
    assert_eq!(configuration.read(4), 0xffff_c000);
    configuration.write(0x14, &[0xff; 4]);
    assert_eq!(configuration.read(5), 0, "absent");
    configuration.write(0x10, &0xc000_5678_u32.to_le_bytes());
    assert_eq!(configuration.read(4), 0xc000_4000);
    let bar = BarMapping {
        index: 0,
        address: 0xc000_4000,
        size: 0x4000,
    };
    assert_eq!(configuration.bars(), [bar]);
}

#[test]
fn bars_decode_while_memory_is_enabled() {
    let mut configuration = configuration();
    assert!(configuration.mappings().is_empty());
    configuration.write(0x04, &[0x02]);
    assert_eq!(configuration.mappings(), configuration.bars());
    configuration.write(0x04, &0xffff_u16.to_le_bytes());
    assert_eq!(configuration.read(1) & 0xffff, 0x0406);
    configuration.write(0x04, &[0, 0]);
    assert!(configuration.mappings().is_empty());
}

#[test]
fn impossible_bars_are_refused() {
    let mut configuration = configuration();
    for (index, size) in [(0, 0x1000), (6, 0x1000), (1, 0), (1, 8), (1, 0x1001)] {
        assert!(
            configuration.add_memory_bar(index, size).is_err(),
            "{index} {size}"
        );
    }
}

#[test]
fn capabilities_are_linked() {
    let mut configuration = configuration();
    let first = configuration.add_capability(0x09, &[7, 1, 2], &[]).unwrap();
    let second = configuration
        .add_capability(0x11, &[0; 10], &[0, 0xc0])
        .unwrap();
    assert_eq!(configuration.read(1) >> 20 & 1, 1);
    assert_eq!(configuration.read(13) & 0xff, first as u32);
    assert_eq!(configuration.bytes(first, 5), [0x09, second as u8, 7, 1, 2]);
    assert_eq!(configuration.bytes(second, 2), [0x11, 0]);
    configuration.write(second as u16, &[0xff; 12]);
    assert_eq!(configuration.bytes(second, 5), [0x11, 0, 0, 0xc0, 0]);
    assert_eq!(second % 4, 0);
    assert_eq!(
        configuration.add_capability(9, &[0; 200], &[]),
        Err(Error::Capability(202))
    );
}

proptest! {
    #[test]
    fn writes_change_only_what_is_writable(
        writes in proptest::collection::vec((any::<u16>(), any::<[u8; 4]>(), 1..=4_usize), 0..64),
    ) {
        let mut configuration = configuration();
        let fresh = configuration.clone();
        for (offset, data, len) in writes {
            configuration.write(offset, &data[..len]);
        }
        for (at, writable) in fresh.writable.iter().enumerate() {
            let changed = configuration.bytes[at] ^ fresh.bytes[at];
            prop_assert_eq!(changed & !writable, 0);
        }
        configuration.mappings();
    }
}
