use super::*;

const KVM: &[u8; 12] = b"KVMKVMKVM\0\0\0";

fn leaf(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = regs;
    let flags = if matches!(function, 4 | 7 | 0xb | 0x1f | 0x8000_001d) {
        KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    } else {
        0
    };
    kvm_cpuid_entry2 {
        function,
        index,
        flags,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

fn words(bytes: &[u8; 12]) -> [u32; 3] {
    let (words, _) = bytes.as_chunks::<4>();
    [words[0], words[1], words[2]].map(u32::from_le_bytes)
}

fn kvm_leaves() -> [kvm_cpuid_entry2; 2] {
    let [ebx, ecx, edx] = words(KVM);
    [
        leaf(KVM_SIGNATURE, 0, [0x4000_0001, ebx, ecx, edx]),
        leaf(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
    ]
}

/// What a four-core Intel host with threads and an AMD one report, in the leaves that matter.
fn intel() -> Vec<kvm_cpuid_entry2> {
    let [ebx, edx, ecx] = words(b"GenuineIntel");
    let mut leaves = vec![
        leaf(0, 0, [0x1f, ebx, ecx, edx]),
        leaf(
            1,
            0,
            [
                0x806f8,
                0x0308_0800,
                0x76fa_3203 | MONITOR | CX16,
                0x1f8b_fbff,
            ],
        ),
        leaf(4, 0, [0xfc00_4121, 0x02c0_003f, 0x3f, 0]),
        leaf(4, 1, [0xfc00_4122, 0x01c0_003f, 0x3f, 0]),
        leaf(4, 2, [0xfc00_4143, 0x03c0_003f, 0x7ff, 0]),
        leaf(4, 3, [0xfc07_c163, 0x0380_003f, 0x9fff, 4]),
        leaf(4, 4, [0; 4]),
        leaf(5, 0, [0x40, 0x40, 3, 0x2020]),
        leaf(6, 0, [0x00df_8ff7, 2, 9, 0]),
        leaf(7, 0, [1, 0xf1bf_07ab, 0, 0]),
        leaf(0xa, 0, [0x0830_0805, 0, 0, 0x8603]),
        leaf(0xb, 0, [1, 2, 0x100, 3]),
        leaf(0xb, 1, [7, 8, 0x201, 3]),
        leaf(0x1f, 0, [1, 2, 0x100, 3]),
        leaf(0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
        leaf(0x8000_0008, 0, [0x3034, 0x200, 0, 0]),
    ];
    leaves.extend(kvm_leaves());
    leaves
}

fn amd() -> Vec<kvm_cpuid_entry2> {
    let [ebx, edx, ecx] = words(b"AuthenticAMD");
    let mut leaves = vec![
        leaf(0, 0, [0x10, ebx, ecx, edx]),
        leaf(
            1,
            0,
            [0x00a1_0f11, 0x0102_0800, 0x8120_2000 | CX16, 0x078b_fbff],
        ),
        leaf(7, 0, [1, 0x0180_0002, 0x104, 0x2000_0000]),
        leaf(0xb, 0, [0, 0, 0, 1]),
        leaf(
            0x8000_0001,
            0,
            [0x00a1_0f11, 0x4000_0000, 0x0040_0391, 0x23d3_fbff],
        ),
        leaf(0x8000_0008, 0, [0x3030, 0x5002_0005, 0x7001, 0]),
        leaf(0x8000_001d, 0, [0x4121, 0x01c0_003f, 0x3f, 0]),
        leaf(0x8000_001d, 3, [0x4163, 0x03c0_003f, 0x7fff, 1]),
        leaf(0x8000_001d, 4, [0; 4]),
        leaf(0x8000_001e, 0, [9, 0x109, 0x103, 0]),
        leaf(0x8000_0022, 0, [1, 6, 0, 0]),
        leaf(0x8000_0026, 0, [0x8000_0001, 2, 0x100, 9]),
    ];
    leaves.extend(kvm_leaves());
    leaves
}

fn processors(count: u8) -> Processors {
    Processors {
        count,
        tsc_khz: Some(2_600_000),
        fallback: false,
    }
}

fn cpuid(processors: Processors, supported: &[kvm_cpuid_entry2], apic_id: u8) -> CpuId {
    processors
        .cpuid(&CpuId::from_entries(supported).unwrap(), apic_id)
        .unwrap()
}

fn find(cpuid: &CpuId, function: u32, index: u32) -> Option<[u32; 4]> {
    let mut found = cpuid
        .as_slice()
        .iter()
        .filter(|entry| entry.function == function && entry.index == index)
        .map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx]);
    let first = found.next();
    assert_eq!(
        found.next(),
        None,
        "leaf {function:#x}.{index} is there twice"
    );
    first
}

#[test]
fn each_processor_has_its_own_identifier_in_every_leaf_that_names_it() {
    for supported in [intel(), amd()] {
        for count in [1, 2, 3, 8, 64, 254] {
            for id in [0, count / 2, count - 1] {
                let cpuid = cpuid(processors(count), &supported, id);
                assert_eq!(find(&cpuid, 1, 0).unwrap()[1] >> 24, u32::from(id));
                for index in 0..3 {
                    assert_eq!(find(&cpuid, 0xb, index).unwrap()[3], u32::from(id));
                }
            }
        }
    }
    let cpuid = cpuid(processors(4), &amd(), 3);
    assert_eq!(find(&cpuid, 0x8000_001e, 0), Some([3, 3, 0, 0]));
}

#[test]
fn the_topology_is_one_package_of_single_threaded_cores() {
    for (count, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (254, 8)] {
        let cpuid = cpuid(processors(count), &intel(), 0);
        for function in [0xb, 0x1f] {
            assert_eq!(find(&cpuid, function, 0), Some([0, 1, 0x100, 0]));
            assert_eq!(
                find(&cpuid, function, 1),
                Some([bits, count.into(), 0x201, 0])
            );
            assert_eq!(find(&cpuid, function, 2), Some([0, 0, 2, 0]));
        }
        let [_, ebx, _, edx] = find(&cpuid, 1, 0).unwrap();
        assert_eq!((ebx >> 16) & 0xff, (1 << bits).min(255));
        assert_eq!(edx & HTT != 0, count > 1);
    }
    // No leaf 0x1f where the host's CPUID ends before it.
    assert_eq!(find(&cpuid(processors(2), &amd(), 0), 0x1f, 0), None);
}

#[test]
fn caches_are_private_but_for_the_third_level() {
    let sharing = |leaf: Option<[u32; 4]>| (leaf.unwrap()[0] >> 14) & 0xfff;
    let of_intel = cpuid(processors(6), &intel(), 0);
    assert_eq!(
        [0, 1, 2, 3].map(|i| sharing(find(&of_intel, 4, i))),
        [0, 0, 0, 7]
    );
    assert_eq!(find(&of_intel, 4, 3).unwrap()[0] >> 26, 7);
    assert_eq!(find(&of_intel, 4, 3).unwrap()[0] & 0x3fff, 0x163);
    assert_eq!(find(&of_intel, 4, 4), Some([0; 4]));
    let of_amd = cpuid(processors(6), &amd(), 0);
    assert_eq!(
        [0, 3].map(|i| sharing(find(&of_amd, 0x8000_001d, i))),
        [0, 7]
    );
    // The field for cores has 6 bits.
    assert_eq!(
        find(&cpuid(processors(254), &intel(), 0), 4, 0).unwrap()[0] >> 26,
        63
    );
}

#[test]
fn amd_counts_its_cores_and_intel_keeps_its_reserved_bits() {
    let of_amd = cpuid(processors(6), &amd(), 0);
    assert_eq!(find(&of_amd, 0x8000_0008, 0).unwrap()[2], 3 << 12 | 5);
    assert_ne!(find(&of_amd, 0x8000_0001, 0).unwrap()[2] & CMP_LEGACY, 0);
    assert_eq!(
        find(&cpuid(processors(1), &amd(), 0), 0x8000_0001, 0).unwrap()[2] & CMP_LEGACY,
        0
    );
    let of_intel = cpuid(processors(6), &intel(), 0);
    assert_eq!(find(&of_intel, 0x8000_0008, 0), Some([0x3034, 0x200, 0, 0]));
    assert_eq!(find(&of_intel, 0x8000_0001, 0).unwrap()[2], 0x121);
}

#[test]
fn the_guest_knows_its_hypervisor_and_its_timers() {
    for supported in [intel(), amd()] {
        let cpuid = cpuid(processors(1), &supported, 0);
        let ecx = find(&cpuid, 1, 0).unwrap()[2];
        assert_eq!(
            ecx & (HYPERVISOR | TSC_DEADLINE | MONITOR | CX16),
            HYPERVISOR | TSC_DEADLINE | CX16
        );
        let [eax, ebx, ecx, edx] = find(&cpuid, KVM_SIGNATURE, 0).unwrap();
        assert_eq!((eax, [ebx, ecx, edx]), (KVM_FREQUENCIES, words(KVM)));
        assert_eq!(find(&cpuid, 0x4000_0001, 0), Some([0x0100_7efb, 0, 0, 0]));
        assert_eq!(
            find(&cpuid, KVM_FREQUENCIES, 0),
            Some([2_600_000, 1_000_000, 0, 0])
        );
    }
    let unknown = Processors {
        tsc_khz: None,
        ..processors(1)
    };
    let cpuid = cpuid(unknown, &intel(), 0);
    assert_eq!(find(&cpuid, KVM_SIGNATURE, 0).unwrap()[0], 0x4000_0001);
    assert_eq!(find(&cpuid, KVM_FREQUENCIES, 0), None);
}

#[test]
fn what_cannot_work_is_not_offered() {
    let of_intel = cpuid(processors(1), &intel(), 0);
    assert_eq!(
        [5, 0xa].map(|function| find(&of_intel, function, 0)),
        [None, None]
    );
    assert_eq!(find(&of_intel, 6, 0), Some([ARAT, 0, 0, 0]));
    assert_eq!(find(&of_intel, 7, 0).unwrap()[1], 0xf1bf_07ab);
    let of_amd = cpuid(processors(1), &amd(), 0);
    assert_eq!(
        [0x8000_0022, 0x8000_0026].map(|function| find(&of_amd, function, 0)),
        [None, None]
    );
}

#[test]
fn without_hardware_virtualization_the_guest_lacks_what_ring_0_cannot_do() {
    let fallback = Processors {
        fallback: true,
        ..processors(2)
    };
    let cpuid = cpuid(fallback, &amd(), 1);
    assert_eq!(find(&cpuid, 7, 0), None);
    assert_eq!(find(&cpuid, 1, 0).unwrap()[2] & CX16, 0);
    assert_ne!(find(&cpuid, 1, 0).unwrap()[2] & TSC_DEADLINE, 0);
}

#[test]
fn more_leaves_than_kvm_takes_are_an_error() {
    let supported = vec![leaf(0, 0, [0x1f, 0, 0, 0]); 256];
    let supported = CpuId::from_entries(&supported).unwrap();
    assert!(processors(1).cpuid(&supported, 0).is_err());
}
