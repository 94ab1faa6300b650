use super::*;

fn load_with(
    memory: &GuestMemoryMmap,
    image: &[u8],
    initrd: &[Source],
) -> Result<Option<Range<u64>>, Error> {
    let image = Source::Bytes(image);
    load(
        memory,
        &Kernel {
            image,
            initrd,
            cmdline: "",
            rsdp: None,
            unpacked: None,
        },
    )
    .map(|entry| entry.initrd)
}

#[test]
fn parts_are_laid_end_to_end_on_multiples_of_four() {
    let user = file(b"07070 user's");
    let parts = [
        Source::File(&user),
        Source::Bytes(b"odd"),
        Source::Bytes(b"last part"),
    ];
    let memory = memory(8);
    let range = load_with(&memory, &small_elf(), &parts).unwrap().unwrap();
    assert_eq!(range, 8 * MIB - 4096..8 * MIB - 4096 + 28);
    assert_eq!(
        read(&memory, range.start, 29),
        b"07070 user'sodd\0last part\0\0\0\0"
    );
}

#[test]
fn no_parts_or_empty_ones_are_no_initrd() {
    assert_eq!(load_with(&memory(4), &small_elf(), &[]).unwrap(), None);
    assert_eq!(
        load_with(&memory(4), &small_elf(), &[Source::Bytes(b"")]).unwrap(),
        None
    );
}

#[test]
fn it_lies_as_high_as_the_kernel_allows() {
    let initrd = [Source::Bytes(&[7; 8192])];
    let start = |memory: &GuestMemoryMmap, image: &[u8]| {
        load_with(memory, image, &initrd).unwrap().unwrap().start
    };
    let bzimage = bzimage_file(&gzip(&small_elf()));
    // The end of low memory, or what the setup header or, without one, the protocol allows.
    assert_eq!(start(&memory(64), &bzimage), 64 * MIB - 8192);
    assert_eq!(start(&memory(2048 + 64), &bzimage), 2048 * MIB - 8192);
    assert_eq!(start(&memory(1024), &small_elf()), 0x3800_0000 - 8192);
    let mut low = bzimage.clone();
    low[0x22c..0x230].copy_from_slice(&0x00ff_ffff_u32.to_le_bytes());
    assert_eq!(start(&memory(64), &low), 16 * MIB - 8192);
}

#[test]
fn it_does_not_fit_over_the_kernel_or_past_the_end() {
    // The kernel's memory, its bss included, ends 8 KiB before that of the guest.
    let elf = elf_file(MIB, &[segment(MIB, b"x", 3 * MIB - 8192)]);
    let fits = vec![1; 8192];
    let range = load_with(&memory(4), &elf, &[Source::Bytes(&fits)])
        .unwrap()
        .unwrap();
    assert_eq!(range, 4 * MIB - 8192..4 * MIB);
    for len in [8193, 3 << 20, 5 << 20] {
        let result = load_with(&memory(4), &elf, &[Source::Bytes(&vec![1; len])]);
        match result {
            Err(Error::InitrdPlacement { size, low, high }) => {
                assert_eq!(size, len.next_multiple_of(4) as u64);
                assert_eq!((low, high), (4 * MIB - 8192, 4 * MIB));
            }
            other => panic!("{len}: {other:?}"),
        }
    }
}
