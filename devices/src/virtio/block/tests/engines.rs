//! What is begun at a time, overtakes, waits, is merged or limited.

use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use super::support::*;
use crate::pci::PciFunction;
use crate::virtio::block::{Engine, Limits, Options};
use crate::virtio::device::feature;
use crate::virtio::testing::{EVENT_IDX, WRITE};

/// Makes a read of 4 KiB available; returns its head, and where its data and status go.
fn add_read(bench: &mut Bench, queue: usize, offset: u64) -> (u16, u64) {
    let header = bench.header(0, offset / 512);
    let data = bench.driver.put(&[0x55; 4096]);
    let status = bench.driver.put(&[0xaa]);
    let pieces = [(header, 16, 0), (data, 4096, WRITE), (status, 1, WRITE)];
    (bench.driver.add(queue, &pieces), data)
}

#[test]
fn what_takes_long_is_overtaken() {
    for way in WAYS {
        let mut bench = bench_by(way);
        *bench.disk.gate.0.lock().unwrap() = false;
        let (slow, slow_data) = add_read(&mut bench, 0, 3 * MIB);
        let (fast, fast_data) = add_read(&mut bench, 0, 2 * MIB);
        let answered = bench.driver.run(0, 1);
        assert_eq!(answered, [(fast, 4097)], "{way:?}");
        assert!(bench.driver.bytes(fast_data, 4096) == bench.disk.content(2 * MIB, 4096));
        // And so is what comes later.
        let (later, _) = add_read(&mut bench, 0, 2 * MIB + 4096);
        assert_eq!(bench.driver.run(0, 1), [(later, 4097)], "{way:?}");
        assert_eq!(bench.driver.bytes(slow_data, 4096), [0x55; 4096]);
        *bench.disk.gate.0.lock().unwrap() = true;
        bench.disk.gate.1.notify_all();
        assert_eq!(bench.driver.next_used(0), (slow, 4097));
        assert!(bench.driver.bytes(slow_data, 4096) == bench.disk.content(3 * MIB, 4096));
    }
}

#[test]
fn neighbours_and_strangers_in_one_batch_get_their_own_bytes() {
    for way in WAYS {
        let mut bench = bench_by(way);
        // Neighbours, a gap, backwards, over an extent's end, past the file's end, slow, zeros.
        let offsets = [
            2 * MIB,
            2 * MIB + 4096,
            2 * MIB + 8192,
            2 * MIB + 65536,
            2 * MIB + 61440,
            MIB - 4096,
            0,
            7 * MIB,
            3 * MIB,
            MIB,
        ];
        let requests: Vec<_> = offsets
            .iter()
            .map(|&offset| (offset, add_read(&mut bench, 0, offset)))
            .collect();
        let mut answered = bench.driver.run(0, offsets.len());
        answered.sort_unstable();
        let mut heads: Vec<_> = requests
            .iter()
            .map(|(_, (head, _))| (*head, 4097))
            .collect();
        heads.sort_unstable();
        assert_eq!(answered, heads);
        for (offset, (_, data)) in requests {
            let expected = bench.disk.content(offset, 4096);
            assert!(
                bench.driver.bytes(data, 4096) == expected,
                "{way:?}, {offset}"
            );
        }
    }
}

#[test]
fn writes_of_one_batch_all_land() {
    for way in WAYS {
        let mut bench = bench_by(way);
        let mut expected = Vec::new();
        for n in 0..16_u64 {
            let header = bench.header(1, (2 * MIB + n * 4096) / 512);
            let content = [n as u8 + 1; 4096];
            let data = bench.driver.put(&content);
            let status = bench.driver.put(&[0xaa]);
            bench
                .driver
                .add(0, &[(header, 16, 0), (data, 4096, 0), (status, 1, WRITE)]);
            expected.extend_from_slice(&content);
        }
        bench.driver.run(0, 16);
        assert!(bench.disk.content(2 * MIB, 65536) == expected, "{way:?}");
        assert_eq!(bench.stats.written(), 65536);
    }
}

