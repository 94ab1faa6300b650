//! ELF kernels: `Elf64_Ehdr`, the program headers, and the PVH note.

use std::ops::Range;

use linux_loader::elf::{self as abi, Elf64_Ehdr, Elf64_Phdr};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::{Error, Source, e820};

/// Most program headers; kernels have fewer than ten.
const MAX_HEADERS: u16 = 128;
/// Most bytes of notes.
const MAX_NOTES: u64 = 64 << 10;
const MAGIC: [u8; 4] = *b"\x7fELF";
const EM_X86_64: u16 = 62;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;

/// A validated ELF kernel: all that is left to do is to copy.
#[derive(Debug)]
pub(super) struct Elf {
    /// `e_entry`: physical, in kernels.
    pub(super) entry: u64,
    /// Physical entry point of the PVH note.
    pub(super) pvh_entry: Option<u64>,
    /// From the first segment's first byte to the last one's end.
    pub(super) memory: Range<u64>,
    /// Sorted by address, disjoint, each in free RAM.
    segments: Vec<Segment>,
}

#[derive(Debug)]
struct Segment {
    offset: u64,
    file_len: usize,
    start: u64,
    end: u64,
}

/// Whether the file begins like an ELF.
pub(super) fn is_elf(image: &Source) -> Result<bool, Error> {
    let mut magic = [0; MAGIC.len()];
    if image.len().map_err(read)? < magic.len() as u64 {
        return Ok(false);
    }
    image.read_exact_at(&mut magic, 0).map_err(read)?;
    Ok(magic == MAGIC)
}

impl Elf {
    /// Reads and checks all headers; segments must fit in `memory`.
    pub(super) fn parse(image: &Source, memory: &GuestMemoryMmap) -> Result<Self, Error> {
        let len = image.len().map_err(read)?;
        let header: Elf64_Ehdr = read_struct(image, 0)?;
        check_header(&header)?;

        let mut segments = Vec::new();
        let mut pvh_entry = None;
        for index in 0..u64::from(header.e_phnum) {
            let offset = (index * size_of::<Elf64_Phdr>() as u64)
                .checked_add(header.e_phoff)
                .ok_or_else(|| refuse("program headers beyond the end of the file"))?;
            let program: Elf64_Phdr = read_struct(image, offset)?;
            match program.p_type {
                abi::PT_LOAD if program.p_memsz != 0 => {
                    segments.push(Segment::new(&program, len, memory)?);
                }
                abi::PT_NOTE if pvh_entry.is_none() => pvh_entry = find_pvh(image, &program, len)?,
                _ => {}
            }
        }

        segments.sort_by_key(|segment| segment.start);
        for pair in segments.windows(2) {
            if let [low, high] = pair
                && low.end > high.start
            {
                return Err(Error::SegmentOverlap(high.start));
            }
        }
        let range = match (segments.first(), segments.last()) {
            (Some(first), Some(last)) => first.start..last.end,
            _ => return Err(refuse("it has no segments to load")),
        };
        Ok(Self {
            entry: header.e_entry,
            pvh_entry,
            memory: range,
            segments,
        })
    }

    /// Refuses an entry point outside the segments.
    pub(super) fn check_entry(&self, entry: u64) -> Result<(), Error> {
        let inside = |segment: &Segment| (segment.start..segment.end).contains(&entry);
        if self.segments.iter().any(inside) {
            Ok(())
        } else {
            Err(Error::EntryPoint(entry))
        }
    }

    /// Copies the segments to guest memory.
    pub(super) fn load(&self, memory: &GuestMemoryMmap, image: &Source) -> Result<(), Error> {
        for segment in &self.segments {
            image
                .copy_to(segment.offset, segment.file_len, memory, segment.start)
                .map_err(|source| Error::Load {
                    what: "kernel",
                    address: segment.start,
                    source,
                })?;
        }
        Ok(())
    }
}

