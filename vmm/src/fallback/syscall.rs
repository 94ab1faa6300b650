//! SYSCALL from ring 3.
//!
//! This KVM sets RIP to LSTAR, RCX and R11 as it should, but stays in ring 3. The fetch at LSTAR
//! then takes a page fault, which *is* delivered to the guest's handler in ring 0. So there is a
//! hardware breakpoint on the first instruction of that handler: when the frame that the fault
//! pushed says "ring 3, RIP = LSTAR", the fault was a SYSCALL, and all that is left is to undo the
//! push. SS is the null selector then, which Linux does not mind; GS is still the user's, which is
//! what the `swapgs` at LSTAR expects.
//!
//! A guest process can jump to LSTAR without SYSCALL. That is told apart by the bytes before RCX,
//! and what it could gain by placing those too (a SYSCALL with flags of its choice in R11) is
//! nothing that POPF and SYSCALL would not give it: only flags that user code may change are kept.

use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    Msrs, kvm_guest_debug, kvm_msr_entry,
};
use kvm_ioctls::{Error, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{registers, set_registers};

/// First of the filtered registers: STAR, LSTAR, CSTAR, SFMASK.
pub(super) const STAR: u32 = 0xc000_0081;
/// Number of filtered registers.
pub(super) const COUNT: u32 = 4;
const LSTAR: u32 = 0xc000_0082;
const SFMASK: u32 = 0xc000_0084;

/// The debug exception's vector.
const DEBUG: u8 = 1;
/// The page fault's vector.
const PAGE_FAULT: u64 = 14;
/// Error code of the fault that a SYSCALL becomes: present, user, instruction fetch.
const USER_FETCH: u64 = 0x15;
/// CF, PF, AF, ZF, SF, TF, DF, OF, RF, NT, AC, ID: what ring 3 can set by itself. IF is always set
/// there, so it is kept as well.
const USER_FLAGS: u64 = 0x25_4fd5 | 1 << 9;
/// DR7: breakpoint 0 enabled, on execution; bit 10 is always one.
const DR7_EXECUTE_0: u64 = 0x403;
const PAGE: u64 = 4096;

#[derive(Default)]
pub(super) struct Syscall {
    lstar: u64,
    sfmask: u64,
    handler: Option<Handler>,
    /// The virtual page of the stack on which faults from ring 3 arrive, and where it lies.
    entry_stack: Option<(u64, u64)>,
    stepping: bool,
}

/// The guest's page fault handler.
#[derive(Clone, Copy)]
struct Handler {
    address: u64,
    /// Where its first bytes lie in guest memory: alternatives patch them during the boot.
    physical: u64,
}

impl Syscall {
    pub(super) fn write_msr(
        &mut self,
        fd: &mut VcpuFd,
        memory: &GuestMemoryMmap,
        msr: u32,
        value: u64,
    ) -> Result<(), Error> {
        let entry = kvm_msr_entry {
            index: msr,
            data: value,
            ..Default::default()
        };
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| Error::new(libc::EINVAL))?;
        // Writes of the host pass the filter.
        fd.set_msrs(&msrs)?;
        match msr {
            SFMASK => self.sfmask = value,
            LSTAR => {
                self.lstar = value;
                // Linux writes LSTAR when its final IDT is in place.
                self.handler = page_fault_handler(fd, memory)?;
                self.arm(fd)?;
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) fn debug(
        &mut self,
        fd: &mut VcpuFd,
        memory: &GuestMemoryMmap,
        pc: u64,
        dr6: u64,
    ) -> Result<(), Error> {
        if std::mem::take(&mut self.stepping) {
            return self.arm(fd);
        }
        let Some(handler) = self.handler.filter(|handler| handler.address == pc) else {
            return inject_debug(fd, dr6);
        };
        let mut regs = registers(fd);
        let Some([error, rip, cs, _flags, rsp]) = self.frame(fd, memory, regs.rsp)? else {
            return self.step(fd);
        };
        let from_user = cs & 3 == 3;
        let syscall = from_user
            && rip == self.lstar
            && error & USER_FETCH == USER_FETCH
            && follows_syscall(fd, memory, regs.rcx);
        if syscall {
            regs.rip = self.lstar;
            regs.rsp = rsp;
            regs.rflags = (regs.r11 & USER_FLAGS & !self.sfmask) | 2;
        } else {
            // The breakpoint would hit again on the same instruction: take it over.
            let mut bytes = [0; 4];
            let read = memory.read_slice(&mut bytes, GuestAddress(handler.physical));
            match read.ok().and_then(|()| no_op_len(&bytes)) {
                Some(len) => regs.rip += len,
                None => return self.step(fd),
            }
        }
        set_registers(fd, regs);
        Ok(())
    }

    /// The exception frame at `stack`: error code, RIP, CS, RFLAGS, RSP.
    fn frame(
        &mut self,
        fd: &VcpuFd,
        memory: &GuestMemoryMmap,
        stack: u64,
    ) -> Result<Option<[u64; 5]>, Error> {
        const SIZE: u64 = 40;
        let (page, offset) = (stack & !(PAGE - 1), stack & (PAGE - 1));
        if offset > PAGE - SIZE {
            // In a page each: cannot be, the CPU aligns the stack to 16 bytes and pushes 48.
            return Ok(None);
        }
        let cached = self
            .entry_stack
            .filter(|(virtual_page, _)| *virtual_page == page);
        let physical_page = match cached {
            Some((_, physical)) => physical,
            None => match translate(fd, page)? {
                Some(physical) => physical,
                None => return Ok(None),
            },
        };
        let mut bytes = [0; SIZE as usize];
        if memory
            .read_slice(&mut bytes, GuestAddress(physical_page + offset))
            .is_err()
        {
            return Ok(None);
        }
        let mut frame = [0; 5];
        for (word, chunk) in frame.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*chunk);
        }
        if frame[2] & 3 == 3 {
            // Faults from ring 3 always arrive on this CPU's entry stack, which does not move.
            self.entry_stack = Some((page, physical_page));
        }
        Ok(Some(frame))
    }

    fn arm(&mut self, fd: &VcpuFd) -> Result<(), Error> {
        let Some(handler) = self.handler else {
            return Ok(());
        };
        let mut debug = kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP,
            ..Default::default()
        };
        debug.arch.debugreg[0] = handler.address;
        debug.arch.debugreg[7] = DR7_EXECUTE_0;
        fd.set_guest_debug(&debug)
    }

    /// Has the guest execute one instruction without the breakpoint.
    fn step(&mut self, fd: &VcpuFd) -> Result<(), Error> {
        self.stepping = true;
        fd.set_guest_debug(&kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ,
            ..Default::default()
        })
    }
}

