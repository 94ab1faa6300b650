//! The instructions that KVM's emulator lacks and that kernels cannot be told to avoid.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::{Error, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The vector of INT3.
const BREAKPOINT: u8 = 3;
/// RFLAGS.AC, which STAC sets and CLAC clears.
const AC: u64 = 1 << 18;
/// MXCSR's 32-bit word in the XSAVE area.
const MXCSR: usize = 6;
/// RFLAGS.ZF.
const ZF: u64 = 1 << 6;
/// OF, SF, ZF, AF, PF, CF.
const ARITHMETIC_FLAGS: u64 = 0x8d5;

/// Does what the instruction at RIP would do. `Ok(false)`: it is not one of ours.
///
/// KVM has queued an invalid-opcode exception by now; writing the registers back clears it.
pub(super) fn emulate(
    fd: &mut VcpuFd,
    memory: &GuestMemoryMmap,
    bytes: &[u8],
) -> Result<bool, Error> {
    let mut regs = fd.get_regs()?;
    let sregs = fd.get_sregs()?;
    let bits = if sregs.cs.l != 0 { 64 } else { 32 };
    let instruction = Decoder::with_ip(bits, bytes, regs.rip, DecoderOptions::NONE).decode();
    let guest = Guest {
        fd,
        memory,
        sregs: &sregs,
    };
    match instruction.mnemonic() {
        Mnemonic::Int3 => {
            regs.rip = instruction.next_ip();
            fd.set_regs(&regs)?;
            return inject_breakpoint(fd).map(|()| true);
        }
        Mnemonic::Wait => {}
        Mnemonic::Stac => regs.rflags |= AC,
        Mnemonic::Clac => regs.rflags &= !AC,
        Mnemonic::Fninit => {
            let mut fpu = fd.get_fpu()?;
            (fpu.fcw, fpu.fsw, fpu.ftwx) = (0x37f, 0, 0);
            fd.set_fpu(&fpu)?;
        }
        Mnemonic::Ldmxcsr => {
            let Some(value) = guest.operand(&instruction, 0, &regs) else {
                return Ok(false);
            };
            // KVM_SET_FPU leaves MXCSR alone.
            let mut xsave = fd.get_xsave()?;
            xsave.region[MXCSR] = value as u32;
            // SAFETY: no dynamic feature is enabled, so KVM reads no more than this struct.
            unsafe { fd.set_xsave(&xsave)? };
        }
        Mnemonic::Popcnt => {
            let Some(source) = guest.operand(&instruction, 1, &regs) else {
                return Ok(false);
            };
            let Some(register) = general(&mut regs, instruction.op0_register()) else {
                return Ok(false);
            };
            let count = u64::from(source.count_ones());
            // A 32-bit result clears the upper half, a 16-bit one keeps the rest.
            let kept = if instruction.code() == Code::Popcnt_r16_rm16 {
                !0xffff
            } else {
                0
            };
            *register = (*register & kept) | count;
            regs.rflags &= !ARITHMETIC_FLAGS;
            if source == 0 {
                regs.rflags |= ZF;
            }
        }
        _ => return Ok(false),
    }
    regs.rip = instruction.next_ip();
    fd.set_regs(&regs)?;
    Ok(true)
}

fn inject_breakpoint(fd: &VcpuFd) -> Result<(), Error> {
    let mut events = fd.get_vcpu_events()?;
    events.exception.injected = 1;
    events.exception.nr = BREAKPOINT;
    events.exception.has_error_code = 0;
    fd.set_vcpu_events(&events)
}

/// What operands are read from.
struct Guest<'a> {
    fd: &'a VcpuFd,
    memory: &'a GuestMemoryMmap,
    sregs: &'a kvm_sregs,
}

impl Guest<'_> {
    /// The value of a register or memory operand, zero-extended.
    fn operand(&self, instruction: &Instruction, index: u32, regs: &kvm_regs) -> Option<u64> {
        match instruction.op_kind(index) {
            OpKind::Register => {
                let register = instruction.op_register(index);
                let value = *general(&mut regs.clone(), register)?;
                Some(value & mask(register.size()))
            }
            OpKind::Memory => self.load(instruction, regs),
            _ => None,
        }
    }

    fn load(&self, instruction: &Instruction, regs: &kvm_regs) -> Option<u64> {
        let address = self.address(instruction, regs)?;
        let mut bytes = [0; 8];
        // Byte by byte: the operand may cross into a page that lies elsewhere.
        for (address, byte) in (address..)
            .zip(bytes.iter_mut())
            .take(instruction.memory_size().size())
        {
            let translation = self.fd.translate_gva(address).ok()?;
            if translation.valid == 0 {
                return None;
            }
            *byte = self
                .memory
                .read_obj(GuestAddress(translation.physical_address))
                .ok()?;
        }
        Some(u64::from_le_bytes(bytes))
    }

    fn address(&self, instruction: &Instruction, regs: &kvm_regs) -> Option<u64> {
        let mut regs = *regs;
        let mut register = |register| match register {
            Register::None => Some(0),
            // The displacement is absolute already.
            Register::RIP | Register::EIP => Some(0),
            register => general(&mut regs, register).copied(),
        };
        let segment = match instruction.memory_segment() {
            Register::GS => self.sregs.gs.base,
            Register::FS => self.sregs.fs.base,
            _ => 0,
        };
        let index = register(instruction.memory_index())?
            .wrapping_mul(instruction.memory_index_scale().into());
        Some(
            register(instruction.memory_base())?
                .wrapping_add(index)
                .wrapping_add(instruction.memory_displacement64())
                .wrapping_add(segment),
        )
    }
}

fn mask(bytes: usize) -> u64 {
    match bytes {
        0..8 => (1 << (8 * bytes)) - 1,
        _ => u64::MAX,
    }
}

/// The general register that `register` is, or is the low part of.
fn general(regs: &mut kvm_regs, register: Register) -> Option<&mut u64> {
    Some(match register.full_register() {
        Register::RAX => &mut regs.rax,
        Register::RBX => &mut regs.rbx,
        Register::RCX => &mut regs.rcx,
        Register::RDX => &mut regs.rdx,
        Register::RSI => &mut regs.rsi,
        Register::RDI => &mut regs.rdi,
        Register::RSP => &mut regs.rsp,
        Register::RBP => &mut regs.rbp,
        Register::R8 => &mut regs.r8,
        Register::R9 => &mut regs.r9,
        Register::R10 => &mut regs.r10,
        Register::R11 => &mut regs.r11,
        Register::R12 => &mut regs.r12,
        Register::R13 => &mut regs.r13,
        Register::R14 => &mut regs.r14,
        Register::R15 => &mut regs.r15,
        _ => return None,
    })
}
