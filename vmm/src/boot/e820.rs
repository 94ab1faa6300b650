//! The memory map that both boot protocols hand to the kernel.

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::Error;
use crate::layout;

/// What a range of guest physical addresses is for; the values are those of e820 and PVH alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    Ram = 1,
    Reserved = 2,
    /// ACPI tables.
    Acpi = 3,
}

/// One entry of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) start: u64,
    /// Past the last byte.
    pub(super) end: u64,
    pub(super) kind: Kind,
}

/// Least end of low RAM: the smallest kernels lie at 1 MiB.
const LEAST_RAM: u64 = 2 << 20;
/// The boot page tables: PML4, PDPT, four page directories.
const PAGE_TABLES_SIZE: u64 = 6 * 4096;
/// KVM's identity map page, and its three TSS pages right above.
const KVM_PAGES_SIZE: u64 = 4 * 4096;

/// The map of `memory`, in ascending order.
pub(super) fn map(memory: &GuestMemoryMmap) -> Result<Vec<Region>, Error> {
    let region = |start, end, kind| Region { start, end, kind };
    let mut ram = memory.iter().map(|ram| {
        let start = ram.start_addr().raw_value();
        (start, start.saturating_add(ram.len()))
    });
    let low_end = match ram.next() {
        Some((0, end)) if end >= LEAST_RAM => end,
        Some((_, end)) => return Err(Error::TooLittleMemory(end)),
        None => return Err(Error::TooLittleMemory(0)),
    };
    let mut map = vec![
        region(0, layout::EBDA, Kind::Ram),
        region(layout::EBDA, layout::LOW_RAM_END, Kind::Reserved),
        region(layout::ACPI, layout::ACPI_END, Kind::Acpi),
        region(layout::HIGH_RAM, low_end, Kind::Ram),
        region(
            layout::ECAM,
            layout::ECAM + layout::ECAM_SIZE,
            Kind::Reserved,
        ),
        region(
            layout::KVM_IDENTITY_MAP,
            layout::KVM_IDENTITY_MAP + KVM_PAGES_SIZE,
            Kind::Reserved,
        ),
    ];
    map.extend(ram.map(|(start, end)| region(start, end, Kind::Ram)));
    Ok(map)
}

/// Bytes of RAM in a map.
pub(super) fn ram(map: &[Region]) -> u64 {
    map.iter()
        .filter(|region| region.kind == Kind::Ram)
        .map(|region| region.end - region.start)
        .sum()
}

/// Whether `start..end`, not empty, is memory, clear of what the kernel is given.
///
/// Not only what the map calls RAM: small programs linked to run at 1 MiB have their ELF headers
/// loaded to the page before it.
pub(super) fn is_free(memory: &GuestMemoryMmap, start: u64, end: u64) -> bool {
    let tables = 0..layout::PAGE_TABLES + PAGE_TABLES_SIZE;
    let cmdline = layout::CMDLINE..layout::CMDLINE + layout::CMDLINE_MAX as u64;
    let acpi = layout::ACPI..layout::ACPI_END;
    [tables, cmdline, acpi]
        .iter()
        .all(|taken| end <= taken.start || start >= taken.end)
        && memory.check_range(GuestAddress(start), (end - start) as usize)
}
