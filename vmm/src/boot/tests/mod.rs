mod bzimage;
mod elf;
mod hostile;
mod initrd;
mod parameters;
mod unpacked;

use std::io::{Seek, SeekFrom, Write};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::layout;

const MIB: u64 = 1 << 20;
const CMDLINE: &str = "console=ttyS0 quiet";

/// Guest memory of so many MiB, in one piece.
fn memory(mib: u64) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (mib * MIB) as usize)]).unwrap()
}

fn read(memory: &GuestMemoryMmap, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory
        .read_slice(&mut bytes, GuestAddress(address))
        .unwrap();
    bytes
}

fn read_u32(memory: &GuestMemoryMmap, address: u64) -> u32 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

fn read_u64(memory: &GuestMemoryMmap, address: u64) -> u64 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

fn load_bytes(memory: &GuestMemoryMmap, image: &[u8]) -> Result<Entry, Error> {
    let image = Source::Bytes(image);
    load(
        memory,
        &Kernel {
            image,
            initrd: &[],
            cmdline: CMDLINE,
            rsdp: None,
            unpacked: None,
        },
    )
}

/// A file with these bytes, its offset somewhere.
fn file(bytes: &[u8]) -> std::fs::File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.seek(SeekFrom::Start(3)).unwrap();
    file
}

/// A program header, and the bytes it names.
#[derive(Clone)]
struct Part {
    kind: u32,
    address: u64,
    bytes: Vec<u8>,
    memory_len: u64,
}

fn segment(address: u64, bytes: &[u8], memory_len: u64) -> Part {
    Part {
        kind: 1,
        address,
        bytes: bytes.to_vec(),
        memory_len,
    }
}

/// A note of `name` and `kind`, as in "ELF note section" of the System V ABI.
fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> = [name.len() as u32, desc.len() as u32, kind]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect();
    for field in [name, desc] {
        bytes.extend_from_slice(field);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

fn notes(bytes: Vec<u8>) -> Part {
    Part {
        kind: 4,
        address: 0,
        memory_len: bytes.len() as u64,
        bytes,
    }
}

fn pvh_note(entry: u32) -> Part {
    notes(note(b"Xen\0", 18, &entry.to_le_bytes()))
}

/// An x86_64 ELF executable, written field by field.
fn elf_file(entry: u64, parts: &[Part]) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    for half in [2_u16, 62] {
        bytes.extend_from_slice(&half.to_le_bytes());
    }
    bytes.extend_from_slice(&1_u32.to_le_bytes());
    for word in [entry, 64, 0] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(&0_u32.to_le_bytes());
    for half in [64, 56, parts.len() as u16, 0, 0, 0] {
        bytes.extend_from_slice(&half.to_le_bytes());
    }
    let mut offset = 64 + 56 * parts.len() as u64;
    for part in parts {
        let len = part.bytes.len() as u64;
        bytes.extend_from_slice(&part.kind.to_le_bytes());
        bytes.extend_from_slice(&7_u32.to_le_bytes());
        let virtual_address = part.address.wrapping_add(0xffff_ffff_8000_0000);
        for word in [
            offset,
            virtual_address,
            part.address,
            len,
            part.memory_len,
            4,
        ] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        offset += len;
    }
    for part in parts {
        bytes.extend_from_slice(&part.bytes);
    }
    bytes
}

/// The smallest kernel: one segment at 1 MiB.
fn small_elf() -> Vec<u8> {
    elf_file(MIB, &[segment(MIB, b"code", 0x2000)])
}

/// A bzImage around a packed payload, with a setup header as `boot.rst` lays it out.
fn bzimage_file(payload: &[u8]) -> Vec<u8> {
    const SETUP_SECTS: usize = 3;
    const PAYLOAD_OFFSET: usize = 0x40;
    let mut bytes = vec![0; (SETUP_SECTS + 1) * 512 + PAYLOAD_OFFSET];
    let mut put = |offset: usize, field: &[u8]| {
        bytes[offset..offset + field.len()].copy_from_slice(field);
    };
    put(0x1f1, &[SETUP_SECTS as u8]);
    put(0x1fe, &[0x55, 0xaa]);
    // A jump to 0x26c, where the header ends.
    put(0x200, &[0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x230, &0x20_0000_u32.to_le_bytes());
    put(0x236, &0x3f_u16.to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    put(0x248, &(PAYLOAD_OFFSET as u32).to_le_bytes());
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    put(0x258, &0x100_0000_u64.to_le_bytes());
    put(0x260, &0x40_0000_u32.to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// Packs with flate2, for tests that are not about packing.
fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}
