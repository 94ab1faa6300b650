//! Measures a virtio disk: requests of one kind, `depth` of them in flight, the used ring polled.
//!
//! `bench rw=randread|randwrite|read|write depth=N bs=BYTES requests=N disk=N seed=N flush=1
//! stay=1`, all optional. With `flush=1` each request is followed by a flush, one at a time; with
//! `stay=1` it does not end.
//! Times are cycles of the timestamp counter, whose rate the host knows.

#![no_std]
#![no_main]

use metal::args::Args;
use metal::blk::{self, Disk, SECTOR};
use metal::memory::Region;
use metal::outcome::{Outcome, ensure, finish};
use metal::pattern;
use metal::random::Random;
use metal::virtio::NO_VECTOR;
use metal::{port, println, program, time};

program!(main);

fn main(command_line: &'static str) -> ! {
    finish(run(Args::new(command_line, "bench")))
}

fn run(args: Args) -> Outcome {
    let mut disk = Disk::open(Disk::find(args.option("disk").unwrap_or(0))?, NO_VECTOR)?;
    exits(&disk);

    let rw = args.text("rw").unwrap_or("randread");
    let (kind, random) = match rw {
        "randread" => (blk::IN, true),
        "randwrite" => (blk::OUT, true),
        "read" => (blk::IN, false),
        "write" => (blk::OUT, false),
        _ => return Err("rw= is one of randread, randwrite, read, write"),
    };
    let depth = args.option("depth").unwrap_or(32);
    ensure(
        (1..=disk.depth().into()).contains(&depth),
        "depth= does not fit in the queue",
    )?;
    let block = args.option("bs").unwrap_or(4096);
    let blocks = disk.capacity() * SECTOR / block.max(1);
    ensure(
        block.is_multiple_of(SECTOR) && blocks > 0,
        "bs= is no multiple of 512 on the disk",
    )?;
    let mut order = Random::new(args.option("seed").unwrap_or(1));
    let requests = args.option("requests").unwrap_or(100_000);
    let buffers = Region::allocate(block * depth, 4096);
    pattern::fill(1, 0, buffers);

    let mut request = |disk: &mut Disk, slot: u16, index: u64| {
        let block_number = if random {
            order.below(blocks)
        } else {
            index % blocks
        };
        let data = buffers.part(u64::from(slot) * block, block);
        disk.submit(slot, kind, block_number * (block / SECTOR), Some(data));
    };
    let flush = args.option("flush") == Some(1);
    ensure(!flush || depth == 1, "flush=1 wants depth=1")?;
    let start = time::cycles();
    let mut made = depth.min(requests);
    (0..made).for_each(|index| request(&mut disk, index as u16, index));
    disk.queue.publish();
    let mut done = 0;
    while done < requests {
        // Whatever is done is made again at once, and the doorbell rings once for all of it.
        let mut finished = Some(disk.wait()?);
        let before = made;
        while let Some((slot, status)) = finished {
            ensure(
                status == blk::OK,
                "the disk answers a request with an error",
            )?;
            done += 1;
            if flush {
                let flushed = disk.request(blk::FLUSH, 0, None)?;
                ensure(flushed == blk::OK, "the disk answers a flush with an error")?;
            }
            if made < requests {
                request(&mut disk, slot, made);
                made += 1;
            }
            finished = disk.take()?;
        }
        if made > before {
            disk.queue.publish();
        }
    }
    let cycles = time::cycles() - start;
    let flush = u8::from(flush);
    println!(
        "bench rw={rw} flush={flush} depth={depth} bs={block} requests={requests} cycles={cycles}"
    );
    // Whoever looks at the VMM's own time is not to find it gone.
    while args.option("stay") == Some(1) {
        core::hint::spin_loop();
    }
    Ok(())
}

/// Prints what an exit from ring 3 costs: it bounds what one request at a time can reach.
fn exits(disk: &Disk) {
    const ROUNDS: u64 = 1000;
    let cost = |exit: &dyn Fn()| {
        let start = time::cycles();
        (0..ROUNDS).for_each(|_| exit());
        (time::cycles() - start) / ROUNDS
    };
    let port = cost(&|| _ = port::read8(0x64));
    let register = cost(&|| _ = disk.device.status());
    let doorbell = cost(&|| disk.queue.ring());
    println!("exits port={port} register={register} doorbell={doorbell} cycles each");
}
