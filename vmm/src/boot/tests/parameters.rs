use kvm_bindings::kvm_sregs;

use super::*;

/// RAM on both sides of the hole. (Nothing of it is touched, so it costs nothing.)
fn large_memory() -> GuestMemoryMmap {
    let low = (GuestAddress(0), layout::HOLE as usize);
    GuestMemoryMmap::from_ranges(&[low, (GuestAddress(layout::RAM_ABOVE), 2 << 30)]).unwrap()
}

const LARGE_MAP: [(u64, u64, u32); 7] = [
    (0, 0x9_fc00, 1),
    (0x9_fc00, 0x400, 2),
    (0xe_0000, 0x1_0000, 3),
    (0x10_0000, 0xbff0_0000, 1),
    (0xe000_0000, 0x10_0000, 2),
    (0xfffb_c000, 0x4000, 2),
    (0x1_0000_0000, 0x8000_0000, 1),
];

#[test]
fn the_zero_page_is_laid_out_as_bootparam_h_says() {
    let memory = large_memory();
    let bzimage = bzimage_file(&gzip(&small_elf()));
    let kernel = Kernel {
        image: Source::Bytes(&bzimage),
        initrd: &[Source::Bytes(b"initrd!")],
        cmdline: CMDLINE,
        rsdp: Some(layout::ACPI),
        unpacked: None,
    };
    let entry = load(&memory, &kernel).unwrap();
    let at = |offset: u64| layout::ZERO_PAGE + offset;

    let page = read(&memory, at(0), 4096);
    // The setup header is the bzImage's, but for what a boot loader fills in.
    assert_eq!(page[0x1f1..0x210], bzimage[0x1f1..0x210]);
    assert_eq!(page[0x22c..0x26c], bzimage[0x22c..0x26c]);
    assert_eq!(page[0x210], 0xff, "type_of_loader");
    assert_eq!(page[0x1ef], 0, "sentinel");
    assert!(page[0x26c..0x2d0].iter().all(|byte| *byte == 0));
    assert_eq!(read_u64(&memory, at(0x070)), layout::ACPI, "acpi_rsdp_addr");
    let initrd = entry.initrd.clone().unwrap();
    assert_eq!(
        read_u32(&memory, at(0x218)),
        initrd.start as u32,
        "ramdisk_image"
    );
    assert_eq!(read_u32(&memory, at(0x21c)), 8, "ramdisk_size");
    assert_eq!(
        read_u32(&memory, at(0x228)),
        layout::CMDLINE as u32,
        "cmd_line_ptr"
    );

    assert_eq!(page[0x1e8], 7, "e820_entries");
    for (index, expected) in LARGE_MAP.into_iter().enumerate() {
        let entry = at(0x2d0 + 20 * index as u64);
        let found = (
            read_u64(&memory, entry),
            read_u64(&memory, entry + 8),
            read_u32(&memory, entry + 16),
        );
        assert_eq!(found, expected);
    }
}

#[test]
fn what_follows_a_shorter_setup_header_is_not_part_of_it() {
    let mut bzimage = bzimage_file(&gzip(&small_elf()));
    // The header ends at 0x268; then comes code. `setup_data` is the boot loader's to fill in.
    bzimage[0x201] = 0x66;
    bzimage[0x268..0x270].fill(0xcc);
    bzimage[0x250..0x258].fill(0xff);
    let memory = memory(4);
    load_bytes(&memory, &bzimage).unwrap();
    let page = read(&memory, layout::ZERO_PAGE, 4096);
    assert_eq!(page[0x258..0x268], bzimage[0x258..0x268]);
    assert_eq!(page[0x268..0x2d0], [0; 0x68]);
    assert_eq!(page[0x250..0x258], [0; 8], "setup_data");
}

#[test]
fn an_elf_gets_a_setup_header_made_for_it() {
    let memory = memory(4);
    load_bytes(&memory, &small_elf()).unwrap();
    let page = read(&memory, layout::ZERO_PAGE, 4096);
    assert_eq!(&page[0x1fe..0x200], [0x55, 0xaa]);
    assert_eq!(&page[0x202..0x208], b"HdrS\x0f\x02");
    assert_eq!((page[0x210], &page[0x218..0x220]), (0xff, &[0; 8][..]));
    assert_eq!(page[0x1e8], 6);
}

