//! Hosts whose KVM has no VMX or SVM: what such a KVM leaves undone is done here.
//!
//! There (`kvm_pvm`) the guest's ring 3 runs natively and its ring 0 in KVM's instruction
//! emulator. Two things are missing for an unmodified kernel: SYSCALL does not enter ring 0
//! (`syscall`), and some instructions end the run with an internal error (`instruction`).
//! An ordinary host never makes a [`Fallback`], and nothing else depends on this module.

mod instruction;
mod syscall;

use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER, kvm_enable_cap, kvm_regs,
};
use kvm_ioctls::{
    Error, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, SyncReg, VcpuFd, VmFd,
};
use vm_memory::GuestMemoryMmap;

/// What a kernel needs on its command line here, whatever it is: `noxsave` and `clearcpuid=` keep
/// it from instructions that the emulator lacks (CPUID itself cannot hide them), `reboot=k` from
/// a triple fault by INT3; the rest saves emulated instructions.
pub const KERNEL_ARGUMENTS: &str = "noxsave \
    clearcpuid=129,137,147,148,151,153,297,308,317,580 reboot=k rodata=off nokaslr mitigations=off \
    noreplace-smp percpu_alloc=page";

/// The arguments without which a kernel does not get through here.
pub const REQUIRED_ARGUMENTS: [&str; 2] = ["noxsave", "clearcpuid="];

/// Makes KVM hand writes of the SYSCALL registers to us. Once a VM, before its vCPUs run.
pub fn prepare(vm: &VmFd) -> Result<(), Error> {
    let mut capability = kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        ..Default::default()
    };
    capability.args[0] = KVM_MSR_EXIT_REASON_FILTER.into();
    vm.enable_cap(&capability)?;
    let denied = MsrFilterRange {
        flags: MsrFilterRangeFlags::WRITE,
        base: syscall::STAR,
        msr_count: syscall::COUNT,
        bitmap: &[0],
    };
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[denied])
}

/// The state that one vCPU needs.
pub struct Fallback {
    memory: GuestMemoryMmap,
    syscall: syscall::Syscall,
}

impl Fallback {
    /// For a vCPU that has not run yet.
    pub fn new(memory: GuestMemoryMmap, fd: &mut VcpuFd) -> Self {
        fd.set_sync_valid_reg(SyncReg::Register);
        Self {
            memory,
            syscall: syscall::Syscall::default(),
        }
    }

    /// The guest wrote one of the SYSCALL registers.
    pub fn write_msr(&mut self, fd: &mut VcpuFd, msr: u32, value: u64) -> Result<(), Error> {
        self.syscall.write_msr(fd, &self.memory, msr, value)
    }

    /// A debug exception at `pc` with this DR6: the breakpoint on the page fault handler was hit,
    /// a step from it is done, or it is the guest's own.
    pub fn debug(&mut self, fd: &mut VcpuFd, pc: u64, dr6: u64) -> Result<(), Error> {
        self.syscall.debug(fd, &self.memory, pc, dr6)
    }

    /// The emulator lacks the instruction at RIP, whose `bytes` KVM gave. `false` if we do too.
    pub fn instruction(&mut self, fd: &mut VcpuFd, bytes: &[u8]) -> Result<bool, Error> {
        instruction::emulate(fd, &self.memory, bytes)
    }
}

/// The registers that came with the exit.
fn registers(fd: &VcpuFd) -> kvm_regs {
    fd.sync_regs().regs
}

/// Has KVM take these registers when it next enters the guest.
fn set_registers(fd: &mut VcpuFd, regs: kvm_regs) {
    fd.sync_regs_mut().regs = regs;
    fd.set_sync_dirty_reg(SyncReg::Register);
}
