//! Looks at every PCI function of bus 0, then moves a disk's BARs about: it must answer where
//! they point, and nothing else may suffer.
//!
//! `probe [disk=N] [ecam=ADDRESS]`: with `ecam=0` the memory-mapped configuration space is left
//! alone.

#![no_std]
#![no_main]

use metal::args::Args;
use metal::blk::{self, Disk, SECTOR};
use metal::memory::{self, Region};
use metal::outcome::{Outcome, Report, ensure, finish};
use metal::pci::{self, BUS_MASTER, Bar, Function, MEMORY_ENABLE};
use metal::virtio::{self, Device, NO_VECTOR};
use metal::{entropy, pattern, println, program, time};

program!(main);

/// Where cowshed has the configuration space of bus 0.
const ECAM: u64 = 0xe000_0000;
/// Offset of the command register.
const COMMAND: u64 = 4;
/// In the memory window for PCI, but far from where BARs are assigned.
const SPARE: u64 = 0xd000_0000;
/// The local APIC, and its version register.
const LAPIC: u64 = 0xfee0_0000;
const LAPIC_VERSION: u64 = 0x30;
/// Cycles in which a device that was not told anything may break its silence.
const SILENCE: u64 = 50_000_000;

fn main(command_line: &'static str) -> ! {
    finish(run(Args::new(command_line, "probe")))
}

fn run(args: Args) -> Outcome {
    let mut report = Report::default();
    pci::functions().for_each(list);
    let disk = Disk::find(args.option("disk").unwrap_or(0))?;
    report.note("bars apart", bars_apart());
    report.note("configuration by bytes and words", widths());
    report.note("identifiers are read-only", read_only());
    report.note("absent functions", absent());
    match args.option("ecam").unwrap_or(ECAM) {
        0 => println!("skipped: ecam=0"),
        address => report.note("ecam", ecam(address, disk)),
    }
    for function in virtio::devices(virtio::ENTROPY) {
        report.note("entropy", entropy::ask(function));
    }

    let buffer = Region::allocate(SECTOR, 4096);
    report.note("disk answers", read(disk, buffer));
    report.note("memory disabled", disabled(disk, buffer));
    for bar in disk.bars() {
        println!("bar {} of the disk:", bar.index);
        report.note("moved", moved(disk, bar, buffer));
        report.note("over ram", over_ram(disk, bar));
        report.note("over the local apic", over_lapic(disk, bar));
        match neighbours(disk).next() {
            Some(other) => report.note("over another bar", over_bar(disk, bar, other)),
            None => println!("skipped: over another bar: there is no other virtio device"),
        }
        report.note("above 4 GiB", above_4g(disk, bar));
        report.note("disk answers again", read(disk, buffer));
    }
    for function in virtio::devices(virtio::ENTROPY) {
        report.note("entropy again", entropy::ask(function));
    }
    report.outcome()
}

/// Prints what a function is and has.
fn list(it: Function) {
    let (vendor, device) = it.id();
    let class = it.read32(0x08) >> 8;
    println!(
        "{:02x}.{} {vendor:04x}:{device:04x} class {class:06x}",
        it.device, it.function
    );
    for Bar {
        index,
        address,
        size,
        wide,
    } in it.bars()
    {
        println!(
            "  bar {index} at {address:#x} size {size:#x}{}",
            if wide { " 64-bit" } else { "" }
        );
    }
    for (id, offset) in it.capabilities() {
        println!("  capability {id:#04x} at {offset:#04x}");
    }
}

/// BARs are aligned to their size, past RAM, and do not overlap.
fn bars_apart() -> Outcome {
    let all = || pci::functions().flat_map(Function::bars).enumerate();
    for (number, bar) in all() {
        ensure(
            bar.size.is_power_of_two(),
            "a BAR's size is no power of two",
        )?;
        ensure(
            bar.address.is_multiple_of(bar.size),
            "a BAR is not aligned to its size",
        )?;
        ensure(
            bar.address >= memory::ram_end(),
            "a BAR is unassigned, or over RAM",
        )?;
        let clash = |other: &Bar| {
            other.address < bar.address + bar.size && bar.address < other.address + other.size
        };
        let apart = all().all(|(other_number, other)| other_number == number || !clash(&other));
        ensure(apart, "BARs overlap")?;
    }
    Ok(())
}

