//! Where things are in the only BAR, and the capabilities that say so (virtio 1.2, section
//! 4.1.4).

use crate::pci::configuration::{Configuration, Error};
use crate::pci::msix::{self, Msix};

/// The BAR that holds everything.
pub(super) const BAR: usize = 0;
/// Its size in bytes.
pub(super) const BAR_SIZE: u32 = 0x4000;

pub(super) const COMMON: u64 = 0;
pub(super) const COMMON_LEN: u64 = 56;
pub(super) const ISR: u64 = 0x100;
pub(super) const DEVICE: u64 = 0x200;
pub(super) const DEVICE_MAX: u64 = 0x200;
pub(super) const NOTIFY: u64 = 0x400;
pub(super) const TABLE: u64 = 0x1000;
pub(super) const PENDING: u64 = 0x2000;

/// Bytes between the doorbells of two queues.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;
/// Most queues whose doorbells and vectors (one more than queues) find room.
pub(super) const MAX_QUEUES: usize = 255;

const VENDOR_SPECIFIC: u8 = 0x09;
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// What a part of the BAR is: a capability's structure type, offset and length.
struct Part(u8, u64, u64);

impl Part {
    /// The capability from its third byte on: what follows is the type's own.
    fn body(&self, more: &[u8]) -> Vec<u8> {
        let Self(kind, offset, len) = *self;
        // The fixed part has 16 bytes, ID and link included.
        let size = 16 + more.len() as u8;
        let mut body = vec![size, kind, BAR as u8, 0, 0, 0];
        body.extend_from_slice(&(offset as u32).to_le_bytes());
        body.extend_from_slice(&(len as u32).to_le_bytes());
        body.extend_from_slice(more);
        body
    }
}

/// Where the capabilities that the transport itself looks into are.
#[derive(Clone, Copy)]
pub(super) struct Capabilities {
    pub(super) msix: usize,
    pub(super) access: usize,
}

/// Adds the BAR and every capability of a device with `queues` queues and `config` bytes of
/// device configuration.
pub(super) fn describe(
    configuration: &mut Configuration,
    msix: &Msix,
    queues: usize,
    config: usize,
) -> Result<Capabilities, Error> {
    configuration.add_memory_bar(BAR, BAR_SIZE)?;
    let mut add = |part: Part, more: &[u8], writable: &[u8]| {
        configuration.add_capability(VENDOR_SPECIFIC, &part.body(more), writable)
    };
    add(Part(COMMON_CFG, COMMON, COMMON_LEN), &[], &[])?;
    add(Part(ISR_CFG, ISR, 1), &[], &[])?;
    if config > 0 {
        add(Part(DEVICE_CFG, DEVICE, config as u64), &[], &[])?;
    }
    let doorbells = queues as u64 * u64::from(NOTIFY_MULTIPLIER);
    add(
        Part(NOTIFY_CFG, NOTIFY, doorbells),
        &NOTIFY_MULTIPLIER.to_le_bytes(),
        &[],
    )?;
    // The window through configuration space: BAR, offset, length and data are the guest's.
    let mut window = [0; 18];
    window[2] = 0xff;
    window[6..].fill(0xff);
    let access = add(Part(PCI_CFG, 0, 0), &[0; 4], &window)?;
    let (body, writable) = msix.capability(BAR as u8, TABLE as u32, PENDING as u32);
    let msix = configuration.add_capability(msix::CAPABILITY_ID, &body, &writable)?;
    Ok(Capabilities { msix, access })
}
