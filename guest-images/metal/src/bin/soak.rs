//! Random requests on a virtio disk, of which the host can tell later what must be there: see
//! `metal::soak`.
//!
//! `soak seed=N blocks=N queues=1|2|4 [steps=N]`

#![no_std]
#![no_main]

use metal::args::Args;
use metal::blk::{self, Disk, SECTOR};
use metal::memory::Region;
use metal::outcome::{Outcome, ensure, finish};
use metal::soak::{AHEAD, BLOCK, Kind, LONGEST, Step, Writer, content, writer};
use metal::virtio::NO_VECTOR;
use metal::{println, program, time};

program!(main);

/// Requests in flight in each queue.
const DEPTH: usize = 16;
const QUEUES: usize = 4;

fn main(command_line: &'static str) -> ! {
    finish(run(Args::new(command_line, "soak")))
}

fn run(args: Args) -> Outcome {
    let function = Disk::find(0)?;
    match args.option("queues").unwrap_or(1) {
        1 => soak(&args, &mut Disk::open_queues::<1>(function, NO_VECTOR)?),
        2 => soak(&args, &mut Disk::open_queues::<2>(function, NO_VECTOR)?),
        4 => soak(
            &args,
            &mut Disk::open_queues::<QUEUES>(function, NO_VECTOR)?,
        ),
        _ => Err("queues= is one of 1, 2, 4"),
    }
}

fn soak(args: &Args, queues: &mut [Disk]) -> Outcome {
    let blocks = args.option("blocks").ok_or("blocks= is missing")?;
    ensure(
        blocks >= LONGEST && blocks <= queues[0].capacity() * SECTOR / BLOCK,
        "blocks= is more than the disk has, or too few",
    )?;
    let mut soak = Soak {
        seed: args.option("seed").unwrap_or(1),
        buffers: Region::allocate(QUEUES as u64 * DEPTH as u64 * LONGEST * BLOCK, BLOCK),
        known: Region::allocate(blocks * 8, 8),
        in_flight: [[None; DEPTH]; QUEUES],
        durable: 0,
    };
    let steps = args.option("steps").unwrap_or(u64::MAX);
    for index in 0..steps {
        let step = Step::new(soak.seed, index, blocks);
        let mut place = None;
        soak.until(queues, |soak, queues| {
            place = soak.place(queues, &step, index);
            place.is_some()
        })?;
        if let Some((queue, slot)) = place {
            soak.begin(&mut queues[queue], queue, slot, step, index);
        }
    }
    soak.until(queues, |soak, _| soak.all().next().is_none())
}

#[derive(Clone, Copy)]
struct Begun {
    step: Step,
    index: u64,
    /// What a flush will make durable: every step before this one.
    ended: u64,
}

/// Of a block: nothing is known.
const ANYTHING: u64 = 0;
/// Of a block: it is zeros. Any other number is the step that wrote it, plus one.
const ZEROS: u64 = u64::MAX;

struct Soak {
    seed: u64,
    buffers: Region,
    /// A word for each block.
    known: Region,
    in_flight: [[Option<Begun>; DEPTH]; QUEUES],
    durable: u64,
}

impl Soak {
    fn all(&self) -> impl Iterator<Item = &Begun> {
        self.in_flight.iter().flatten().flatten()
    }

    fn buffer(&self, queue: usize, slot: usize) -> Region {
        let number = (queue * DEPTH + slot) as u64;
        self.buffers.part(number * LONGEST * BLOCK, LONGEST * BLOCK)
    }

    /// Takes what has ended until the condition holds.
    fn until(
        &mut self,
        queues: &mut [Disk],
        mut condition: impl FnMut(&mut Self, &mut [Disk]) -> bool,
    ) -> Outcome {
        let mut outcome = Ok(());
        let held = time::wait(|| {
            outcome = self.take(queues);
            outcome.is_err() || condition(self, queues)
        });
        outcome?;
        ensure(held, "the disk does not answer")
    }