#[test]
fn what_goes_to_a_new_place_is_committed_once_it_is_there() {
    for way in WAYS {
        let mut bench = bench_by(way);
        let fills = bench.disk.fills.clone();
        for n in 0..8 {
            let data = [n + 1; 4096];
            let at = 5 * MIB + u64::from(n) * 8192;
            assert_eq!(bench.write(at, &data), OK);
            assert!(bench.disk.content(at, 4096) == data, "{way:?}");
            assert_eq!(fills.committed.load(Ordering::SeqCst), u64::from(n) + 1);
        }
        // Direct I/O takes no such thing: it goes by a buffer, and is not planned in vain.
        let committed = if way.direct { 8 } else { 9 };
        assert_eq!(bench.write(5 * MIB + 512, &[9; 512]), OK);
        assert_eq!(fills.committed.load(Ordering::SeqCst), committed, "{way:?}");
        fills.fail.store(true, Ordering::SeqCst);
        assert_eq!(bench.write(5 * MIB, &[7; 4096]), IOERR, "{way:?}");
        assert_eq!(fills.open.load(Ordering::SeqCst), 0, "{way:?}");
    }
}

#[test]
fn what_cannot_be_written_is_not_committed() {
    for way in WAYS {
        let mut bench = bench_by(way);
        let fills = bench.disk.fills.clone();
        fills.nowhere.store(true, Ordering::SeqCst);
        assert_eq!(bench.write(5 * MIB, &[3; 4096]), IOERR, "{way:?}");
        assert_eq!(fills.committed.load(Ordering::SeqCst), 0, "{way:?}");
        assert_eq!(fills.open.load(Ordering::SeqCst), 0, "{way:?}");
    }
}

#[test]
fn nothing_is_left_to_commit_after_a_reset() {
    for way in WAYS {
        let mut bench = bench_by(way);
        let fills = bench.disk.fills.clone();
        for _ in 0..20 {
            for n in 0..12 {
                let header = bench.header(1, (5 * MIB + n * 4096) / 512);
                let data = bench.driver.put(&[3; 4096]);
                let status = bench.driver.put(&[0xaa]);
                bench
                    .driver
                    .add(0, &[(header, 16, 0), (data, 4096, 0), (status, 1, WRITE)]);
            }
            // A chain that costs the device, while others are under way.
            bench.driver.offer(0, 0xffff);
            bench.driver.kick(0);
            bench.driver.wait_for_needs_reset();
            bench.driver.start(FLUSH | EVENT_IDX);
            assert_eq!(fills.open.load(Ordering::SeqCst), 0, "{way:?}");
        }
    }
}

#[test]
fn a_batch_is_told_of_once() {
    let mut bench = bench();
    *bench.disk.gate.0.lock().unwrap() = false;
    add_read(&mut bench, 0, 3 * MIB);
    bench.driver.kick(0);
    // The queue's thread itself is at it, as it is the only one: what comes now is one batch.
    while bench.disk.begun.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    for n in 0..15 {
        let header = bench.header(1, (2 * MIB + n * 4096) / 512);
        let data = bench.driver.put(&[5; 4096]);
        let status = bench.driver.put(&[0xaa]);
        bench
            .driver
            .add(0, &[(header, 16, 0), (data, 4096, 0), (status, 1, WRITE)]);
    }
    *bench.disk.gate.0.lock().unwrap() = true;
    bench.disk.gate.1.notify_all();
    while bench.driver.used(0) == 0 {
        std::thread::yield_now();
    }
    assert_eq!(bench.driver.used(0), 16);
    bench.driver.function.stop();
    assert_eq!(bench.driver.interrupts(1), 1);
}

