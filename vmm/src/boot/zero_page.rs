//! Linux's zero page, `struct boot_params` (`arch/x86/include/uapi/asm/bootparam.h`).

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{Error, Parameters};
use crate::layout;

/// `boot_flag`, `header` and `version` of the setup header made for an ELF, which brings none.
const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = 0x5372_6448;
const VERSION: u16 = 0x020f;
/// `type_of_loader`: one without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;

/// Writes the zero page, whose setup header is the bzImage's if the kernel came in one.
pub(super) fn write(
    memory: &GuestMemoryMmap,
    parameters: &Parameters,
    header: Option<setup_header>,
) -> Result<(), Error> {
    let page = zero_page(parameters, header);
    memory
        .write_obj(page, GuestAddress(layout::ZERO_PAGE))
        .map_err(|source| Error::Write {
            what: "zero page",
            source,
        })
}

fn zero_page(parameters: &Parameters, header: Option<setup_header>) -> boot_params {
    let mut hdr = header.unwrap_or(setup_header {
        boot_flag: BOOT_FLAG,
        header: MAGIC,
        version: VERSION,
        ..Default::default()
    });
    hdr.type_of_loader = LOADER_UNDEFINED;
    hdr.setup_data = 0;
    // All addresses are below 4 GiB: see `layout`; an initrd ends at `initrd_addr_max` at most.
    hdr.cmd_line_ptr = layout::CMDLINE as u32;
    let initrd = parameters.initrd.cloned().unwrap_or_default();
    hdr.ramdisk_image = initrd.start as u32;
    hdr.ramdisk_size = (initrd.end - initrd.start) as u32;

    let mut page = boot_params {
        hdr,
        acpi_rsdp_addr: parameters.rsdp.unwrap_or(0),
        ..Default::default()
    };
    let mut table = page.e820_table;
    for (slot, region) in table.iter_mut().zip(parameters.map) {
        *slot = boot_e820_entry {
            addr: region.start,
            size: region.end - region.start,
            r#type: region.kind as u32,
        };
        page.e820_entries += 1;
    }
    page.e820_table = table;
    page
}
