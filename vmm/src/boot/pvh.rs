//! The PVH boot protocol's `hvm_start_info` (`xen/include/public/arch-x86/hvm/start_info.h`).

use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{Error, Parameters};
use crate::layout;

const MODULES: u64 = layout::PVH_START_INFO + 0x40;
const MEMORY_MAP: u64 = layout::PVH_START_INFO + 0x80;

/// Writes `hvm_start_info`, its module list and its memory map.
pub(super) fn write(memory: &GuestMemoryMmap, parameters: &Parameters) -> Result<(), Error> {
    let failed = |source| Error::Write {
        what: "PVH start info",
        source,
    };

    let modules = parameters.initrd.map(|initrd| hvm_modlist_entry {
        paddr: initrd.start,
        size: initrd.end - initrd.start,
        ..Default::default()
    });
    let start_info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: modules.iter().len() as u32,
        modlist_paddr: if modules.is_some() { MODULES } else { 0 },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: parameters.rsdp.unwrap_or(0),
        memmap_paddr: MEMORY_MAP,
        memmap_entries: parameters.map.len() as u32,
        ..Default::default()
    };
    memory
        .write_obj(start_info, GuestAddress(layout::PVH_START_INFO))
        .map_err(failed)?;
    if let Some(module) = modules {
        memory
            .write_obj(module, GuestAddress(MODULES))
            .map_err(failed)?;
    }
    let mut address = MEMORY_MAP;
    for region in parameters.map {
        let entry = hvm_memmap_table_entry {
            addr: region.start,
            size: region.end - region.start,
            type_: region.kind as u32,
            reserved: 0,
        };
        memory
            .write_obj(entry, GuestAddress(address))
            .map_err(failed)?;
        address += size_of::<hvm_memmap_table_entry>() as u64;
    }
    Ok(())
}
