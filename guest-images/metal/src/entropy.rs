//! A virtio source of random numbers (VIRTIO 1.2, section 5.4): the smallest driver there is.

use crate::memory::Region;
use crate::outcome::{Outcome, ensure};
use crate::pci::Function;
use crate::queue::{Descriptor, WRITE};
use crate::virtio::{Device, NO_VECTOR};

/// Asks a device for random numbers once: it gives some, and stays inside the buffer.
pub fn ask(function: Function) -> Outcome {
    const LEN: u64 = 64;
    let device = Device::open(function)?;
    device.negotiate(0)?;
    let mut queue = device.queue(0, 8, NO_VECTOR)?;
    device.start()?;
    let memory = Region::allocate(2 * LEN, 8);
    let (buffer, beyond) = (memory.part(0, LEN), memory.part(LEN, LEN));
    let (address, len) = (buffer.address(), buffer.size());
    queue.describe(
        0,
        Descriptor {
            address,
            len,
            flags: WRITE,
            next: 0,
        },
    );
    queue.offer(0);
    queue.publish();
    let (head, written) = queue.wait()?;
    device.reset()?;
    ensure(head == 0, "the answer is to a request that nobody made")?;
    ensure(
        (1..=len).contains(&written),
        "the answer has no bytes, or too many",
    )?;
    ensure(buffer.sum() != 0, "the answer is not random")?;
    ensure(beyond.sum() == 0, "the device writes past the buffer")
}