#[test]
fn pvh_start_info_is_laid_out_as_its_header_says() {
    let memory = large_memory();
    let elf = elf_file(MIB, &[segment(MIB, b"x", 0x1000), pvh_note(MIB as u32)]);
    let image = Source::Bytes(&elf);
    let initrd = [Source::Bytes(b"initrd")];
    let kernel = Kernel {
        image,
        initrd: &initrd,
        cmdline: CMDLINE,
        rsdp: Some(layout::ACPI),
        unpacked: None,
    };
    let entry = load(&memory, &kernel).unwrap();
    let at = |offset: u64| layout::PVH_START_INFO + offset;

    let head = [0, 4, 8, 12].map(|offset| read_u32(&memory, at(offset)));
    assert_eq!(
        head,
        [0x336e_c578, 1, 0, 1],
        "magic, version, flags, nr_modules"
    );
    assert_eq!(read_u64(&memory, at(24)), layout::CMDLINE);
    assert_eq!(read_u64(&memory, at(32)), layout::ACPI);
    let module = read_u64(&memory, at(16));
    let initrd = entry.initrd.clone().unwrap();
    assert_eq!(read_u64(&memory, module), initrd.start);
    assert_eq!(read_u64(&memory, module + 8), 8);
    assert_eq!(
        (
            read_u64(&memory, module + 16),
            read_u64(&memory, module + 24)
        ),
        (0, 0)
    );
    let map = read_u64(&memory, at(40));
    assert_eq!(read_u32(&memory, at(48)), 7);
    for (index, (start, size, kind)) in LARGE_MAP.into_iter().enumerate() {
        let entry = map + 24 * index as u64;
        assert_eq!(
            (read_u64(&memory, entry), read_u64(&memory, entry + 8)),
            (start, size)
        );
        assert_eq!(
            (read_u32(&memory, entry + 16), read_u32(&memory, entry + 20)),
            (kind, 0)
        );
    }

    let registers = entry.regs();
    assert_eq!(
        (registers.rip, registers.rbx, registers.rflags),
        (MIB, at(0), 2)
    );
    let sregs = entry.sregs(kvm_sregs {
        apic_base: 0xfee0_0900,
        ..Default::default()
    });
    assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
    assert_eq!(
        (sregs.cs.base, sregs.cs.limit, sregs.cs.db, sregs.cs.l),
        (0, u32::MAX, 1, 0)
    );
    assert_eq!(
        (sregs.tr.base, sregs.tr.limit, sregs.tr.type_),
        (0, 0x67, 0xb)
    );
    assert_eq!(sregs.apic_base, 0xfee0_0900);
}

#[test]
fn a_start_info_without_initrd_or_acpi_says_so() {
    let memory = memory(4);
    let elf = elf_file(MIB, &[segment(MIB, b"x", 0x1000), pvh_note(MIB as u32)]);
    load_bytes(&memory, &elf).unwrap();
    assert_eq!(read_u32(&memory, layout::PVH_START_INFO + 12), 0);
    assert_eq!(read_u64(&memory, layout::PVH_START_INFO + 16), 0);
    assert_eq!(read_u64(&memory, layout::PVH_START_INFO + 32), 0);
}

#[test]
fn long_mode_maps_four_gibibytes_onto_themselves() {
    let memory = memory(4);
    let entry = load_bytes(&memory, &small_elf()).unwrap();
    let registers = entry.regs();
    assert_eq!((registers.rip, registers.rsi), (MIB, layout::ZERO_PAGE));
    let sregs = entry.sregs(kvm_sregs::default());
    assert_eq!(
        (sregs.cr0, sregs.cr4, sregs.efer),
        (0x8000_0011, 0x20, 0x500)
    );
    assert_eq!(
        (sregs.cs.selector, sregs.cs.l, sregs.cs.db, sregs.cs.type_),
        (0x10, 1, 0, 0xb)
    );
    assert_eq!(
        (sregs.ds.selector, sregs.ds.type_, sregs.ds.g),
        (0x18, 3, 1)
    );
    assert_eq!(
        read_u64(&memory, sregs.gdt.base + 0x10),
        0x00af_9b00_0000_ffff
    );
    assert_eq!(sregs.gdt.limit, 47);

    let frame = |entry: u64| {
        assert_eq!(entry & 0xfff & !0x80, 3, "present and writable");
        entry & !0xfff
    };
    let walk = |address: u64| {
        let index = |shift: u32| 8 * ((address >> shift) & 0x1ff);
        let pdpt = frame(read_u64(&memory, sregs.cr3 + index(39)));
        let directory = frame(read_u64(&memory, pdpt + index(30)));
        let large = read_u64(&memory, directory + index(21));
        assert_ne!(large & 0x80, 0, "a 2 MiB page");
        frame(large) + (address & 0x1f_ffff)
    };
    for address in [
        0,
        0x1234,
        0x20_0000,
        0x3fff_ffff,
        0x4000_0000,
        0xfee0_0000,
        0xffff_ffff,
    ] {
        assert_eq!(walk(address), address);
    }
}

#[test]
fn command_lines_that_the_kernel_cannot_take_are_refused() {
    let load_line = |image: &[u8], cmdline: &str| {
        let image = Source::Bytes(image);
        load(
            &memory(4),
            &Kernel {
                image,
                initrd: &[],
                cmdline,
                rsdp: None,
                unpacked: None,
            },
        )
        .map(|_| ())
    };
    let elf = small_elf();
    load_line(&elf, &"x".repeat(2047)).unwrap();
    let long = load_line(&elf, &"x".repeat(2048));
    assert!(matches!(
        long,
        Err(Error::CmdlineLength {
            len: 2048,
            max: 2047
        })
    ));
    let mut bzimage = bzimage_file(&gzip(&elf));
    bzimage[0x238..0x23c].copy_from_slice(&255_u32.to_le_bytes());
    load_line(&bzimage, &"x".repeat(255)).unwrap();
    let long = load_line(&bzimage, &"x".repeat(256));
    assert!(matches!(
        long,
        Err(Error::CmdlineLength { len: 256, max: 255 })
    ));
    for stray in ['\0', '\n', '\r'] {
        let result = load_line(&elf, &format!("quiet{stray}init=/bin/sh"));
        assert!(matches!(result, Err(Error::CmdlineCharacter(found)) if found == stray));
    }
}

#[test]
fn memory_that_is_too_small_or_not_at_zero_is_refused() {
    let tiny = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    assert!(matches!(
        load_bytes(&tiny, &small_elf()),
        Err(Error::TooLittleMemory(_))
    ));
    let high = GuestMemoryMmap::from_ranges(&[(GuestAddress(MIB), 4 << 20)]).unwrap();
    assert!(matches!(
        load_bytes(&high, &small_elf()),
        Err(Error::TooLittleMemory(_))
    ));
}
