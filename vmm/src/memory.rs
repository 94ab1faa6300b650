//! Guest memory: anonymous, private, and not touched before the guest does.

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
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
