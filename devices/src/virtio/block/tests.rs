use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::{Engine, Options};
use crate::virtio::device::feature;
use crate::virtio::testing::{END, EVENT_IDX, NEXT, SEAM, WRITE};
use support::*;

mod engines;
mod support;

#[test]
fn the_configuration_tells_the_geometry() {
    let bench = bench();
    let driver = &bench.driver;
    assert_eq!(driver.get::<8>(0x200), SIZE / 512);
    assert_eq!(driver.get::<4>(0x20c), 254, "segments");
    assert_eq!(driver.get::<4>(0x214), 512, "logical block");
    assert_eq!(driver.get::<1>(0x218), 3, "physical block of 4 KiB");
    assert_eq!(driver.get::<4>(0x21c), 128, "best size");
    assert_eq!(driver.get::<4>(0x22c), 128, "discard alignment");
    assert_eq!(driver.offered() & feature(5), 0);
}

#[test]
fn reads_go_by_every_way() {
    for way in WAYS {
        let mut bench = bench_by(way);
        // Direct; zeros over the end of an extent; by buffer; past the end of the file; all of it.
        let places = [
            (2 * MIB, 4096),
            (MIB - 512, 1024),
            (2 * MIB - 1024, 4096),
            (3 * MIB, 65536),
        ];
        for (offset, len) in places
            .into_iter()
            .chain([(6 * MIB, 4096), (0, 3 * MIB as usize)])
        {
            let expected = bench.disk.content(offset, len);
            let (status, data) = bench.read(offset, len);
            assert_eq!(status, OK);
            assert!(data == expected, "{len} bytes at {offset}");
        }
        assert_eq!(bench.stats.written(), 0);
        assert_eq!(
            bench.stats.read(),
            4096 + 1024 + 4096 + 65536 + 4096 + 3 * MIB
        );
    }
}

#[test]
fn writes_go_by_every_way() {
    for way in WAYS {
        let mut bench = bench_by(way);
        for offset in [0, MIB, 2 * MIB, 3 * MIB, 4 * MIB - 4096, 8 * MIB - 8192] {
            let data: Vec<u8> = (0..8192).map(|n| (n * 7 + offset / 512) as u8).collect();
            assert_eq!(bench.write(offset, &data), OK);
            // The second MiB reads as zeros whatever is written.
            if offset / MIB != 1 {
                assert!(bench.disk.content(offset, 8192) == data, "at {offset}");
            }
        }
        assert_eq!(bench.stats.written(), 6 * 8192);
        assert_eq!(bench.disk.flushes(), 0);
    }
}

#[test]
fn buffers_may_be_scattered_over_regions() {
    for way in WAYS {
        let mut bench = bench_by(way);
        let at = SEAM - 1000;
        let far = bench.driver.alloc(24);
        let pieces = [
            (at, 2000, WRITE),
            (far, 24, WRITE),
            (SEAM + 4096, 1048, WRITE),
        ];
        assert_eq!(bench.request(0, 2 * MIB / 512, &pieces), OK);
        let mut data = bench.driver.bytes(at, 2000);
        data.extend(bench.driver.bytes(far, 24));
        data.extend(bench.driver.bytes(SEAM + 4096, 1048));
        assert!(data == bench.disk.content(2 * MIB, 3072));
        assert_eq!(
            bench.request(1, 5 * MIB / 512, &pieces.map(|(at, len, _)| (at, len, 0))),
            OK
        );
        assert!(bench.disk.content(5 * MIB, 3072) == data);
    }
}

#[test]
fn headers_and_status_may_be_anywhere_in_the_chain() {
    let mut bench = bench();
    let header = bench.header(0, 2 * MIB / 512);
    let data = bench.driver.alloc(513);
    bench.driver.add(
        0,
        &[(header, 5, 0), (header + 5, 11, 0), (data, 513, WRITE)],
    );
    assert_eq!(bench.driver.run(0, 1)[0].1, 513);
    assert_eq!(
        bench.driver.bytes(data, 512),
        bench.disk.content(2 * MIB, 512)
    );
    assert_eq!(bench.driver.bytes(data + 512, 1), [OK]);
}

