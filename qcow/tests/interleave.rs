//! The orders in which requests can meet, tried out by shuttle: many schedules of small scenarios,
//! the same ones in each run. Built with `--cfg shuttle` only; `tests/run` says how.
//! `SHUTTLE_SCHEDULES` asks for more than the default.

#![cfg(shuttle)]
#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};

use cowshed_qcow::{
    CreateOptions, Extent, Format, Image, MemoryStorage, NewSnapshot, OpenOptions, Plan, Selector,
    Storage, create,
};
use shuttle::rand::RngCore as _;
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::sync::atomic::{AtomicU64, Ordering};
use shuttle::thread;
use support::check::check;
use support::crash::{Change, CrashStorage, Cuts, apply, crashes};
use support::model::{SECTOR, content};
use support::{Random, striped_base};

const NAME: &str = "interleave.qcow2";
const CLUSTER: usize = 1024;
const SIZE: usize = 32 * CLUSTER;

/// Remembers every change, and lets other threads run before each sector of a call.
struct Interleaved {
    log: CrashStorage,
    file: File,
    calls: AtomicU64,
}

impl Interleaved {
    /// Here others may run. It is no `yield_now`: who yields is taken to wait for somebody.
    fn others(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
    }

    fn by_sector(
        &self,
        offset: u64,
        len: usize,
        mut call: impl FnMut(u64, std::ops::Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            self.others();
            let next = len.min(done + SECTOR);
            call(offset + done as u64, done..next)?;
            done = next;
        }
        Ok(())
    }
}