/// Bytes and words of the configuration header are parts of the double words.
fn widths() -> Outcome {
    for function in pci::functions() {
        for register in (0..0x40).step_by(4) {
            let bytes = function.read32(register).to_le_bytes();
            let whole = (register..)
                .zip(bytes)
                .all(|(at, byte)| function.read8(at) == byte);
            ensure(whole, "a byte differs from the double word it is in")?;
            let halves = [bytes[0..2].try_into(), bytes[2..4].try_into()]
                .map(|half| u16::from_le_bytes(half.unwrap_or_default()));
            let whole = halves == [function.read16(register), function.read16(register + 2)];
            ensure(whole, "a word differs from the double word it is in")?;
        }
    }
    Ok(())
}

fn read_only() -> Outcome {
    for function in pci::functions() {
        let before = function.read32(0);
        function.write32(0, !before);
        ensure(
            function.read32(0) == before,
            "a write changes an identifier",
        )?;
    }
    Ok(())
}

fn absent() -> Outcome {
    let slots = (0..32).map(|device| Function {
        device,
        function: 0,
    });
    let absent = slots.filter(|slot| pci::functions().all(|it| it != *slot));
    for slot in absent {
        slot.write32(0x10, 0);
        ensure(
            slot.read32(0) == u32::MAX,
            "an absent function does not read as ones",
        )?;
    }
    Ok(())
}

/// The memory-mapped configuration space says what the ports say.
fn ecam(address: u64, disk: Function) -> Outcome {
    ensure(
        address >= memory::ram_end() && address < 1 << 32,
        "the ECAM window is over RAM",
    )?;
    // SAFETY: it is mapped, and past the RAM that holds this program.
    let window = unsafe { Region::new(address, 1 << 20) };
    for function in pci::functions() {
        let space = window.part(function.ecam_offset(), 4096);
        let same = |register: u8| space.read::<u32>(register.into()) == function.read32(register);
        ensure((0..=0xfc).step_by(4).all(same), "ECAM and ports differ")?;
        let [low, high] = function.id().0.to_le_bytes();
        let bytes: [u8; 2] = [space.read(0), space.read(1)];
        ensure(bytes == [low, high], "a byte of ECAM differs")?;
    }
    let space = window.part(disk.ecam_offset(), 4096);
    let command: u16 = space.read(COMMAND);
    space.write(COMMAND, command ^ BUS_MASTER as u16);
    let changed = disk.command();
    space.write(COMMAND, command);
    ensure(
        changed == u32::from(command) ^ BUS_MASTER,
        "a write by ECAM is lost",
    )?;
    let absent = window.part(31 << 15 | 7 << 12, 4);
    ensure(
        absent.read::<u32>(0) == u32::MAX,
        "an absent function does not read as ones",
    )
}

/// Reads the first sector.
fn read(function: Function, buffer: Region) -> Outcome {
    let mut disk = Disk::open(function, NO_VECTOR)?;
    ensure(
        disk.request(blk::IN, 0, Some(buffer))? == blk::OK,
        "the disk cannot be read",
    )?;
    disk.device.reset()
}

/// A doorbell is dead while the function's memory is disabled.
fn disabled(function: Function, buffer: Region) -> Outcome {
    let mut disk = Disk::open(function, NO_VECTOR)?;
    ensure(
        disk.request(blk::IN, 0, Some(buffer))? == blk::OK,
        "the disk cannot be read",
    )?;
    let command = function.command();
    function.set_command(command & !MEMORY_ENABLE);
    disk.submit(0, blk::IN, 0, Some(buffer));
    disk.queue.reveal();
    disk.queue.ring();
    let silent = !time::poll(SILENCE, || disk.queue.has_used());
    function.set_command(command);
    ensure(silent, "a doorbell rings although memory is disabled")?;
    disk.queue.ring();
    ensure(disk.wait()?.1 == blk::OK, "the disk cannot be read")?;
    disk.device.reset()
}