#[test]
fn many_requests_are_each_answered_once() {
    for features in [0, EVENT_IDX] {
        let mut bench = bench_with(false, FLUSH | features, Options::default());
        let status = bench.driver.put(&[0xaa; 4096]);
        let data = bench.driver.alloc(512);
        for round in 0..100 {
            let mut heads = Vec::new();
            for n in 0..20 {
                let header = bench.header(0, 2 * MIB / 512 + n);
                let at = status + n;
                let pieces = [(header, 16, 0), (data, 512, WRITE), (at, 1, WRITE)];
                heads.push((bench.driver.add(0, &pieces), 513));
            }
            // In whichever order.
            let mut answered = bench.driver.run(0, 20);
            heads.sort_unstable();
            answered.sort_unstable();
            assert_eq!(answered, heads, "round {round}");
        }
    }
}

#[test]
fn flush_is_passed_on() {
    for way in WAYS {
        let mut bench = bench_by(way);
        assert_eq!(bench.request(4, 0, &[]), OK);
        assert_eq!(bench.disk.flushes(), 1);
    }
}

#[test]
fn a_flush_that_is_a_sync_is_the_rings() {
    for way in WAYS {
        let mut bench = bench_by(way);
        bench.disk.sync_only.store(true, Ordering::SeqCst);
        assert_eq!(bench.request(4, 0, &[]), OK);
        let syncs = match way.engine {
            Engine::IoUring => 1,
            Engine::Threads => 0,
        };
        assert_eq!(bench.disk.syncs.load(Ordering::SeqCst), syncs, "{way:?}");
        assert_eq!(bench.disk.flushes(), 1 - syncs, "{way:?}");
        if syncs == 1 {
            // What failed once is not tried again.
            bench.disk.fails.store(true, Ordering::SeqCst);
            assert_eq!(bench.request(4, 0, &[]), IOERR);
            assert_eq!(bench.disk.flushes(), 0);
        }
    }
}

#[test]
fn a_driver_without_flush_gets_write_through() {
    let mut bench = bench_with(false, 0, Options::default());
    assert_eq!(bench.write(0, &[1; 512]), OK);
    assert_eq!(bench.disk.flushes(), 1);
    bench.read(0, 512);
    assert_eq!(bench.disk.flushes(), 1);

    let options = Options {
        never_sync: true,
        ..Options::default()
    };
    let mut bench = bench_with(false, 0, options);
    assert_eq!(bench.write(0, &[1; 512]), OK);
    assert_eq!(bench.disk.flushes(), 0);
}

#[test]
fn the_serial_number_is_told() {
    let mut bench = bench();
    let at = bench.driver.put(&[0xee; 24]);
    assert_eq!(bench.request(8, 0, &[(at, 20, WRITE)]), OK);
    assert_eq!(bench.driver.bytes(at, 21), b"cow-serial-number-01\xee");
    assert_eq!(bench.request(8, 0, &[(at, 3, WRITE)]), OK);
}