impl Segment {
    fn new(program: &Elf64_Phdr, len: u64, memory: &GuestMemoryMmap) -> Result<Self, Error> {
        let file_end = program.p_offset.checked_add(program.p_filesz);
        if file_end.is_none_or(|end| end > len) {
            return Err(refuse("a segment lies beyond the end of the file"));
        }
        if program.p_filesz > program.p_memsz {
            return Err(refuse("a segment is larger in the file than in memory"));
        }
        let start = program.p_paddr;
        let end = start.saturating_add(program.p_memsz);
        if end == u64::MAX || !e820::is_free(memory, start, end) {
            return Err(Error::SegmentPlacement { start, end });
        }
        let file_len = usize::try_from(program.p_filesz)
            .map_err(|_| refuse("a segment lies beyond the end of the file"))?;
        Ok(Self {
            offset: program.p_offset,
            file_len,
            start,
            end,
        })
    }
}

fn check_header(header: &Elf64_Ehdr) -> Result<(), Error> {
    if !header.e_ident.starts_with(&MAGIC) {
        return Err(refuse("it does not begin with ELF's magic number"));
    }
    let class = header.e_ident[abi::EI_CLASS];
    let data = header.e_ident[abi::EI_DATA];
    if class != abi::ELFCLASS64 || data != abi::ELFDATA2LSB || header.e_machine != EM_X86_64 {
        return Err(refuse("it is not for x86_64"));
    }
    if header.e_type != ET_EXEC && header.e_type != ET_DYN {
        return Err(refuse("it is not an executable"));
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        return Err(refuse("its program headers have an unknown size"));
    }
    if header.e_phnum > MAX_HEADERS {
        return Err(refuse("it has too many program headers"));
    }
    Ok(())
}

/// The entry point in a `XEN_ELFNOTE_PHYS32_ENTRY` note, if there is one
/// (`xen/include/public/elfnote.h`).
fn find_pvh(image: &Source, program: &Elf64_Phdr, len: u64) -> Result<Option<u64>, Error> {
    const PHYS32_ENTRY: u32 = 18;

    let end = program.p_offset.checked_add(program.p_filesz);
    if end.is_none_or(|end| end > len) || program.p_filesz > MAX_NOTES {
        return Err(refuse("its notes are too large"));
    }
    let mut notes = vec![0; program.p_filesz as usize];
    image
        .read_exact_at(&mut notes, program.p_offset)
        .map_err(read)?;

    let align = if program.p_align == 8 { 8 } else { 4 };
    let mut rest = notes.as_slice();
    while let Some((header, tail)) = rest.split_first_chunk::<12>() {
        let [name_len, desc_len, kind] = words(header);
        let name_end = name_len as usize;
        let desc = (12 + name_end).next_multiple_of(align) - 12;
        let next = (12 + desc + desc_len as usize).next_multiple_of(align) - 12;
        if kind == PHYS32_ENTRY && tail.get(..name_end) == Some(b"Xen\0") {
            let entry = tail.get(desc..desc + desc_len as usize);
            return match entry.and_then(|bytes| bytes.first_chunk::<4>()) {
                Some(low) => Ok(Some(u32::from_le_bytes(*low).into())),
                None => Err(refuse("its PVH note is cut short")),
            };
        }
        rest = tail.get(next..).unwrap_or_default();
    }
    Ok(None)
}

fn words(bytes: &[u8; 12]) -> [u32; 3] {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = *bytes;
    [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_le_bytes)
}

fn read_struct<T: ByteValued + Default>(image: &Source, offset: u64) -> Result<T, Error> {
    let mut value = T::default();
    image
        .read_exact_at(value.as_mut_slice(), offset)
        .map_err(read)?;
    Ok(value)
}

fn read(source: std::io::Error) -> Error {
    Error::Read {
        what: "kernel",
        source,
    }
}

fn refuse(why: &'static str) -> Error {
    Error::Elf(why)
}