/// The disk works with a BAR at another address; its old doorbell is dead, the new one is not.
fn moved(function: Function, bar: Bar, buffer: Region) -> Outcome {
    let old = Device::open(function)?.doorbell(0);
    with_bar_at(function, bar, SPARE, || {
        let mut disk = Disk::open(function, NO_VECTOR)?;
        ensure(
            disk.request(blk::IN, 0, Some(buffer))? == blk::OK,
            "the disk cannot be read",
        )?;
        if disk.device.doorbell(0).address() != old.address() {
            disk.submit(0, blk::IN, 0, Some(buffer));
            disk.queue.reveal();
            old.write(0, 0u16);
            let silent = !time::poll(SILENCE, || disk.queue.has_used());
            ensure(silent, "the doorbell still rings at its old address")?;
            disk.queue.ring();
            ensure(disk.wait()?.1 == blk::OK, "the disk cannot be read")?;
        }
        disk.device.reset()
    })?;
    read(function, buffer)
}

/// RAM stays RAM.
fn over_ram(function: Function, bar: Bar) -> Outcome {
    let ram = Region::allocate(bar.size, bar.size);
    pattern::fill(1, 0, ram);
    with_bar_at(function, bar, ram.address(), || {
        ensure(pattern::mismatch(1, 0, ram).is_none(), "a BAR hides RAM")?;
        pattern::fill(2, 0, ram);
        ensure(
            pattern::mismatch(2, 0, ram).is_none(),
            "a BAR takes writes to RAM",
        )
    })?;
    ensure(
        pattern::mismatch(2, 0, ram).is_none(),
        "RAM changed under a BAR",
    )?;
    read(function, ram.part(0, SECTOR))
}

fn over_lapic(function: Function, bar: Bar) -> Outcome {
    // SAFETY: the local APIC is there on every PC.
    let lapic = unsafe { Region::new(LAPIC, 4096) };
    let version: u32 = lapic.read(LAPIC_VERSION);
    with_bar_at(function, bar, LAPIC & !(bar.size - 1), || {
        ensure(
            lapic.read::<u32>(LAPIC_VERSION) == version,
            "a BAR hides the local APIC",
        )
    })
}

/// Virtio devices but this one.
fn neighbours(function: Function) -> impl Iterator<Item = Function> {
    let kinds = [virtio::BLOCK, virtio::ENTROPY, virtio::CONSOLE];
    kinds
        .into_iter()
        .flat_map(virtio::devices)
        .filter(move |&it| it != function)
}

/// A BAR that is there already keeps its place.
fn over_bar(function: Function, bar: Bar, other: Function) -> Outcome {
    let device = Device::open(other)?;
    device.reset()?;
    device.set_status(virtio::ACKNOWLEDGE);
    let unharmed = || device.status() == virtio::ACKNOWLEDGE;
    with_bar_at(
        function,
        bar,
        device.common.address() & !(bar.size - 1),
        || ensure(unharmed(), "a BAR hides another"),
    )?;
    ensure(unharmed(), "a BAR that was hidden does not come back")?;
    device.reset()
}

fn above_4g(function: Function, bar: Bar) -> Outcome {
    if !bar.wide {
        return Ok(());
    }
    let address = 0x80_0000_0000;
    with_bar_at(function, bar, address, || {
        ensure(
            function.bar_address(bar.index) == address,
            "a BAR forgets its upper half",
        )
    })
}

/// Runs a test with a BAR at another address.
fn with_bar_at(
    function: Function,
    bar: Bar,
    address: u64,
    test: impl FnOnce() -> Outcome,
) -> Outcome {
    function.set_bar(bar, address);
    let outcome = test();
    function.set_bar(bar, bar.address);
    outcome
}