#[test]
fn a_file_that_ends_early_reads_as_zeros() {
    for way in WAYS {
        let mut bench = bench_by(way);
        let end = 2 * MIB + 5000;
        bench.disk.file.set_len(end).unwrap();
        for offset in [2 * MIB, 2 * MIB + 4096, 2 * MIB + 8192] {
            let (status, data) = bench.read(offset, 8192);
            assert_eq!(status, OK);
            let mut expected = vec![0; 8192];
            let there = end.saturating_sub(offset).min(8192) as usize;
            let part = expected.get_mut(..there).unwrap();
            bench.disk.file.read_exact_at(part, offset).unwrap();
            assert!(data == expected, "{way:?}, {offset}");
        }
    }
}

#[test]
fn a_reset_comes_in_the_middle_of_a_batch() {
    for way in WAYS {
        let mut bench = bench_by(way);
        for round in 0..20 {
            let reads: Vec<_> = (0..12)
                .map(|n| add_read(&mut bench, 0, n % 4 * MIB + n * 4096).1)
                .collect();
            bench.driver.kick(0);
            bench.driver.function.bar_write(0, 20, &[0]);
            // Nothing moves any more.
            let after: Vec<_> = reads
                .iter()
                .map(|&at| bench.driver.bytes(at, 4096))
                .collect();
            std::thread::yield_now();
            for (before, at) in after.iter().zip(reads) {
                assert!(bench.driver.bytes(at, 4096) == *before, "{way:?}, {round}");
            }
            bench.driver.start(FLUSH | EVENT_IDX);
        }
        assert_eq!(bench.read(0, 4096).0, OK);
    }
}

#[test]
fn a_driver_that_offers_a_chain_again_and_again_gets_it_answered() {
    for way in WAYS {
        let mut bench = bench_by(way);
        *bench.disk.gate.0.lock().unwrap() = false;
        let (head, _) = add_read(&mut bench, 0, 3 * MIB);
        for _ in 0..300 {
            bench.driver.offer(0, head);
        }
        bench.driver.kick(0);
        *bench.disk.gate.0.lock().unwrap() = true;
        bench.disk.gate.1.notify_all();
        bench.driver.start(FLUSH | EVENT_IDX);
        assert_eq!(bench.read(0, 4096).0, OK, "{way:?}");
    }
}

#[test]
fn every_queue_is_served() {
    for engine in [Engine::IoUring, Engine::Threads] {
        let options = Options {
            queues: 3,
            engine,
            ..Options::default()
        };
        let mut bench = bench_with(false, FLUSH | feature(12), options);
        assert_ne!(bench.driver.offered() & feature(12), 0, "VIRTIO_BLK_F_MQ");
        assert_eq!(bench.driver.get::<2>(0x222), 3);
        for queue in [2, 0, 1, 2] {
            let (head, data) = add_read(&mut bench, queue, 2 * MIB);
            assert_eq!(bench.driver.run(queue, 1), [(head, 4097)]);
            assert!(bench.driver.bytes(data, 4096) == bench.disk.content(2 * MIB, 4096));
        }
    }
    assert_eq!(bench().driver.offered() & feature(12), 0);
}

#[test]
fn limits_hold_nothing_back_for_ever() {
    for engine in [Engine::IoUring, Engine::Threads] {
        let options = Options {
            engine,
            limits: Limits {
                bytes: Some(16 << 20),
                requests: Some(2000),
            },
            ..Options::default()
        };
        let mut bench = bench_with(false, FLUSH | EVENT_IDX, options);
        for round in 0..30 {
            for n in 0..20 {
                add_read(&mut bench, 0, 2 * MIB + n * 8192);
            }
            assert_eq!(bench.driver.run(0, 20).len(), 20, "{round}");
        }
    }
}

#[test]
fn a_flush_of_what_nobody_needs_does_nothing() {
    let options = Options {
        never_sync: true,
        ..Options::default()
    };
    let mut bench = bench_with(false, FLUSH, options);
    assert_eq!(bench.request(4, 0, &[]), OK);
    assert_eq!(bench.disk.flushes(), 0);
}
