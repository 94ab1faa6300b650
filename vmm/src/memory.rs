//! Guest memory: anonymous, private, and not touched before the guest does.

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::mm::{Advice, madvise};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::layout;

/// Smallest guest: room for one without an operating system.
pub const MIN: u64 = 16 << 20;
/// Largest guest: what lies above 4 GiB must stay below 1 TiB, within every host's address width.
pub const MAX: u64 = 512 << 30;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The size is out of range or not whole pages.
    #[error("guest memory of {0} bytes: give a multiple of 4 KiB between 16 MiB and 512 GiB")]
    Size(u64),
    /// The host did not map it.
    #[error("cannot map guest memory: lower --memory or free some on the host")]
    Map(#[source] vm_memory::mmap::FromRangesError),
    /// The host's kernel has no huge pages.
    #[error("the host has no transparent huge pages: run without --huge-pages")]
    HugePages(#[source] rustix::io::Errno),
    /// KVM did not take a region.
    #[error("KVM did not take guest memory at {0:#x}")]
    Register(u64, #[source] kvm_ioctls::Error),
}

/// Maps `size` bytes of guest memory with the hole below 4 GiB left out (see [`layout`]).
pub fn allocate(size: u64) -> Result<GuestMemoryMmap, Error> {
    if !(MIN..=MAX).contains(&size) || !size.is_multiple_of(4096) {
        return Err(Error::Size(size));
    }
    let below = size.min(layout::HOLE);
    let mut ranges = vec![(GuestAddress(0), below as usize)];
    if size > below {
        ranges.push((GuestAddress(layout::RAM_ABOVE), (size - below) as usize));
    }
    GuestMemoryMmap::from_ranges(&ranges).map_err(Error::Map)
}

/// Has the host back memory by huge pages, 2 MiB each, where it has them free when they are touched.
///
/// # Errors
/// Its kernel was built without them. Where it is configured to have none, nothing changes.
pub fn use_huge_pages(memory: &GuestMemoryMmap) -> Result<(), Error> {
    for region in memory.iter() {
        let len = region.len() as usize;
        // SAFETY: the advice is for all of a mapping that `memory` holds, and changes no content.
        unsafe { madvise(region.as_ptr().cast(), len, Advice::LinuxHugepage) }
            .map_err(Error::HugePages)?;
    }
    Ok(())
}

/// Makes guest memory visible to the VM's vCPUs. The caller keeps it mapped while they run.
pub fn register(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), Error> {
    for (slot, region) in memory.iter().enumerate() {
        let start = region.start_addr();
        let kvm_region = kvm_userspace_memory_region {
            slot: slot as u32,
            guest_phys_addr: start.0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the region is a mapping that the machine keeps for longer than its vCPUs, and
        // no two regions overlap: they come from one `GuestMemoryMmap`.
        unsafe { vm.set_user_memory_region(kvm_region) }
            .map_err(|source| Error::Register(start.0, source))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    /// Bytes in huge pages of the mapping that `address` lies in.
    fn in_huge_pages(address: usize) -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = maps.lines().skip_while(|line| {
            let range = line
                .split(' ')
                .next()
                .and_then(|range| range.split_once('-'));
            let ends = range.map(|(start, end)| {
                [start, end].map(|end| usize::from_str_radix(end, 16).unwrap_or(0))
            });
            !ends.is_some_and(|[start, end]| (start..end).contains(&address))
        });
        let line = lines
            .find(|line| line.starts_with("AnonHugePages:"))
            .unwrap();
        let kib = line.split_whitespace().nth(1).unwrap();
        kib.parse::<u64>().unwrap() << 10
    }

    #[test]
    fn huge_pages_are_for_who_asks() {
        let mode = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
        if !mode.is_ok_and(|mode| mode.contains("[madvise]")) {
            eprintln!("skipped: the host's huge pages are not for who asks");
            return;
        }
        for asked in [false, true] {
            let memory = allocate(64 << 20).unwrap();
            if asked {
                use_huge_pages(&memory).unwrap();
            }
            // In the middle: the ends need not be where huge pages begin.
            memory.write_obj(1_u8, GuestAddress(32 << 20)).unwrap();
            let first = memory.iter().next().unwrap().as_ptr() as usize;
            assert_eq!(in_huge_pages(first + (32 << 20)) > 0, asked);
        }
    }
}