#[test]
fn discard_and_write_zeroes_name_ranges() {
    for way in WAYS {
        let mut bench = bench_by(way);
        assert_eq!(bench.range(11, (128, 256, 0)), OK);
        assert_eq!(bench.range(13, (8, 8, 1)), OK);
        assert_eq!(bench.range(13, (8, 8, 0)), OK);
        let expected = [
            ("discard", 65536, 131072, true),
            ("zero", 4096, 4096, true),
            ("zero", 4096, 4096, false),
        ];
        assert_eq!(*bench.disk.zeroed.lock().unwrap(), expected);

        assert_eq!(bench.range(11, (128, 256, 1)), UNSUPPORTED);
        assert_eq!(bench.range(13, (128, 256, 2)), UNSUPPORTED);
        assert_eq!(bench.range(13, (SIZE / 512, 1, 0)), IOERR);
        assert_eq!(bench.range(13, (u64::MAX, 1, 0)), IOERR);
        assert_eq!(bench.range(13, (0, u32::MAX, 0)), IOERR);
        let at = bench.driver.put(&[0; 17 * 16]);
        assert_eq!(
            bench.request(13, 0, &[(at, 17 * 16, 0)]),
            IOERR,
            "too many ranges"
        );
        assert_eq!(bench.request(13, 0, &[(at, 15, 0)]), IOERR);
        assert_eq!(bench.request(13, 0, &[]), IOERR);
        assert_eq!(bench.disk.zeroed.lock().unwrap().len(), 3);
    }
}

#[test]
fn requests_outside_of_the_disk_fail() {
    let mut bench = bench();
    assert_eq!(bench.read(SIZE - 512, 512).0, OK);
    assert_eq!(bench.read(SIZE - 512, 1024).0, IOERR);
    assert_eq!(bench.read(SIZE, 512).0, IOERR);
    let at = bench.driver.alloc(512);
    for sector in [u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(bench.request(0, sector, &[(at, 512, WRITE)]), IOERR);
        assert_eq!(bench.request(1, sector, &[(at, 512, 0)]), IOERR);
    }
}

#[test]
fn odd_lengths_fail() {
    let mut bench = bench();
    let at = bench.driver.alloc(1024);
    for len in [1, 511, 513] {
        assert_eq!(bench.request(0, 0, &[(at, len, WRITE)]), IOERR);
        assert_eq!(bench.request(1, 0, &[(at, len, 0)]), IOERR);
    }
    assert_eq!(
        bench.request(0, 0, &[]),
        OK,
        "nothing is a number of sectors"
    );
}

#[test]
fn buffers_outside_of_memory_fail() {
    let mut bench = bench();
    for at in [END, END - 512, u64::MAX - 511, u64::MAX] {
        assert_eq!(bench.request(0, 0, &[(at, 1024, WRITE)]), IOERR);
        assert_eq!(bench.request(1, 0, &[(at, 1024, 0)]), IOERR);
    }
    for at in [END, END - 16, u64::MAX] {
        assert_eq!(bench.request(8, 0, &[(at, 1024, WRITE)]), IOERR);
        assert_eq!(bench.request(13, 0, &[(at, 32, 0)]), IOERR);
    }
    // Absurd lengths, in memory or not.
    assert_eq!(bench.request(0, 0, &[(0, 0xffff_fe00, WRITE)]), IOERR);
    assert_eq!(bench.request(1, 0, &[(0, 0xffff_fe00, 0)]), IOERR);
    assert_eq!(bench.read(0, 512).0, OK);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut bench = bench_with(true, FLUSH, Options::default());
    assert_ne!(bench.driver.offered() & feature(5), 0);
    assert_eq!(bench.driver.offered() & DISCARD, 0);
    let before = bench.disk.content(2 * MIB, 512);
    assert_eq!(bench.write(2 * MIB, &[1; 512]), IOERR);
    assert_eq!(bench.range(11, (0, 8, 0)), IOERR);
    assert_eq!(bench.range(13, (0, 8, 0)), IOERR);
    assert_eq!(bench.disk.content(2 * MIB, 512), before);
    assert_eq!(bench.read(2 * MIB, 512), (OK, before));
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut bench = bench();
    for kind in [2, 14, 15, 0xffff_ffff] {
        assert_eq!(bench.request(kind, 0, &[]), UNSUPPORTED);
    }
}

#[test]
fn a_failing_disk_fails_the_request_only() {
    for way in WAYS {
        let mut bench = bench_by(way);
        bench.disk.fails.store(true, Ordering::SeqCst);
        assert_eq!(bench.read(0, 512).0, IOERR);
        assert_eq!(bench.stats.failures(), 1);
        bench.disk.fails.store(false, Ordering::SeqCst);
        assert_eq!(bench.read(0, 512).0, OK);
    }
}

