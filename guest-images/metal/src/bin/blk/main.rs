//! Drives a virtio disk by the commands on the command line, such as `blk fill 7 flush check 7`.
//! README.md lists them.

#![no_std]
#![no_main]

mod framing;
mod msix;

use core::ops::Range;

use metal::args::Args;
use metal::blk::{self, Disk, SECTOR};
use metal::memory::Region;
use metal::outcome::{Outcome, ensure, finish};
use metal::virtio::NO_VECTOR;
use metal::{pattern, println, program};

program!(main);

fn main(command_line: &'static str) -> ! {
    finish(run(Args::new(command_line, "blk")))
}

/// Bytes of a request, and requests at a time.
const CHUNK: u64 = 64 << 10;
const DEPTH: u16 = 8;

fn run(mut args: Args) -> Outcome {
    let function = Disk::find(args.option("disk").unwrap_or(0))?;
    let mut disk = Disk::open(function, NO_VECTOR)?;
    ensure(disk.depth() >= DEPTH, "the disk's queue is too short")?;
    let buffers = Region::allocate(CHUNK * u64::from(DEPTH), 4096);
    let one = buffers.part(0, SECTOR);
    while let Some(command) = args.next() {
        match command {
            "info" => info(&disk),
            "id" => id(&mut disk, one)?,
            "read" => read(&mut disk, buffers, range(&mut args)?)?,
            "zeros" => zeros(&mut disk, buffers, range(&mut args)?)?,
            "write" => {
                let sectors = range(&mut args)?;
                write(&mut disk, buffers, sectors, args.number()?)?;
            }
            "verify" => {
                let sectors = range(&mut args)?;
                verify(&mut disk, buffers, sectors, args.number()?)?;
            }
            "fill" => {
                let sectors = 0..disk.capacity();
                write(&mut disk, buffers, sectors, args.number()?)?;
            }
            "check" => {
                let sectors = 0..disk.capacity();
                verify(&mut disk, buffers, sectors, args.number()?)?;
            }
            "flush" => flush(&mut disk)?,
            "zero" => clear(&mut disk, one, blk::WRITE_ZEROES, range(&mut args)?)?,
            "discard" => clear(&mut disk, one, blk::DISCARD, range(&mut args)?)?,
            "readonly" => readonly(&mut disk, one)?,
            "scatter" => {
                framing::scatter(function, buffers, range(&mut args)?, args.number()?)?;
                disk = Disk::open(function, NO_VECTOR)?;
            }
            "indirect" => {
                framing::indirect(function, buffers, range(&mut args)?, args.number()?)?;
                disk = Disk::open(function, NO_VECTOR)?;
            }
            "msix" => {
                msix::test(function, one)?;
                disk = Disk::open(function, NO_VECTOR)?;
            }
            _ => return Err("there is a command that the blk guest does not know"),
        }
        println!("ok {command}");
    }
    Ok(())
}

/// First sector and count.
fn range(args: &mut Args) -> Outcome<Range<u64>> {
    let (first, count) = (args.number()?, args.number()?);
    let end = first.checked_add(count).ok_or("there is no such sector")?;
    Ok(first..end)
}

fn succeeded(status: u8) -> Outcome {
    ensure(
        status == blk::OK,
        "the disk answers a request with an error",
    )
}

fn info(disk: &Disk) {
    let block: u32 = disk.config.read(20);
    let (capacity, features, depth) = (disk.capacity(), disk.features, disk.depth());
    println!("sectors {capacity} block {block} features {features:#x} depth {depth}");
}

fn id(disk: &mut Disk, buffer: Region) -> Outcome {
    succeeded(disk.request(blk::GET_ID, 0, Some(buffer.part(0, 20)))?)?;
    let id: [u8; 20] = core::array::from_fn(|index| buffer.read(index as u64));
    let len = id.iter().position(|&byte| byte == 0).unwrap_or(id.len());
    println!("serial {}", str::from_utf8(&id[..len]).unwrap_or("?"));
    Ok(())
}

fn read(disk: &mut Disk, buffers: Region, sectors: Range<u64>) -> Outcome {
    let mut sum = 0u64;
    sweep(
        disk,
        buffers,
        blk::IN,
        sectors,
        |_, _| (),
        |_, data| {
            sum = sum.wrapping_add(data.sum());
            Ok(())
        },
    )?;
    println!("sum {sum:#018x}");
    Ok(())
}

