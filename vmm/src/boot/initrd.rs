use std::ops::Range;

use linux_loader::bootparam::setup_header;
use vm_memory::GuestMemoryMmap;

use super::e820::{Kind, Region};
use super::{Error, Source};
use crate::layout;

/// Where the initrd must end when no setup header says (the value of kernels before 2.03).
const DEFAULT_ADDR_MAX: u32 = 0x37ff_ffff;
const PAGE: u64 = 4096;
/// What the kernel's unpacker wants each archive to begin at a multiple of.
const CPIO_ALIGN: u64 = 4;

/// Loads the parts end to end, as high as the kernel allows, past `kernel_end`.
pub(super) fn load(
    memory: &GuestMemoryMmap,
    map: &[Region],
    parts: &[Source],
    kernel_end: u64,
    header: Option<&setup_header>,
) -> Result<Option<Range<u64>>, Error> {
    let mut sizes = Vec::with_capacity(parts.len());
    let mut size = 0_u64;
    for part in parts {
        let len = part.len().map_err(|source| Error::Read {
            what: "initrd",
            source,
        })?;
        sizes.push(len);
        size = size.saturating_add(len.saturating_add(CPIO_ALIGN - 1) & !(CPIO_ALIGN - 1));
    }
    if size == 0 {
        return Ok(None);
    }

    let low_ram = map
        .iter()
        .find(|region| region.kind == Kind::Ram && region.start == layout::HIGH_RAM)
        .map_or(0, |region| region.end);
    let addr_max = header.map_or(DEFAULT_ADDR_MAX, |header| header.initrd_addr_max);
    let high = low_ram.min(u64::from(addr_max) + 1);
    let low = kernel_end.max(layout::HIGH_RAM).next_multiple_of(PAGE);
    let start = match high.checked_sub(size) {
        Some(start) if start & !(PAGE - 1) >= low => start & !(PAGE - 1),
        _ => return Err(Error::InitrdPlacement { size, low, high }),
    };

    let mut address = start;
    for (part, len) in parts.iter().zip(sizes) {
        part.copy_to(0, len as usize, memory, address)
            .map_err(|source| Error::Load {
                what: "initrd",
                address,
                source,
            })?;
        address += len.next_multiple_of(CPIO_ALIGN);
    }
    Ok(Some(start..start + size))
}
