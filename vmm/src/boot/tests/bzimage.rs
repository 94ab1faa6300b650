use std::process::{Command, Stdio};

use super::*;

/// Packs with the tool that Linux's build uses, which reads stdin so that it knows no size;
/// none if it is not installed.
fn pack(command: &[&str], bytes: &[u8]) -> Option<Vec<u8>> {
    let (program, args) = command.split_first().unwrap();
    let child = Command::new(program)
        .args(args)
        .stdin(file_at_start(bytes))
        .stdout(Stdio::piped())
        .output();
    match child {
        Ok(output) => {
            assert!(output.status.success(), "{command:?}");
            Some(output.stdout)
        }
        Err(_) => {
            eprintln!("skipped: {program} is not installed (apt-get install xz-utils lz4 zstd)");
            None
        }
    }
}

fn file_at_start(bytes: &[u8]) -> std::fs::File {
    let mut file = file(bytes);
    file.rewind().unwrap();
    file
}

/// An ELF of more than one lz4 block, half of it hard to pack.
fn large_elf() -> Vec<u8> {
    let mut state = 1_u32;
    let text: Vec<u8> = (0..9 * MIB as usize)
        .map(|i| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if i % 4096 < 256 {
                (state >> 24) as u8
            } else {
                (i >> 8) as u8
            }
        })
        .collect();
    elf_file(
        16 * MIB,
        &[segment(16 * MIB, &text, 10 * MIB), pvh_note(16 << 20)],
    )
}

fn with_size(packed: &[u8], size: usize) -> Vec<u8> {
    [packed, &(size as u32).to_le_bytes()].concat()
}

#[test]
fn payloads_of_every_compression_are_unpacked() {
    let elf = large_elf();
    for command in [
        ["gzip", "-n", "-f", "-6", "-c"].as_slice(),
        &[
            "xz",
            "--check=crc32",
            "--x86",
            "--lzma2=preset=0,dict=32MiB",
            "-c",
        ],
        &["xz", "--check=none", "--lzma2=preset=0,dict=128MiB", "-c"],
        &["lz4", "-l", "-1", "-", "-"],
        &["zstd", "--ultra", "--long=27", "-1", "-c"],
        &["zstd", "-19", "--no-check", "-c"],
    ] {
        let Some(packed) = pack(command, &elf) else {
            continue;
        };
        let payload = if command[0] == "gzip" {
            packed
        } else {
            with_size(&packed, elf.len())
        };
        let image = file(&bzimage_file(&payload));
        let memory = memory(64);
        let image = Source::File(&image);
        let kernel = Kernel {
            image,
            initrd: &[],
            cmdline: CMDLINE,
            rsdp: None,
            unpacked: None,
        };
        let entry = load(&memory, &kernel).unwrap_or_else(|error| panic!("{command:?}: {error}"));
        // By the 64-bit entry point, even where there is a PVH note: the setup header counts.
        assert_eq!((entry.protocol, entry.rip), (Protocol::Linux64, 16 * MIB));
        let text = &elf[64 + 2 * 56..][..9 * MIB as usize];
        assert!(read(&memory, 16 * MIB, text.len()) == text, "{command:?}");
    }
}

#[test]
fn a_zstd_window_that_no_kernel_has_is_refused() {
    let elf = small_elf();
    let Some(packed) = pack(&["zstd", "--ultra", "--long=28", "-1", "-c"], &elf) else {
        return;
    };
    let result = load_bytes(&memory(4), &bzimage_file(&with_size(&packed, elf.len())));
    assert!(
        matches!(result, Err(Error::Unpack { format: "zstd", .. })),
        "{result:?}"
    );
}

#[test]
fn damaged_payloads_are_refused() {
    let elf = large_elf();
    for command in [
        ["gzip", "-n", "-1", "-c"].as_slice(),
        &["xz", "--check=crc32", "--x86", "--lzma2=preset=0", "-c"],
        &["lz4", "-l", "-1", "-", "-"],
        &["zstd", "-1", "-c"],
    ] {
        let Some(packed) = pack(command, &elf) else {
            continue;
        };
        let unpack = |packed: &[u8], size: usize| {
            unpack::unpack(&with_size(packed, size), 1 << 30).map(|unpacked| unpacked.len())
        };
        // gzip's own trailer is its size: what `with_size` adds is only more of the file.
        assert_eq!(unpack(&packed, elf.len()).unwrap(), elf.len());
        for size in [0, elf.len() - 1, elf.len() + 1] {
            let result = unpack(&packed, size);
            assert!(
                matches!(result, Err(Error::Unpack { .. })),
                "{command:?} {size}: {result:?}"
            );
        }
        for len in [packed.len() / 2, 100, 8] {
            let result = unpack(&packed[..len], elf.len());
            assert!(
                matches!(result, Err(Error::Unpack { .. })),
                "{command:?} {len}: {result:?}"
            );
        }
        assert!(matches!(
            unpack(&packed, 1 << 31),
            Err(Error::UnpackedSize { limit: 0x4000_0000 })
        ));
        let small = unpack::unpack(&with_size(&packed, elf.len()), 8 * MIB);
        assert!(matches!(
            small,
            Err(Error::UnpackedSize { limit: 0x80_0000 })
        ));
    }
}

#[test]
fn other_compressions_are_refused_by_name() {
    for (magic, name) in [
        (b"BZh91AY&SY".as_slice(), "bzip2"),
        (b"\x5d\0\0\0\x04\xff\xff\xff\xff\xff", "lzma"),
        (b"\x89LZO\0\r\n\x1a\n", "lzo"),
        (b"something else", "an unknown format"),
    ] {
        match load_bytes(&memory(4), &bzimage_file(magic)) {
            Err(Error::Compression(said)) => assert_eq!(said, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn setup_headers_that_cannot_be_are_refused() {
    let good = bzimage_file(&gzip(&small_elf()));
    load_bytes(&memory(4), &good).unwrap();
    for (offset, bytes, why) in [
        (0x206, [0x07, 0x02], "2.07 is older"),
        (0x206, [0x0b, 0x02], "2.11 is older"),
        (0x236, [0x00, 0x00], "no 64-bit entry point"),
        (0x1f1, [0xff, 0x00], "beyond the end"),
        (0x24a, [0xff, 0xff], "beyond the end"),
        (0x24e, [0xff, 0xff], "beyond the end"),
    ] {
        let mut bad = good.clone();
        bad[offset..offset + 2].copy_from_slice(&bytes);
        match load_bytes(&memory(4), &bad) {
            Err(Error::BzImage(said)) => assert!(said.contains(why), "{said}"),
            other => panic!("{offset:#x}: {other:?}"),
        }
    }
    // Neither of the two magic numbers alone makes a bzImage, nor does a payload make an ELF.
    for offset in [0x1fe, 0x202] {
        let mut bad = good.clone();
        bad[offset] = 0;
        assert!(matches!(
            load_bytes(&memory(4), &bad),
            Err(Error::UnknownKernel { .. })
        ));
    }
    let text = bzimage_file(&gzip(&[b'x'; 4096]));
    assert!(matches!(load_bytes(&memory(4), &text), Err(Error::Elf(_))));
}