/// Gives the guest a debug exception of its own, such as a debugger's single step in ring 3:
/// with our breakpoint armed KVM hands us all of them.
fn inject_debug(fd: &VcpuFd, dr6: u64) -> Result<(), Error> {
    let mut registers = fd.get_debug_regs()?;
    registers.dr6 |= dr6;
    fd.set_debug_regs(&registers)?;
    let mut events = fd.get_vcpu_events()?;
    events.exception.injected = 1;
    events.exception.nr = DEBUG;
    events.exception.has_error_code = 0;
    fd.set_vcpu_events(&events)
}

/// Reads the gate of the page fault from the IDT (AMD64 manual, volume 2, section 8.2.4).
fn page_fault_handler(fd: &VcpuFd, memory: &GuestMemoryMmap) -> Result<Option<Handler>, Error> {
    let gate = fd.get_sregs()?.idt.base.wrapping_add(PAGE_FAULT * 16);
    let Some(physical) = translate(fd, gate)? else {
        return Ok(None);
    };
    let Ok([low, high]) = memory.read_obj::<[u64; 2]>(GuestAddress(physical)) else {
        return Ok(None);
    };
    let address = (low & 0xffff) | (low >> 32 & 0xffff_0000) | (high << 32);
    Ok(translate(fd, address)?.map(|physical| Handler { address, physical }))
}

/// Whether the two bytes before `return_address` are SYSCALL.
fn follows_syscall(fd: &VcpuFd, memory: &GuestMemoryMmap, return_address: u64) -> bool {
    let first = return_address.wrapping_sub(2);
    let read = |address| -> Option<[u8; 2]> {
        memory
            .read_obj(GuestAddress(translate(fd, address).ok()??))
            .ok()
    };
    if first % PAGE < PAGE - 1 {
        read(first) == Some([0x0f, 0x05])
    } else {
        let second = read(first.wrapping_add(1));
        read(first).is_some_and(|[byte, _]| byte == 0x0f)
            && second.is_some_and(|[byte, _]| byte == 0x05)
    }
}

fn translate(fd: &VcpuFd, address: u64) -> Result<Option<u64>, Error> {
    let translation = fd.translate_gva(address)?;
    Ok((translation.valid != 0).then_some(translation.physical_address))
}

/// The length of the instruction if it is one that does nothing here: a NOP, ENDBR64, or CLAC on
/// a guest without SMAP.
fn no_op_len(bytes: &[u8; 4]) -> Option<u64> {
    match bytes {
        [0x90, ..] => Some(1),
        [0x66, 0x90, ..] => Some(2),
        [0x0f, 0x1f, 0x00, _] | [0x0f, 0x01, 0xca, _] => Some(3),
        [0xf3, 0x0f, 0x1e, 0xfa] | [0x0f, 0x1f, 0x40, _] => Some(4),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_ops_of_the_handlers_of_known_kernels_are_recognised() {
        assert_eq!(no_op_len(&[0x90, 0x90, 0x90, 0x6a]), Some(1));
        assert_eq!(no_op_len(&[0x0f, 0x1f, 0x00, 0x6a]), Some(3));
        assert_eq!(no_op_len(&[0x0f, 0x01, 0xca, 0x6a]), Some(3));
        assert_eq!(no_op_len(&[0xf3, 0x0f, 0x1e, 0xfa]), Some(4));
        assert_eq!(no_op_len(&[0x6a, 0xff, 0xe8, 0x00]), None);
    }

    #[test]
    fn ring_3_cannot_bring_privileged_flags() {
        let (iopl, nested_virtual) = (3 << 12, 1 << 17 | 1 << 19 | 1 << 20);
        assert_eq!(USER_FLAGS & (iopl | nested_virtual), 0);
    }
}