impl Storage for Interleaved {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let len = buf.len();
        self.by_sector(offset, len, |at, part| self.log.read_at(at, &mut buf[part]))
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.by_sector(offset, buf.len(), |at, part| {
            self.log.write_at(at, &buf[part])
        })
    }
    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.others();
        self.log.zero(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.others();
        self.log.punch(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        self.others();
        self.log.sync()
    }
    fn len(&self) -> io::Result<u64> {
        self.log.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.log.set_len(len)
    }
    /// Plans are fast where there is a file; the tests move the bytes.
    fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

/// A disk over a base whose bytes tell their sector.
struct Disk {
    image: Image,
    storage: Arc<Interleaved>,
}

fn open(storage: Arc<dyn Storage>) -> Image {
    let options = OpenOptions::new(Format::Qcow2);
    Image::open_over(Path::new(NAME), storage, &options, Some(striped_base(SIZE))).unwrap()
}

impl Disk {
    fn new() -> Arc<Self> {
        let storage = Arc::new(Interleaved {
            log: CrashStorage::default(),
            file: File::open("/dev/null").unwrap(),
            calls: AtomicU64::new(0),
        });
        let options = CreateOptions {
            cluster_size: CLUSTER as u32,
            backing: Some(("base".into(), Format::Raw)),
            ..CreateOptions::new(SIZE as u64)
        };
        create(Path::new(NAME), storage.clone(), &options).unwrap();
        storage.log.sync().unwrap();
        let image = open(storage.clone());
        Arc::new(Disk { image, storage })
    }

    /// Writes a cluster by a plan, as the block engine does.
    fn write_planned(&self, cluster: usize, bytes: &[u8]) {
        let offset = (cluster * CLUSTER) as u64;
        match self.image.plan_write(offset, bytes.len() as u64).unwrap() {
            Plan::Fast { extents, pin } => self.follow(&extents, pin, |at, part| {
                self.storage.write_at(at, &bytes[part]).unwrap();
            }),
            Plan::Fill { extents, fill } => {
                self.follow(&extents, (), |at, part| {
                    self.storage.write_at(at, &bytes[part]).unwrap();
                });
                self.image.commit(fill, true).unwrap();
            }
            Plan::Slow => self.image.write(offset, bytes).unwrap(),
        }
    }

    /// Reads a cluster by a plan.
    fn read_planned(&self, cluster: usize) -> Vec<u8> {
        let offset = (cluster * CLUSTER) as u64;
        let mut bytes = vec![0; CLUSTER];
        match self.image.plan_read(offset, CLUSTER as u64).unwrap() {
            Plan::Fast { extents, pin } if self.is_top(&extents) => {
                self.follow(&extents, pin, |at, part| {
                    self.storage.read_at(at, &mut bytes[part]).unwrap();
                });
            }
            _ => self.image.read(offset, &mut bytes).unwrap(),
        }
        bytes
    }

    fn is_top(&self, extents: &[Extent]) -> bool {
        let top = |extent: &Extent| !matches!(extent, Extent::File { file: 1.., .. });
        extents.iter().all(top)
    }

    fn follow(
        &self,
        extents: &[Extent],
        held: impl Sized,
        mut call: impl FnMut(u64, std::ops::Range<usize>),
    ) {
        let mut done = 0;
        for &extent in extents {
            let (Extent::File { len, .. } | Extent::Zero { len }) = extent;
            let part = done..done + len as usize;
            if let Extent::File { offset, .. } = extent {
                call(offset, part.clone());
            }
            done = part.end;
        }
        drop(held);
    }

    /// What is left after a power cut now, if nothing reaches the file but what a sync covers.
    fn durable(&self) -> Vec<u8> {
        let mut cuts = Cuts::default();
        self.storage
            .log
            .changes()
            .iter()
            .for_each(|change| cuts.push(change));
        cuts.durable
    }

    /// The disk's content after such a power cut.
    fn durable_content(&self) -> Vec<u8> {
        content(&open(Arc::new(MemoryStorage::new(self.durable()))))
    }

    /// Closes the image: it is clean, and was so at every change of its file but for leaks.
    fn close(self: Arc<Self>) -> Vec<u8> {
        let disk = Arc::into_inner(self).expect("every thread has ended");
        let last = content(&disk.image);
        drop(disk.image);
        let log = disk.storage.log.changes();
        let created = log
            .iter()
            .position(|change| matches!(change, Change::Write(0, _)));
        let mut bytes = Vec::new();
        for (i, change) in log.iter().enumerate() {
            apply(&mut bytes, change);
            // Between syncs any order is possible; in the order of the calls it must be sound too.
            if created.is_some_and(|created| i > created + 1) && !matches!(change, Change::Sync) {
                let report = check(&bytes);
                // A snapshot leaves COPIED clear for a moment, which costs a copy and nothing else.
                let harm = |found: &&String| !found.ends_with("COPIED is 0 at 1");
                let harm = report.corruptions.iter().find(harm);
                assert!(harm.is_none(), "change {i}: {report:?}");
            }
        }
        let report = check(&bytes);
        assert!(report.corruptions.is_empty(), "{report:?}");
        assert!(report.leaks.is_empty(), "{report:?}");
        let again = open(Arc::new(MemoryStorage::new(bytes)));
        assert!(content(&again) == last, "opened again");
        last
    }
}

/// Tries a scenario with random schedules, and with those in which a few chosen switches come at
/// the worst moment.
fn explore(scenario: impl Fn() + Send + Sync + Clone + 'static) {
    let schedules = std::env::var("SHUTTLE_SCHEDULES").map_or(1000, |n| n.parse().unwrap());
    let runner = || shuttle::Config::new();
    shuttle::Runner::new(RandomScheduler::new_from_seed(1, schedules), runner())
        .run(scenario.clone());
    shuttle::Runner::new(PctScheduler::new_from_seed(2, 3, schedules), runner()).run(scenario);
}

type Task = Box<dyn FnOnce(&Disk) + Send>;

/// Runs tasks on the disk at the same time, each in a thread.
fn together(disk: &Arc<Disk>, tasks: Vec<Task>) {
    let run = |task: Task| {
        let disk = disk.clone();
        thread::spawn(move || task(&disk))
    };
    let threads: Vec<_> = tasks.into_iter().map(run).collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

fn sector(bytes: &[u8], sector: usize) -> &[u8] {
    &bytes[sector * SECTOR..][..SECTOR]
}

#[test]
fn writers_of_one_cluster() {
    explore(|| {
        let disk = Disk::new();
        let write = |sector: usize, byte: u8| -> Task {
            Box::new(move |disk| {
                disk.image
                    .write((sector * SECTOR) as u64, &[byte; SECTOR])
                    .unwrap();
                let mut now = [0; SECTOR];
                disk.image.read((sector * SECTOR) as u64, &mut now).unwrap();
                assert!(now == [byte; SECTOR], "sector {sector} was lost at once");
            })
        };
        together(&disk, vec![write(2, 1), write(3, 2), write(4, 3)]);
        let now = disk.close();
        for (i, byte) in [(2, 1), (3, 2), (4, 3)] {
            assert!(sector(&now, i) == [byte; SECTOR], "sector {i}");
        }
        assert!(
            sector(&now, 5) == [0x85; SECTOR],
            "beside the writes: the base's"
        );
    });
}

#[test]
fn a_write_a_discard_and_a_flush() {
    explore(|| {
        let disk = Disk::new();
        disk.image.write(0, &[1; 3 * CLUSTER]).unwrap();
        let tasks: Vec<Task> = vec![
            Box::new(|disk| {
                disk.image.write(CLUSTER as u64, &[2; SECTOR]).unwrap();
                disk.image.write(9 * CLUSTER as u64, &[3; CLUSTER]).unwrap();
            }),
            Box::new(|disk| disk.image.discard(0, 2 * CLUSTER as u64).unwrap()),
            Box::new(|disk| {
                disk.image.flush().unwrap();
                disk.image
                    .write(12 * CLUSTER as u64, &[4; CLUSTER])
                    .unwrap();
            }),
        ];
        together(&disk, tasks);
        let now = disk.close();
        assert!(
            [[0; SECTOR], [2; SECTOR]]
                .iter()
                .any(|value| sector(&now, 2) == value)
        );
        assert!(
            [[0; SECTOR], [1; SECTOR]]
                .iter()
                .any(|value| sector(&now, 3) == value)
        );
        assert!(now[..CLUSTER] == [0; CLUSTER], "discarded");
        assert!(
            now[2 * CLUSTER..3 * CLUSTER] == [1; CLUSTER],
            "not asked for"
        );
        assert!(now[9 * CLUSTER..10 * CLUSTER] == [3; CLUSTER]);
        assert!(now[12 * CLUSTER..13 * CLUSTER] == [4; CLUSTER]);
    });
}

/// A request that has its plan goes on while its cluster is freed: nobody else gets the cluster.
#[test]
fn pins_against_the_reuse_of_freed_clusters() {
    explore(|| {
        let disk = Disk::new();
        disk.image.write(0, &[1; CLUSTER]).unwrap();
        disk.image.flush().unwrap();
        let tasks: Vec<Task> = vec![
            Box::new(|disk| disk.write_planned(0, &[2; CLUSTER])),
            Box::new(|disk| {
                let found = disk.read_planned(0);
                for sector in found.chunks(SECTOR) {
                    assert!(sector.iter().all(|&byte| byte == sector[0]));
                    assert!(sector[0] <= 2, "bytes of another cluster: {}", sector[0]);
                }
            }),
            Box::new(|disk| {
                disk.image.discard(0, CLUSTER as u64).unwrap();
                disk.image.flush().unwrap();
                disk.image.flush().unwrap();
                disk.image.write(5 * CLUSTER as u64, &[3; CLUSTER]).unwrap();
            }),
        ];
        together(&disk, tasks);
        let now = disk.close();
        assert!(
            now[5 * CLUSTER..6 * CLUSTER] == [3; CLUSTER],
            "a late write hit it"
        );
        assert!(sector(&now, 0)[0] <= 2);
    });
}

/// A flush makes durable what had ended before it began, whoever else writes and flushes.
#[test]
fn a_flush_covers_what_has_ended() {
    explore(|| {
        let disk = Disk::new();
        let write_and_flush = |cluster: usize, byte: u8| -> Task {
            Box::new(move |disk| {
                for (part, byte) in [(0, byte), (SECTOR, byte + 1)] {
                    let at = cluster * CLUSTER + part;
                    disk.image.write(at as u64, &[byte; SECTOR]).unwrap();
                    disk.image.flush().unwrap();
                    let durable = disk.durable_content();
                    assert!(
                        durable[at..at + SECTOR] == [byte; SECTOR],
                        "cluster {cluster}"
                    );
                }
            })
        };
        // Two of one L2 slice, and one that shares a cluster with the first.
        let tasks = vec![
            write_and_flush(3, 1),
            write_and_flush(4, 3),
            Box::new(|disk: &Disk| {
                disk.image
                    .write_zeroes(20 * CLUSTER as u64, CLUSTER as u64, true)
                    .unwrap()
            }) as Task,
        ];
        together(&disk, tasks);
        let now = disk.close();
        assert!(now[20 * CLUSTER..21 * CLUSTER] == [0; CLUSTER]);
    });
}

/// A snapshot is of one moment: a write that is in flight is in it or is not, and no later one is.
#[test]
fn a_snapshot_during_in_flight_writes() {
    explore(|| {
        let disk = Disk::new();
        disk.image.write(0, &[1; 2 * CLUSTER]).unwrap();
        disk.image.flush().unwrap();
        let tasks: Vec<Task> = vec![
            Box::new(|disk| disk.write_planned(0, &[2; CLUSTER])),
            Box::new(|disk| {
                disk.image
                    .create_snapshot(&NewSnapshot::new("moment"))
                    .unwrap();
            }),
            Box::new(|disk| {
                disk.image.write(CLUSTER as u64, &[3; SECTOR]).unwrap();
                disk.write_planned(7, &[4; CLUSTER]);
                disk.image.flush().unwrap();
            }),
        ];
        together(&disk, tasks);
        let storage = disk.storage.clone();
        disk.image.flush().unwrap();
        let options = OpenOptions {
            read_only: true,
            snapshot: Some(Selector::Name("moment".into())),
            ..OpenOptions::new(Format::Qcow2)
        };
        let bytes = Arc::new(MemoryStorage::new(storage.log.now.to_vec()));
        drop(storage);
        let then =
            Image::open_over(Path::new(NAME), bytes, &options, Some(striped_base(SIZE))).unwrap();
        let then = content(&then);
        let now = disk.close();
        assert!(now[..CLUSTER] == [2; CLUSTER]);
        assert!(sector(&now, 2) == [3; SECTOR] && sector(&now, 3) == [1; SECTOR]);
        assert!(now[7 * CLUSTER..8 * CLUSTER] == [4; CLUSTER]);
        let whole = |byte| then[..CLUSTER] == [byte; CLUSTER];
        assert!(whole(1) || whole(2), "half of a write is in the snapshot");
        assert!(sector(&then, 3) == [1; SECTOR]);
    });
}

const BITMAP: &str = "changes";

/// Whether a bitmap has each sector in which two disks differ.
fn assert_marked(image: &Image, before: &[u8], after: &[u8], what: &str) {
    let marked = image.dirty_ranges(BITMAP, 0..SIZE as u64).unwrap();
    for i in 0..SIZE / SECTOR {
        let at = (i * SECTOR) as u64;
        let covered = marked.iter().any(|range| range.contains(&at));
        let same = sector(before, i) == sector(after, i);
        assert!(covered || same, "{what}: sector {i} is not marked");
    }
}

/// What changes after a bitmap was cleared is in it, whatever was in flight then: an incremental
/// backup misses nothing.
#[test]
fn a_bitmap_is_cleared_during_in_flight_writes() {
    explore(|| {
        let disk = Disk::new();
        disk.image.write(0, &[1; 4 * CLUSTER]).unwrap();
        let granularity = Some(SECTOR as u32);
        disk.image.add_bitmap(BITMAP, granularity, true).unwrap();
        let backup = Arc::new(Mutex::new(Vec::new()));
        let copy = backup.clone();
        let tasks: Vec<Task> = vec![
            Box::new(|disk| {
                disk.write_planned(0, &[2; CLUSTER]);
                disk.image.write(20 * CLUSTER as u64, &[3; SECTOR]).unwrap();
            }),
            Box::new(|disk| {
                disk.image.discard(CLUSTER as u64, CLUSTER as u64).unwrap();
                disk.image.flush().unwrap();
                disk.write_planned(2, &[4; SECTOR]);
            }),
            Box::new(move |disk| {
                disk.image.clear_bitmap(BITMAP).unwrap();
                *copy.lock().unwrap() = content(&disk.image);
            }),
        ];
        together(&disk, tasks);
        let then = backup.lock().unwrap().clone();
        let now = content(&disk.image);
        assert_marked(&disk.image, &then, &now, "in the end");
        disk.image.store_bitmaps().unwrap();
        let stored = open(Arc::new(MemoryStorage::new(disk.storage.log.now.to_vec())));
        assert_marked(&stored, &then, &now, "stored");
        drop(stored);
        disk.close();
    });
}

/// Whatever a power cut leaves, a bitmap that claims to be right has every change.
#[test]
fn a_bitmap_is_stored_during_writes_and_a_snapshot() {
    explore(|| {
        let disk = Disk::new();
        disk.image.write(0, &[1; 4 * CLUSTER]).unwrap();
        let granularity = Some(SECTOR as u32);
        disk.image.add_bitmap(BITMAP, granularity, true).unwrap();
        let (start, from) = (content(&disk.image), disk.storage.log.position());
        let tasks: Vec<Task> = vec![
            Box::new(|disk| {
                disk.write_planned(0, &[2; CLUSTER]);
                disk.image.flush().unwrap();
                disk.image.write(20 * CLUSTER as u64, &[3; SECTOR]).unwrap();
            }),
            Box::new(|disk| {
                disk.image.store_bitmaps().unwrap();
                disk.image.discard(CLUSTER as u64, CLUSTER as u64).unwrap();
            }),
            Box::new(|disk| {
                let new = NewSnapshot::new("moment");
                disk.image.create_snapshot(&new).unwrap();
                disk.image.write(2 * CLUSTER as u64, &[4; SECTOR]).unwrap();
            }),
        ];
        together(&disk, tasks);
        disk.image.store_bitmaps().unwrap();
        let changes = disk.storage.log.changes();
        let mut random = Random(shuttle::rand::thread_rng().next_u64());
        crashes(&changes, from, 3, &mut random, &mut |_, bytes| {
            let left = open(Arc::new(MemoryStorage::new(bytes)));
            if left.bitmaps().unwrap()[0].inconsistent.is_none() {
                assert_marked(&left, &start, &content(&left), "after a power cut");
            }
        });
        let stored = open(Arc::new(MemoryStorage::new(disk.storage.log.now.to_vec())));
        assert!(stored.bitmaps().unwrap()[0].inconsistent.is_none());
        drop(stored);
        disk.close();
    });
}
