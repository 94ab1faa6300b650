//! Completions are signalled by MSI-X; while they are masked they wait in the pending bits.

use metal::blk::{self, Disk};
use metal::interrupt::{self, Msix};
use metal::memory::Region;
use metal::outcome::{Outcome, ensure};
use metal::pci::Function;
use metal::{println, time};

use crate::succeeded;

const ENTRY: u16 = 0;
const VECTOR: u8 = interrupt::FIRST_VECTOR + 1;

/// Opens the disk with interrupts, masks them in both ways there are, and resets it.
pub(crate) fn test(function: Function, buffer: Region) -> Outcome {
    let table = Msix::open(function)?;
    table.route(ENTRY, VECTOR);
    interrupt::enable();
    let mut disk = Disk::open(function, ENTRY)?;
    let arrived = |count| time::wait(|| interrupt::count(VECTOR) == count);

    for request in 1..=10 {
        succeeded(disk.request(blk::IN, 0, Some(buffer))?)?;
        ensure(arrived(request), "a completion sends no interrupt")?;
    }
    let masks: [(&str, &dyn Fn(bool)); 2] = [
        ("vector", &|masked| table.mask(ENTRY, masked)),
        ("function", &|masked| table.mask_all(masked)),
    ];
    for (count, (name, mask)) in (10..).zip(masks) {
        mask(true);
        ensure(
            !table.is_pending(ENTRY),
            "an interrupt is pending that nobody sent",
        )?;
        succeeded(disk.request(blk::IN, 0, Some(buffer))?)?;
        ensure(
            time::wait(|| table.is_pending(ENTRY)),
            "a masked interrupt is not pending",
        )?;
        ensure(
            interrupt::count(VECTOR) == count,
            "a masked interrupt arrives",
        )?;
        mask(false);
        ensure(
            arrived(count + 1),
            "a pending interrupt does not arrive when unmasked",
        )?;
        ensure(
            !table.is_pending(ENTRY),
            "an interrupt that arrived is still pending",
        )?;
        println!("ok masked {name}");
    }
    disk.device.reset()
}