#[test]
fn a_request_without_header_or_status_costs_the_device() {
    for pieces in [
        vec![(0x1000, 15, 0), (0x2000, 513, WRITE)],
        vec![(0x1000, 16, 0), (0x2000, 512, 0)],
        vec![(0x1000, 16, 0), (END, 1, WRITE)],
        vec![(END, 16, 0), (0x1000, 1, WRITE)],
    ] {
        let mut bench = bench();
        bench.driver.add(0, &pieces);
        bench.driver.kick(0);
        bench.driver.wait_for_needs_reset();
        bench.driver.start(FLUSH);
        assert_eq!(bench.read(0, 512).0, OK);
    }
}

#[test]
fn a_reset_waits_for_the_request_in_flight() {
    for way in WAYS {
        let mut bench = bench_by(way);
        let (header, data) = (
            bench.header(0, 3 * MIB / 512),
            bench.driver.put(&[0x55; 513]),
        );
        *bench.disk.gate.0.lock().unwrap() = false;
        bench.driver.add(0, &[(header, 16, 0), (data, 513, WRITE)]);
        bench.driver.kick(0);
        let function = bench.driver.function.clone();
        let reset = std::thread::spawn(move || {
            use crate::pci::PciFunction;
            function.bar_write(0, 20, &[0]);
        });
        assert_eq!(bench.driver.bytes(data, 513), [0x55; 513]);
        *bench.disk.gate.0.lock().unwrap() = true;
        bench.disk.gate.1.notify_all();
        reset.join().unwrap();
        // Answered as a whole or not begun: and nothing moves any more.
        let after = bench.driver.bytes(data, 513);
        let mut answered = bench.disk.content(3 * MIB, 512);
        answered.push(OK);
        assert!(after == answered || after == [0x55; 513]);
        bench.driver.start(FLUSH);
        assert_eq!(bench.read(0, 512).0, OK);
    }
}

#[test]
fn a_chain_with_a_status_in_a_loop_costs_the_device() {
    let mut bench = bench();
    bench.driver.descriptor(0, 0, (0x1000, 16, NEXT, 0));
    bench.driver.offer(0, 0);
    bench.driver.kick(0);
    bench.driver.wait_for_needs_reset();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever a request says, it is answered or costs the device, which a reset mends; and
    /// nothing outside of the disk's file changes its size.
    #[test]
    fn any_request_is_survived(
        kind in prop_oneof![0..16_u32, any::<u32>()],
        sector in prop_oneof![0..SIZE / 512 + 2, any::<u64>()],
        pieces in proptest::collection::vec(
            (
                prop_oneof![
                    Just(END - 700),
                    Just(SEAM - 700),
                    0x50_0000..0x60_0000_u64,
                    any::<u64>(),
                ],
                prop_oneof![Just(512), Just(1024), Just(16), 0..5000_u32, any::<u32>()],
                prop_oneof![Just(0), Just(WRITE)],
            ),
            0..6,
        ),
        read_only in any::<bool>(),
    ) {
        let features = if read_only { FLUSH } else { FLUSH | DISCARD };
        let mut bench = bench_with(read_only, features, Options::default());
        let header = bench.header(kind, sector);
        let mut pieces = pieces;
        // Mostly in the order that is allowed.
        pieces.sort_by_key(|&(at, _, flags)| (at % 7 != 0).then_some(flags));
        pieces.insert(0, (header, 16, 0));
        bench.driver.add(0, &pieces);
        bench.driver.kick(0);
        bench.driver.settle(0, 1);
        bench.driver.start(FLUSH);
        prop_assert!(bench.disk.file.metadata().unwrap().len() <= SIZE);
        prop_assert_eq!(bench.read(0, 512).0, OK);
    }
}