    /// A queue and a slot for a step, if it can begin: of two requests for a block the first must
    /// have ended.
    fn place(&self, queues: &[Disk], step: &Step, index: u64) -> Option<(usize, usize)> {
        let mut all = self.all();
        if index > self.durable + AHEAD
            || all.any(|other| {
                other.step.meets(step) || other.step.kind == Kind::Flush && step.kind == Kind::Flush
            })
        {
            return None;
        }
        let queue = index as usize % queues.len();
        let slot = self.in_flight[queue].iter().position(Option::is_none)?;
        Some((queue, slot))
    }

    fn begin(&mut self, disk: &mut Disk, queue: usize, slot: usize, step: Step, index: u64) {
        let ended = self.all().map(|begun| begun.index).min().unwrap_or(index);
        self.in_flight[queue][slot] = Some(Begun { step, index, ended });
        let data = self.buffer(queue, slot).part(0, step.count * BLOCK);
        let sectors = BLOCK / SECTOR;
        let (kind, sector, data) = match step.kind {
            Kind::Read => (blk::IN, step.first * sectors, Some(data)),
            Kind::Write => {
                let seed = self.seed;
                for (block, part) in parts(&step, data) {
                    for offset in part.words() {
                        let word = content(Writer { seed, index }, block, offset / 8);
                        part.write(offset, word);
                    }
                }
                (blk::OUT, step.first * sectors, Some(data))
            }
            Kind::Zero | Kind::Discard => {
                let range = data.part(0, 16);
                range.write(0, step.first * sectors);
                range.write(8, (step.count * sectors) as u32);
                // A write of zeros may give its storage back.
                let unmap = step.kind == Kind::Zero && index.is_multiple_of(2);
                range.write(12, u32::from(unmap));
                let kind = match step.kind {
                    Kind::Zero => blk::WRITE_ZEROES,
                    _ => blk::DISCARD,
                };
                (kind, 0, Some(range))
            }
            Kind::Flush => (blk::FLUSH, 0, None),
        };
        disk.submit(slot as u16, kind, sector, data);
        disk.queue.publish();
    }

    fn take(&mut self, queues: &mut [Disk]) -> Outcome {
        for (queue, disk) in queues.iter_mut().enumerate() {
            while let Some((slot, status)) = disk.take()? {
                ensure(status == blk::OK, "the disk answers with an error")?;
                let slot = usize::from(slot);
                let begun = self.in_flight[queue].get_mut(slot).and_then(Option::take);
                let begun = begun.ok_or("the disk answers a request that nobody made")?;
                self.end(&begun, self.buffer(queue, slot))?;
            }
        }
        Ok(())
    }

    fn end(&mut self, begun: &Begun, buffer: Region) -> Outcome {
        let data = buffer.part(0, begun.step.count * BLOCK);
        let know = match begun.step.kind {
            Kind::Write => begun.index + 1,
            Kind::Zero => ZEROS,
            Kind::Discard => ANYTHING,
            Kind::Read => {
                return parts(&begun.step, data)
                    .try_for_each(|(block, part)| self.compare(block, part));
            }
            Kind::Flush => {
                self.durable = self.durable.max(begun.ended);
                println!("flushed {}", self.durable);
                return Ok(());
            }
        };
        for (block, _) in parts(&begun.step, data) {
            self.known.write(block * 8, know);
        }
        Ok(())
    }

    fn compare(&self, block: u64, data: Region) -> Outcome {
        let found = writer(block, |at| data.read(at * 8))?;
        let seed = self.seed;
        let right = match self.known.read(block * 8) {
            ANYTHING => true,
            ZEROS => found.is_none(),
            next => {
                found
                    == Some(Writer {
                        seed,
                        index: next - 1,
                    })
            }
        };
        ensure(right, "a block has what was there before")
    }
}

/// The blocks of a request, each with its part of the data.
fn parts(step: &Step, data: Region) -> impl Iterator<Item = (u64, Region)> {
    (0..step.count).map(move |at| (step.first + at, data.part(at * BLOCK, BLOCK)))
}
