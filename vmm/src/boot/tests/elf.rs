use super::*;

#[test]
fn segments_go_to_their_physical_addresses_from_a_file_and_from_memory() {
    let elf = elf_file(
        2 * MIB + 4,
        &[
            segment(2 * MIB, b"text of the kernel", 0x1000),
            segment(MIB, b"data", 0x8000),
        ],
    );
    let on_disk = file(&elf);
    for image in [Source::Bytes(&elf), Source::File(&on_disk)] {
        let memory = memory(4);
        let kernel = Kernel {
            image,
            initrd: &[],
            cmdline: CMDLINE,
            rsdp: None,
            unpacked: None,
        };
        let entry = load(&memory, &kernel).unwrap();
        assert_eq!(
            (entry.protocol, entry.rip),
            (Protocol::Linux64, 2 * MIB + 4)
        );
        assert_eq!((entry.kernel, entry.initrd), (MIB..2 * MIB + 0x1000, None));
        assert_eq!(read(&memory, 2 * MIB, 20), b"text of the kernel\0\0");
        assert_eq!(read(&memory, MIB, 6), b"data\0\0");
        assert_eq!(read(&memory, layout::CMDLINE, 20), b"console=ttyS0 quiet\0");
    }
}

#[test]
fn a_pvh_note_is_found_among_others_and_in_any_note_segment() {
    let code = segment(MIB, &[0x90; 64], 64);
    let xen = note(b"Xen\0", 18, &(MIB as u32 + 16).to_le_bytes());
    let others = [
        note(b"Xen\0", 6, b"linux\0"),
        note(b"GNU\0", 18, &[0; 4]),
        note(b"stapsdt", 3, &[7; 9]),
    ];
    let mixed = [others.concat(), xen.clone(), others.concat()].concat();
    let alone = notes(xen);
    for parts in [
        vec![code.clone(), alone.clone()],
        vec![notes(mixed), code.clone()],
        vec![
            notes(others.concat()),
            code.clone(),
            alone.clone(),
            notes(others.concat()),
        ],
    ] {
        let entry = load_bytes(&memory(4), &elf_file(MIB, &parts)).unwrap();
        assert_eq!((entry.protocol, entry.rip), (Protocol::Pvh, MIB + 16));
    }
    let without = load_bytes(&memory(4), &elf_file(MIB, &[code, notes(others.concat())])).unwrap();
    assert_eq!((without.protocol, without.rip), (Protocol::Linux64, MIB));
}

#[test]
fn what_is_no_x86_64_executable_is_refused() {
    for (offset, byte, why) in [
        (4, 1, "x86_64"),
        (5, 2, "x86_64"),
        (18, 183, "x86_64"),
        (16, 1, "not an executable"),
        (16, 4, "not an executable"),
        (54, 32, "program headers"),
        (56, 255, "too many"),
    ] {
        let mut elf = small_elf();
        elf[offset] = byte;
        match load_bytes(&memory(4), &elf) {
            Err(Error::Elf(said)) => assert!(said.contains(why), "{said}"),
            other => panic!("byte {offset}: {other:?}"),
        }
    }
    for len in [4, 63, 64, 100] {
        let cut = load_bytes(&memory(4), &small_elf()[..len]);
        assert!(matches!(cut, Err(Error::Read { .. })), "{len}: {cut:?}");
    }
}

