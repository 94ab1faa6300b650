use proptest::prelude::*;

use super::*;

/// Images whose every header matters.
fn images() -> [(Vec<u8>, Range<usize>); 2] {
    let elf = elf_file(
        MIB,
        &[
            segment(MIB, &[0x90; 300], 0x2000),
            notes(
                [
                    note(b"GNU\0", 1, b"1234567"),
                    note(b"Xen\0", 18, &[0, 0, 16, 0]),
                ]
                .concat(),
            ),
            segment(2 * MIB, b"data", 0x1000),
        ],
    );
    let headers = 0..elf.len();
    let bzimage = bzimage_file(&gzip(&elf));
    [(elf, headers), (bzimage, 0x1f1..0x270)]
}

/// Bytes that break arithmetic sooner than random ones.
fn byte() -> impl Strategy<Value = u8> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(0x7f),
        Just(0x80),
        Just(0xff),
        any::<u8>()
    ]
}

proptest! {
    #[test]
    fn changed_headers_load_or_fail_but_never_panic(
        bzimage in any::<bool>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), byte(), 1..9_usize), 1..6),
    ) {
        let [elf, packed] = images();
        let (mut image, headers) = if bzimage { packed } else { elf };
        for (at, value, len) in changes {
            let header = &mut image[headers.clone()];
            let start = at.index(header.len());
            let end = (start + len).min(header.len());
            header[start..end].fill(value);
        }
        let initrd = [Source::Bytes(b"initrd")];
        let image = Source::Bytes(&image);
        let _ = load(&memory(4), &Kernel { image, initrd: &initrd, cmdline: "", rsdp: None, unpacked: None });
    }

    #[test]
    fn files_cut_short_fail_but_never_panic(
        bzimage in any::<bool>(),
        at in any::<prop::sample::Index>(),
    ) {
        let [elf, packed] = images();
        let (image, _) = if bzimage { packed } else { elf };
        let len = at.index(image.len());
        prop_assert!(load_bytes(&memory(4), &image[..len]).is_err());
    }

    #[test]
    fn changed_payloads_unpack_or_fail_but_never_panic(
        format in 0..4_usize,
        body in prop::collection::vec(byte(), 0..200),
    ) {
        let magics: [&[u8]; 4] =
            [b"\x1f\x8b\x08\0", b"\xfd7zXZ\0", b"\x02\x21\x4c\x18", b"\x28\xb5\x2f\xfd"];
        let payload = [magics[format], &body].concat();
        let _ = unpack::unpack(&payload, 1 << 20);
    }
}
