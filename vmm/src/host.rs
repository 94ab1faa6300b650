//! What kind of host this is.

use std::arch::x86_64::__cpuid;
use std::path::Path;

/// CPUID leaf 1, ECX: VMX.
const VMX: u32 = 1 << 5;
/// CPUID leaf 0x80000001, ECX: SVM.
const SVM: u32 = 1 << 2;

/// Who executes the guest's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Virtualization {
    /// The processor, with VMX or SVM.
    Hardware,
    /// KVM's instruction emulator: the host is itself a virtual machine without VMX and SVM, and
    /// `kvm_pvm` serves `/dev/kvm`. Guest ring 3 runs natively, ring 0 does not.
    Emulated,
}

impl Virtualization {
    /// Asks the processor, and the kernel for the module that does without its help.
    #[must_use]
    pub fn of_host() -> Self {
        let (vmx, svm) = (
            __cpuid(1).ecx & VMX != 0,
            __cpuid(0x8000_0001).ecx & SVM != 0,
        );
        Self::from_facts(vmx || svm, Path::new("/sys/module/kvm_pvm").exists())
    }

    fn from_facts(in_hardware: bool, has_pvm: bool) -> Self {
        if in_hardware && !has_pvm {
            Self::Hardware
        } else {
            Self::Emulated
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_needs_the_processor_and_no_pvm() {
        assert_eq!(
            Virtualization::from_facts(true, false),
            Virtualization::Hardware
        );
        for (in_hardware, has_pvm) in [(false, false), (true, true), (false, true)] {
            let kind = Virtualization::from_facts(in_hardware, has_pvm);
            assert_eq!(kind, Virtualization::Emulated, "{in_hardware} {has_pvm}");
        }
    }

    #[test]
    fn the_processor_says_what_the_kernel_says_of_it() {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let flagged = cpuinfo
            .split_whitespace()
            .any(|word| word == "vmx" || word == "svm");
        let asked = __cpuid(1).ecx & VMX != 0 || __cpuid(0x8000_0001).ecx & SVM != 0;
        assert_eq!(asked, flagged);
    }
}
