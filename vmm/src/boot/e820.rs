//! The memory map that both boot protocols hand to the kernel.

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

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

/// Least end of low RAM: a page-table's worth above the tables and ACPI.
const LEAST_RAM: u64 = 2 << 20;

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
        // The identity map page and three TSS pages.
        region(
            layout::KVM_IDENTITY_MAP,
            layout::KVM_IDENTITY_MAP + 0x4000,
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

/// Whether `start..end` lies in one piece of RAM, clear of the tables that the kernel is given.
pub(super) fn is_free(map: &[Region], start: u64, end: u64) -> bool {
    let tables = start < layout::PAGE_TABLES + 0x6000;
    let cmdline = layout::CMDLINE..layout::CMDLINE + layout::CMDLINE_MAX as u64;
    !tables
        && !(start < cmdline.end && end > cmdline.start)
        && map.iter().any(|region| {
            region.kind == Kind::Ram && region.start <= start && start < end && end <= region.end
        })
}
