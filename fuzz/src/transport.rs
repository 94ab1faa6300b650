//! A driver that knows no rules: registers, configuration space and memory in any order.

use arbitrary::{Arbitrary, Unstructured};
use cowshed_devices::pci::PciFunction;
use cowshed_devices::virtio::console::{Console, Port};
use cowshed_devices::virtio::device::VirtioDevice;
use cowshed_devices::virtio::rng::Rng;

use crate::guest::{COMMON, Guest, block};

/// Steps of one run.
const STEPS: usize = 128;

#[derive(Arbitrary, Debug)]
struct Input {
    device: Device,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Device {
    Block { read_only: bool },
    Console,
    Entropy,
}

#[derive(Arbitrary, Debug)]
enum Step {
    ConfigRead(u8),
    ConfigWrite {
        offset: u8,
        size: Size,
        value: u32,
    },
    Read {
        offset: u16,
        size: Size,
    },
    Write {
        offset: u16,
        size: Size,
        value: u32,
    },
    Common {
        field: u8,
        value: u64,
    },
    Memory {
        address: u32,
        bytes: [u8; 8],
    },
    /// A descriptor of some queue, and an available ring that names it.
    Offer {
        queue: u8,
        address: u32,
        len: u32,
        flags: u16,
        next: u16,
    },
    Start {
        refused: u64,
        size: u8,
    },
    Kick(u8),
    Stop,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Size {
    One,
    Two,
    Four,
}

impl Size {
    fn bytes(self) -> usize {
        match self {
            Size::One => 1,
            Size::Two => 2,
            Size::Four => 4,
        }
    }
}

/// Where [`Step::Start`] puts the rings of each queue.
const RINGS: u64 = 0x1000;
const EACH: u64 = 0x1000;

fn device(device: &Device) -> Box<dyn VirtioDevice> {
    match device {
        Device::Block { read_only } => block(*read_only),
        Device::Console => {
            let port = |name: &str| Port {
                name: name.into(),
                is_console: name == "console",
                ..Port::default()
            };
            let (console, _) = Console::new(vec![port("console"), port("stream")]).unwrap();
            Box::new(console)
        }
        Device::Entropy => Box::new(Rng::new()),
    }
}

/// Does what the input says; the device may refuse all of it, and must be there to be stopped.
pub fn run(data: &[u8]) {
    let Ok(input) = Input::arbitrary(&mut Unstructured::new(data)) else {
        return;
    };
    let guest = Guest::new(device(&input.device));
    for step in input.steps.iter().take(STEPS) {
        perform(&guest, step);
    }
}

fn perform(guest: &Guest, step: &Step) {
    match *step {
        Step::ConfigRead(register) => {
            guest.function.config_read(u16::from(register));
        }
        Step::ConfigWrite {
            offset,
            size,
            value,
        } => {
            // The bus passes on aligned accesses only.
            let offset = u16::from(offset) & !(size.bytes() as u16 - 1);
            let data = value.to_le_bytes();
            guest.function.config_write(offset, &data[..size.bytes()]);
            guest.function.mappings();
        }
        Step::Read { offset, size } => {
            guest.read(u64::from(offset), size.bytes());
        }
        Step::Write {
            offset,
            size,
            value,
        } => guest.write(u64::from(offset), size.bytes(), u64::from(value)),
        Step::Common { field, value } => {
            let (offset, len) = COMMON[usize::from(field) % COMMON.len()];
            guest.write(offset, len, value);
            guest.read(offset, len);
        }
        Step::Memory { address, bytes } => guest.put(u64::from(address), &bytes),
        Step::Offer {
            queue,
            address,
            len,
            flags,
            next,
        } => {
            let rings = RINGS + u64::from(queue % 8) * EACH;
            let mut descriptor = u64::from(address).to_le_bytes().to_vec();
            descriptor.extend(len.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend(next.to_le_bytes());
            let index = u64::from(next % 8);
            guest.put(rings + index * 16, &descriptor);
            let available = rings + EACH / 4;
            guest.put(available + 2, &next.to_le_bytes());
            guest.put(available + 4 + index * 2, &(index as u16).to_le_bytes());
            guest.kick(u64::from(queue % 8));
        }
        Step::Start { refused, size } => guest.start(refused, u16::from(size), RINGS, EACH),
        Step::Kick(queue) => guest.kick(u64::from(queue)),
        Step::Stop => guest.function.stop(),
    }
}
