//! What firmware leaves behind in each processor: a few model-specific registers and the local
//! APIC's pins.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Error, VcpuFd};

const MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Offsets of the local vector table's pins in the APIC's page.
const LINT0: usize = 0x350;
const LINT1: usize = 0x360;
/// Delivery modes, at bit 8 of a local vector.
const EXT_INT: u32 = 7 << 8;
const NMI: u32 = 4 << 8;

/// Prepares a vCPU whose CPUID is set.
pub fn prepare(fd: &VcpuFd) -> Result<(), Error> {
    let msrs = [
        (MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let msrs = Msrs::from_entries(&msrs).map_err(|_| Error::new(libc::EINVAL))?;
    fd.set_msrs(&msrs)?;

    // Virtual wire mode: the PIC on LINT0, NMI on LINT1 (MultiProcessor specification, 3.6.2.2).
    let mut lapic = fd.get_lapic()?;
    for (offset, mode) in [(LINT0, EXT_INT), (LINT1, NMI)] {
        for (register, byte) in lapic.regs.iter_mut().skip(offset).zip(mode.to_le_bytes()) {
            *register = byte.cast_signed();
        }
    }
    fd.set_lapic(&lapic)
}
