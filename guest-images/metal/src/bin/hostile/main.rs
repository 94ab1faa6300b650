//! A driver that does everything wrong. Whatever it does costs it that request or the device at
//! most: after a reset the disk works, and memory that the device was not given is untouched.
//!
//! `hostile [disk=N] [seed=N] [rounds=N]`: the seed and the number of the random writes.

#![no_std]
#![no_main]

mod chains;
mod registers;
mod rings;

use metal::args::Args;
use metal::blk::{self, Disk, SECTOR};
use metal::memory::Region;
use metal::outcome::{Outcome, Report, ensure, finish};
use metal::pci::Function;
use metal::random::Random;
use metal::virtio::{NEEDS_RESET, NO_VECTOR};
use metal::{pattern, println, program, time};

program!(main);

fn main(command_line: &'static str) -> ! {
    finish(run(Args::new(command_line, "hostile")))
}

/// Cycles that a device gets to show what it makes of an attack.
const REACTION: u64 = 10_000_000;
/// Bytes of memory to attack with.
const SCRATCH: u64 = 1 << 20;

fn run(args: Args) -> Outcome {
    let function = Disk::find(args.option("disk").unwrap_or(0))?;
    let mut victim = Victim {
        function,
        scratch: Region::allocate(SCRATCH, 4096),
        canary: Region::allocate(1 << 16, 4096),
        sector: Region::allocate(SECTOR, SECTOR),
        sum: 0,
        report: Report::default(),
    };
    pattern::fill(1, 0, victim.canary);
    victim.sum = victim.read()?;

    chains::attack(&mut victim);
    rings::attack(&mut victim);
    let mut random = Random::new(args.option("seed").unwrap_or(1));
    registers::attack(
        &mut victim,
        &mut random,
        args.option("rounds").unwrap_or(300),
    );
    victim.report.outcome()
}

/// The disk that is attacked, and what must survive.
struct Victim {
    function: Function,
    /// Memory that attacks may use as they like.
    scratch: Region,
    /// Memory that the device is never told of.
    canary: Region,
    /// For reading the disk's first sector, and the sum of its words.
    sector: Region,
    sum: u64,
    report: Report,
}

impl Victim {
    /// Starts the disk, attacks it, and sees whether it is well after a reset.
    fn try_disk(&mut self, name: &str, attack: impl FnOnce(&mut Disk, Region) -> Outcome) {
        let outcome = Disk::open(self.function, NO_VECTOR).and_then(|mut disk| {
            attack(&mut disk, self.scratch)?;
            time::poll(REACTION, || disk.queue.has_used() || gave_up(&disk));
            println!("{name}: {}", reaction(&mut disk));
            disk.device.reset()
        });
        self.report_on(name, outcome);
    }

    /// Takes down an attack's outcome, once the disk was seen to work.
    fn report_on(&mut self, name: &str, attack: Outcome) {
        let outcome = attack.and_then(|()| {
            ensure(
                self.read()? == self.sum,
                "the disk reads other data than before",
            )?;
            ensure(
                pattern::mismatch(1, 0, self.canary).is_none(),
                "the device wrote to memory",
            )
        });
        self.report.note(name, outcome);
    }

    /// Resets the disk and reads its first sector: the sum of its words.
    fn read(&self) -> Outcome<u64> {
        let mut disk = Disk::open(self.function, NO_VECTOR)?;
        pattern::fill(0, 0, self.sector);
        let status = disk.request(blk::IN, 0, Some(self.sector))?;
        ensure(
            status == blk::OK,
            "the disk answers an honest request with an error",
        )?;
        disk.device.reset()?;
        Ok(self.sector.sum())
    }
}

fn gave_up(disk: &Disk) -> bool {
    disk.device.status() & NEEDS_RESET != 0
}

fn reaction(disk: &mut Disk) -> &'static str {
    match (disk.queue.has_used(), gave_up(disk)) {
        (true, _) => "answered",
        (false, true) => "the device gave up",
        (false, false) => "no answer",
    }
}