#[test]
fn segments_that_do_not_lie_in_free_memory_are_refused() {
    for (address, len) in [
        (0, 0x1000),
        (layout::PVH_START_INFO, 0x10),
        (layout::PAGE_TABLES + 0x5fff, 0x10),
        (layout::CMDLINE - 1, 2),
        (layout::CMDLINE + 0x7ff, 0x1000),
        (layout::ACPI, 0x10),
        (layout::ACPI_END - 1, 0x2000),
        (4 * MIB - 1, 2),
        (8 * MIB, 1),
        (0xffff_ffff_8100_0000, 0x1000),
        (u64::MAX - 1, 0x1000),
        (MIB, u64::MAX),
    ] {
        let elf = elf_file(address, &[segment(address, b"x", len)]);
        let result = load_bytes(&memory(4), &elf);
        assert!(
            matches!(result, Err(Error::SegmentPlacement { .. })),
            "{address:#x}: {result:?}"
        );
    }
    let last = elf_file(
        MIB,
        &[segment(MIB, b"x", 0x1000), segment(u64::MAX, b"", 1)],
    );
    assert!(matches!(
        load_bytes(&memory(4), &last),
        Err(Error::SegmentPlacement { .. })
    ));
    // Low memory that nothing else uses is as good as any.
    for (address, len) in [
        (0xf000, 0x1_1000),
        (0x2_0800, 0x1000),
        (0xf_f000, 0x2000),
        (MIB, 3 * MIB),
    ] {
        load_bytes(
            &memory(4),
            &elf_file(address, &[segment(address, b"x", len)]),
        )
        .unwrap();
    }
}

#[test]
fn segments_that_contradict_themselves_are_refused() {
    let load = |parts: &[Part], entry| load_bytes(&memory(4), &elf_file(entry, parts));

    let overlapping = [
        segment(MIB, b"a", 0x1001),
        segment(MIB + 0x1000, b"b", 0x1000),
    ];
    assert!(matches!(
        load(&overlapping, MIB),
        Err(Error::SegmentOverlap(0x10_1000))
    ));
    let touching = [
        segment(MIB, b"a", 0x1000),
        segment(MIB + 0x1000, b"b", 0x1000),
    ];
    load(&touching, MIB).unwrap();

    assert!(matches!(
        load(&[segment(MIB, b"abc", 2)], MIB),
        Err(Error::Elf(_))
    ));
    assert!(matches!(load(&[], MIB), Err(Error::Elf(_))));
    assert!(matches!(
        load(&[segment(MIB, b"", 0)], MIB),
        Err(Error::Elf(_))
    ));
    assert!(matches!(
        load(&touching, MIB + 0x2000),
        Err(Error::EntryPoint(_))
    ));
    let outside = [segment(MIB, b"a", 0x1000), pvh_note(MIB as u32 - 1)];
    assert!(matches!(load(&outside, MIB), Err(Error::EntryPoint(_))));
    let short = [segment(MIB, b"a", 0x1000), notes(note(b"Xen\0", 18, b"12"))];
    assert!(matches!(load(&short, MIB), Err(Error::Elf(_))));
    let large = [segment(MIB, b"a", 0x1000), notes(vec![0; 65 << 10])];
    assert!(matches!(load(&large, MIB), Err(Error::Elf(_))));

    // A segment whose bytes the file does not have.
    let mut elf = small_elf();
    elf.truncate(elf.len() - 1);
    assert!(matches!(load_bytes(&memory(4), &elf), Err(Error::Elf(_))));
}

#[test]
fn what_is_no_kernel_is_named() {
    for (bytes, hint) in [
        (vec![0; 4096], "a bzImage"),
        (vec![], "a bzImage"),
        (b"#!/bin/sh\n".to_vec(), "a bzImage"),
        (gzip(&vec![7; 100_000]).repeat(10), "gzip: unpack it first"),
    ] {
        let error = load_bytes(&memory(4), &bytes).unwrap_err();
        assert!(matches!(error, Error::UnknownKernel { .. }), "{error:?}");
        assert!(error.to_string().ends_with(hint), "{error}");
    }
}

#[test]
fn files_that_are_not_regular_are_refused() {
    let null = std::fs::File::open("/dev/null").unwrap();
    let kernel = Kernel {
        image: Source::File(&null),
        initrd: &[],
        cmdline: CMDLINE,
        rsdp: None,
        unpacked: None,
    };
    assert!(matches!(
        load(&memory(4), &kernel),
        Err(Error::Read { what: "kernel", .. })
    ));
    let elf = small_elf();
    let image = Source::Bytes(&elf);
    let initrd = &[Source::File(&null)];
    let kernel = Kernel {
        image,
        initrd,
        cmdline: CMDLINE,
        rsdp: None,
        unpacked: None,
    };
    assert!(matches!(
        load(&memory(4), &kernel),
        Err(Error::Read { what: "initrd", .. })
    ));
}