fn zeros(disk: &mut Disk, buffers: Region, sectors: Range<u64>) -> Outcome {
    let scribble = |sector, data| pattern::fill(0, sector, data);
    sweep(disk, buffers, blk::IN, sectors, scribble, |_, data| {
        let nonzero = data.words().find(|&offset| data.read::<u64>(offset) != 0);
        ensure(nonzero.is_none(), "the disk has data where zeros must be")
    })
}

fn write(disk: &mut Disk, buffers: Region, sectors: Range<u64>, seed: u64) -> Outcome {
    let fill = |sector, data| pattern::fill(seed, sector, data);
    sweep(disk, buffers, blk::OUT, sectors, fill, |_, _| Ok(()))
}

fn verify(disk: &mut Disk, buffers: Region, sectors: Range<u64>, seed: u64) -> Outcome {
    sweep(
        disk,
        buffers,
        blk::IN,
        sectors,
        |_, _| (),
        |sector, data| {
            if let Some(offset) = pattern::mismatch(seed, sector, data) {
                println!(
                    "sector {} byte {}",
                    sector + offset / SECTOR,
                    offset % SECTOR
                );
                return Err("the disk has other data than was written");
            }
            Ok(())
        },
    )
}

/// Goes over a range of sectors, several requests at a time: `before` sees the memory of each
/// before it is made, `after` when it is done.
fn sweep(
    disk: &mut Disk,
    buffers: Region,
    kind: u32,
    mut sectors: Range<u64>,
    mut before: impl FnMut(u64, Region),
    mut after: impl FnMut(u64, Region) -> Outcome,
) -> Outcome {
    let mut flying = [None; DEPTH as usize];
    loop {
        for (slot, flight) in flying.iter_mut().enumerate() {
            if flight.is_none() && !sectors.is_empty() {
                let count = (sectors.end - sectors.start).min(CHUNK / SECTOR);
                let data = buffers.part(slot as u64 * CHUNK, count * SECTOR);
                before(sectors.start, data);
                disk.submit(slot as u16, kind, sectors.start, Some(data));
                *flight = Some((sectors.start, data));
                sectors.start += count;
            }
        }
        if flying.iter().all(Option::is_none) {
            return Ok(());
        }
        disk.queue.publish();
        let (slot, status) = disk.wait()?;
        let flight = flying.get_mut(usize::from(slot)).and_then(Option::take);
        let (sector, data) = flight.ok_or("the disk answers a request that nobody made")?;
        if status != blk::OK {
            println!("sector {sector} status {status}");
        }
        succeeded(status)?;
        after(sector, data)?;
    }
}

fn flush(disk: &mut Disk) -> Outcome {
    ensure(
        disk.features & blk::F_FLUSH != 0,
        "the disk offers no flush",
    )?;
    succeeded(disk.request(blk::FLUSH, 0, None)?)
}

/// Discards sectors or writes zeros.
fn clear(disk: &mut Disk, buffer: Region, kind: u32, sectors: Range<u64>) -> Outcome {
    let feature = if kind == blk::DISCARD {
        blk::F_DISCARD
    } else {
        blk::F_WRITE_ZEROES
    };
    ensure(
        disk.features & feature != 0,
        "the disk does not offer that request",
    )?;
    let count = u32::try_from(sectors.end - sectors.start).map_err(|_| "too many sectors")?;
    let segment = buffer.part(0, 16);
    segment.write(0, sectors.start);
    segment.write(8, count);
    segment.write(12, 0u32);
    succeeded(disk.request(kind, 0, Some(segment))?)
}

/// A write to a read-only disk fails and changes nothing.
fn readonly(disk: &mut Disk, buffer: Region) -> Outcome {
    ensure(
        disk.features & blk::F_RO != 0,
        "the disk does not say that it is read-only",
    )?;
    succeeded(disk.request(blk::IN, 0, Some(buffer))?)?;
    let sum = buffer.sum();
    pattern::fill(sum, 0, buffer);
    let status = disk.request(blk::OUT, 0, Some(buffer))?;
    ensure(
        status == blk::IOERR,
        "a write to a read-only disk does not fail",
    )?;
    succeeded(disk.request(blk::IN, 0, Some(buffer))?)?;
    ensure(
        buffer.sum() == sum,
        "a write to a read-only disk changes it",
    )
}
