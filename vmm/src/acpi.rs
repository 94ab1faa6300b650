//! ACPI tables: how the guest learns of its processors, its PCI bus and its few legacy devices.
//!
//! The platform is hardware-reduced (ACPI 6.5, section 4.1): no PM timer, no 8259, no SCI. The
//! AML has no methods, only names, because where ring 0 is emulated its interpretation costs
//! boot time.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    Package, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{self, AccessSize, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use cowshed_devices::legacy::acpi_sleep;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout;

const OEM: [u8; 6] = *b"COWSHD";
const OEM_TABLE: [u8; 8] = *b"COWSHED ";
const OEM_REVISION: u32 = 1;
/// The pvpanic device's `_STA`: present, enabled, working, not shown to the user.
const STA_HIDDEN: u8 = 0x0b;
/// The command that the keyboard controller resets the machine on.
const RESET: u8 = 0xfe;
/// `IAPC_BOOT_ARCH` (ACPI 6.5, table 5.10): legacy devices (COM1), no VGA, no CMOS clock; the
/// bit of the 8042 is clear, or kernels would probe for a keyboard.
const BOOT_ARCH: u16 = 1 | 1 << 2 | 1 << 5;
const TABLE_ALIGN: u64 = 16;

/// Why there are no ACPI tables.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// More processors than the tables have room for.
    #[error("ACPI tables of {size} bytes are larger than the {room} bytes kept for them")]
    Room {
        /// What they need, in bytes.
        size: u64,
        /// What they have, in bytes.
        room: u64,
    },
    /// Guest memory lacks the range that they belong in.
    #[error("cannot write the ACPI tables to guest memory")]
    Write(#[source] GuestMemoryError),
}

/// Writes the tables of a machine with `cpus` processors, whose APIC identifiers count from 0.
/// The RSDP's guest physical address is returned.
///
/// # Errors
/// The tables need more room than [`layout::ACPI`] to [`layout::ACPI_END`], or that is no memory.
pub fn build(memory: &GuestMemoryMmap, cpus: u8) -> Result<u64, Error> {
    let start = layout::ACPI;
    let mut bytes = vec![0; Rsdp::len()];
    let mut place = |table: &[u8]| {
        let at = (bytes.len() as u64).next_multiple_of(TABLE_ALIGN);
        bytes.resize(at as usize, 0);
        bytes.extend_from_slice(table);
        start + at
    };

    let dsdt = place(&dsdt());
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(place(&fadt(dsdt)));
    xsdt.add_entry(place(&madt(cpus)));
    xsdt.add_entry(place(&mcfg()));
    let xsdt = place(&serialize(&xsdt));
    let rsdp = serialize(&Rsdp::new(OEM, xsdt));
    bytes.splice(..rsdp.len(), rsdp);

    let (size, room) = (bytes.len() as u64, layout::ACPI_END - start);
    if size > room {
        return Err(Error::Room { size, room });
    }
    memory
        .write_slice(&bytes, GuestAddress(start))
        .map_err(Error::Write)?;
    Ok(start)
}

fn serialize(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let port = |port: u16| {
        GAS::new(
            gas::AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(port),
        )
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.reset_reg = port(layout::I8042 + 4);
    fadt.reset_value = RESET;
    fadt.sleep_control_reg = port(layout::ACPI_SLEEP);
    fadt.sleep_status_reg = port(layout::ACPI_SLEEP + 1);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE).into();
    serialize(&fadt.finalize())
}

/// No interrupt overrides: a hardware-reduced machine has no ISA interrupts to override, and
/// COM1's own description in the DSDT says edge.
fn madt(cpus: u8) -> Vec<u8> {
    let lapic = LocalInterruptController::Address(layout::LAPIC as u32);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, lapic);
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC as u32, 0));
    serialize(&madt)
}

fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    serialize(&mcfg)
}

fn dsdt() -> Vec<u8> {
    let mut body = Vec::new();
    Name::new(
        "_S5_".into(),
        &Package::new(vec![&acpi_sleep::S5, &aml::ZERO, &aml::ZERO, &aml::ZERO]),
    )
    .to_aml_bytes(&mut body);
    Scope::new(
        "_SB_".into(),
        vec![
            &Device::new(
                "PCI0".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                    &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                    &Name::new("_SEG".into(), &aml::ZERO),
                    &Name::new("_BBN".into(), &aml::ZERO),
                    &Name::new("_UID".into(), &aml::ZERO),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![
                            &AddressSpace::new_bus_number(0_u16, 0),
                            &IO::new(layout::PCI_CONFIG, layout::PCI_CONFIG, 1, 8),
                            &AddressSpace::new_memory(
                                AddressSpaceCacheable::NotCacheable,
                                true,
                                layout::PCI_WINDOW as u32,
                                (layout::PCI_WINDOW + layout::PCI_WINDOW_SIZE - 1) as u32,
                                None,
                            ),
                        ]),
                    ),
                ],
            ),
            // Motherboard resources: keeps the configuration space from being given away.
            &Device::new(
                "ECAM".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![&Memory32Fixed::new(
                            true,
                            layout::ECAM as u32,
                            layout::ECAM_SIZE as u32,
                        )]),
                    ),
                ],
            ),
            &Device::new(
                "COM1".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                    &Name::new("_UID".into(), &aml::ZERO),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![
                            &IO::new(layout::COM1, layout::COM1, 1, 8),
                            &Interrupt::new(true, true, false, false, layout::COM1_IRQ),
                        ]),
                    ),
                ],
            ),
            &Device::new(
                "PVPN".into(),
                vec![
                    &Name::new("_HID".into(), &"QEMU0001"),
                    &Name::new("_STA".into(), &STA_HIDDEN),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![&IO::new(
                            layout::PVPANIC,
                            layout::PVPANIC,
                            1,
                            1,
                        )]),
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(&mut body);

    // Revision 2: integers have 64 bits.
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt.as_slice().to_vec()
}

#[cfg(test)]
#[path = "acpi_tests.rs"]
mod tests;
