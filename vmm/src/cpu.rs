//! What CPUID tells the guest: the host's processor as KVM supports it, one package of
//! single-threaded cores, KVM's own leaves, and nothing that cannot work here.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// KVM's leaves: signature, features, and the frequencies of TSC and APIC timer.
const KVM_SIGNATURE: u32 = 0x4000_0000;
const KVM_FREQUENCIES: u32 = 0x4000_0010;
/// KVM's local APIC timers count at 1 GHz.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// Leaf 1, ECX.
const MONITOR: u32 = 1 << 3;
const CX16: u32 = 1 << 13;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: EBX counts logical processors.
const HTT: u32 = 1 << 28;
/// Leaf 6, EAX: the APIC timer always runs.
const ARAT: u32 = 1 << 2;
/// Leaf 0x80000001, ECX: several cores without threads; leaf 0x8000001e is there.
const CMP_LEGACY: u32 = 1 << 1;
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;

/// The guest's processors do not fit in KVM's table.
#[derive(Debug, thiserror::Error)]
#[error("the host's CPUID has more leaves than KVM takes back")]
pub struct Error;

/// The processors that a guest is to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processors {
    /// How many, at least 1. Their APIC identifiers count from 0.
    pub count: u8,
    /// Frequency of their time-stamp counters in kHz, if KVM knows it: spares guests that look
    /// for it a calibration.
    pub tsc_khz: Option<u32>,
    /// KVM runs without VMX or SVM: leave out what its emulated ring 0 cannot do.
    pub fallback: bool,
}

impl Processors {
    /// The CPUID of the vCPU with `apic_id`, out of what `KVM_GET_SUPPORTED_CPUID` gave.
    ///
    /// # Errors
    /// More leaves than KVM takes.
    pub fn cpuid(&self, supported: &CpuId, apic_id: u8) -> Result<CpuId, Error> {
        let supported = supported.as_slice();
        let largest = |first: u32| {
            supported
                .iter()
                .find(|entry| entry.function == first)
                .map_or(0, |entry| entry.eax)
        };
        let amd = supported.iter().any(|entry| {
            // "AuthenticAMD" or "HygonGenuine".
            entry.function == 0 && matches!(&entry.ebx.to_le_bytes(), b"Auth" | b"Hygo")
        });
        let topology_extensions = supported
            .iter()
            .any(|entry| entry.function == 0x8000_0001 && entry.ecx & TOPOLOGY_EXTENSIONS != 0);

        let mut leaves: Vec<_> = supported
            .iter()
            .filter(|entry| !self.leaves_out(entry.function))
            .copied()
            .collect();
        for leaf in &mut leaves {
            match leaf.function {
                1 => self.identify(leaf, apic_id),
                4 => self.share_cache(leaf, true),
                6 => {
                    (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (leaf.eax & ARAT, 0, 0, 0);
                }
                KVM_SIGNATURE if self.tsc_khz.is_some() => {
                    leaf.eax = leaf.eax.max(KVM_FREQUENCIES);
                }
                0x8000_0001 if amd && self.count > 1 => leaf.ecx |= CMP_LEGACY,
                // The size of an APIC identifier in bits, the count of cores less one.
                0x8000_0008 if amd => {
                    leaf.ecx = (self.id_bits() << 12) | (u32::from(self.count) - 1);
                }
                0x8000_001d => self.share_cache(leaf, false),
                0x8000_001e if topology_extensions => {
                    (leaf.eax, leaf.ebx) = (apic_id.into(), apic_id.into());
                    (leaf.ecx, leaf.edx) = (0, 0);
                }
                _ => {}
            }
        }
        for leaf in [0xb, 0x1f] {
            if largest(0) >= leaf {
                leaves.extend(self.levels(leaf, apic_id));
            }
        }
        if let Some(tsc_khz) = self.tsc_khz
            && largest(KVM_SIGNATURE) != 0
        {
            leaves.retain(|entry| entry.function != KVM_FREQUENCIES);
            leaves.push(kvm_cpuid_entry2 {
                function: KVM_FREQUENCIES,
                eax: tsc_khz,
                ebx: APIC_BUS_KHZ,
                ..Default::default()
            });
        }
        CpuId::from_entries(&leaves).map_err(|_| Error)
    }

    /// Leaves that the guest does not get as the host has them. An absent leaf reads as zero.
    fn leaves_out(&self, leaf: u32) -> bool {
        match leaf {
            // MONITOR/MWAIT; performance counters, Intel's and AMD's.
            5 | 0xa | 0x8000_0022 => true,
            // Topology: ours is made in `levels`; AMD's newest form is not needed with it.
            0xb | 0x1f | 0x8000_0026 => true,
            // SMAP, AVX2, SHA, fast string moves: none works where ring 0 is emulated.
            7 => self.fallback,
            _ => false,
        }
    }

    /// Bits of an APIC identifier that number the cores of the package.
    fn id_bits(&self) -> u32 {
        self.ids().trailing_zeros()
    }

    /// How many APIC identifiers the package spans: a power of two.
    fn ids(&self) -> u32 {
        u32::from(self.count).next_power_of_two()
    }

    /// Leaf 1: identifiers and features.
    fn identify(&self, leaf: &mut kvm_cpuid_entry2, apic_id: u8) {
        let logical = self.ids().min(255);
        leaf.ebx = (leaf.ebx & 0xffff) | (logical << 16) | (u32::from(apic_id) << 24);
        leaf.ecx = (leaf.ecx & !MONITOR) | TSC_DEADLINE | HYPERVISOR;
        if self.fallback {
            leaf.ecx &= !CX16;
        }
        leaf.edx = if self.count > 1 {
            leaf.edx | HTT
        } else {
            leaf.edx & !HTT
        };
    }

    /// Leaf 4 and AMD's 0x8000001d: who shares a cache. All cores share the third level, none
    /// the others; `cores` also says how many there are (Intel only).
    fn share_cache(&self, leaf: &mut kvm_cpuid_entry2, cores: bool) {
        let (kind, level) = (leaf.eax & 0x1f, (leaf.eax >> 5) & 0x7);
        if kind == 0 {
            return;
        }
        let sharing = if level >= 3 { self.ids() } else { 1 };
        leaf.eax = (leaf.eax & 0x3fff) | ((sharing - 1) << 14);
        if cores {
            leaf.eax |= (self.ids().min(64) - 1) << 26;
        }
    }

    /// Leaf 0xb or 0x1f, extended topology: threads, cores, the end.
    fn levels(&self, function: u32, apic_id: u8) -> [kvm_cpuid_entry2; 3] {
        const THREAD: u32 = 1;
        const CORE: u32 = 2;
        let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: (kind << 8) | index,
            edx: apic_id.into(),
            ..Default::default()
        };
        [
            level(0, 0, 1, THREAD),
            level(1, self.id_bits(), self.count.into(), CORE),
            level(2, 0, 0, 0),
        ]
    }
}

#[cfg(test)]
#[path = "cpu_tests.rs"]
mod tests;
