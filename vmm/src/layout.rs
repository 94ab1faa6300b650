//! Every address that the guest sees, in one table.
//!
//! | guest physical address | what |
//! |---|---|
//! | `0x500` | boot GDT |
//! | `0x6000` | PVH `hvm_start_info`, its module list and memory map |
//! | `0x7000` | Linux zero page (`boot_params`) |
//! | `0x9000..0xf000` | boot page tables: the first 4 GiB, identity-mapped |
//! | `0x2_0000` | kernel command line |
//! | `0xe_0000..0xf_0000` | ACPI tables, the RSDP first |
//! | `0x10_0000..` | RAM: kernel, then initrd as high as may be |
//! | `0xc000_0000..0xe000_0000` | PCI memory window |
//! | `0xe000_0000..0xe010_0000` | PCI configuration space (ECAM), one bus |
//! | `0xfec0_0000`, `0xfee0_0000` | I/O APIC, local APICs |
//! | `0xfffb_c000..0xfffc_0000` | KVM's identity map and TSS pages |
//! | `0x1_0000_0000..` | RAM beyond 3 GiB |

/// Boot GDT.
pub const GDT: u64 = 0x500;
/// PVH `hvm_start_info`.
pub const PVH_START_INFO: u64 = 0x6000;
/// Linux `boot_params`.
pub const ZERO_PAGE: u64 = 0x7000;
/// PML4, then one page of PDPT, then four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest command line with its NUL: x86 Linux's `COMMAND_LINE_SIZE`.
pub const CMDLINE_MAX: usize = 2048;
/// End of the RAM below the legacy hole; the kilobyte before it is the EBDA.
pub const LOW_RAM_END: u64 = 0xa_0000;
/// Start of the EBDA: reserved in the memory map.
pub const EBDA: u64 = 0x9_fc00;
/// ACPI tables; the RSDP is the first of them, where firmware-less kernels look for it.
pub const ACPI: u64 = 0xe_0000;
/// End of the room for ACPI tables.
pub const ACPI_END: u64 = 0xf_0000;
/// First byte that kernels may be loaded to.
pub const HIGH_RAM: u64 = 0x10_0000;

/// RAM ends here; what is left of it continues at [`RAM_ABOVE`].
pub const HOLE: u64 = 0xc000_0000;
/// First byte above the hole.
pub const RAM_ABOVE: u64 = 0x1_0000_0000;

/// PCI memory window, for BARs.
pub const PCI_WINDOW: u64 = HOLE;
/// Size of the PCI memory window.
pub const PCI_WINDOW_SIZE: u64 = 0x2000_0000;
/// Memory-mapped PCI configuration space of bus 0.
pub const ECAM: u64 = 0xe000_0000;
/// Size of one bus of configuration space.
pub const ECAM_SIZE: u64 = 0x10_0000;
/// I/O APIC.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Local APICs.
pub const LAPIC: u64 = 0xfee0_0000;
/// KVM's identity map page (only used by hosts without unrestricted guests).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// KVM's three TSS pages.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// COM1.
pub const COM1: u16 = 0x3f8;
/// COM1's interrupt line.
pub const COM1_IRQ: u32 = 4;
/// The keyboard controller: all that is left of it is the reset command.
pub const I8042: u16 = 0x60;
/// CMOS index and data, absent: reads as zero so that nobody waits for the clock.
pub const CMOS: u16 = 0x70;
/// PCI configuration address and data ports.
pub const PCI_CONFIG: u16 = 0xcf8;
/// The pvpanic device's port.
pub const PVPANIC: u16 = 0x505;
/// ACPI sleep control and sleep status registers.
pub const ACPI_SLEEP: u16 = 0x600;

/// Most vCPUs: what 8-bit APIC identifiers can name, less the broadcast and the I/O APIC's.
pub const MAX_CPUS: u8 = 254;
