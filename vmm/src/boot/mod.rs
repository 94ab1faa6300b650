//! Puts a kernel, its initrd, command line and parameters into guest memory, and says how to
//! enter it.
//!
//! Three kinds of kernel boot: an ELF with a PVH note by PVH, any other ELF by Linux's 64-bit
//! boot protocol, and a bzImage, which is unpacked here rather than by the guest and then entered
//! by the 64-bit protocol where it was linked to run (so it never gets to move itself: no KASLR).
//!
//! Guest memory must be fresh (zero): what a segment does not fill is taken to be zero.

mod bzimage;
mod cmdline;
mod e820;
mod elf;
mod error;
mod initrd;
mod pvh;
mod registers;
mod source;
mod unpack;
mod unpacked;
mod zero_page;

use std::ops::Range;

use vm_memory::GuestMemoryMmap;

pub use error::Error;
pub use source::Source;
pub use unpacked::UnpackedKernels;

use bzimage::BzImage;
use elf::Elf;

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub struct Kernel<'a> {
    /// A bzImage or an ELF executable.
    pub image: Source<'a>,
    /// The initrd, in parts that are laid end to end, each on a multiple of 4 bytes: cpio
    /// archives, packed or not. Empty: no initrd.
    pub initrd: &'a [Source<'a>],
    /// Kernel command line, without a NUL.
    pub cmdline: &'a str,
    /// Guest address of the ACPI RSDP, if there are ACPI tables.
    pub rsdp: Option<u64>,
    /// Where unpacked kernels are kept, if they are.
    pub unpacked: Option<&'a UnpackedKernels>,
}

/// How the boot vCPU enters the kernel, and where things lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The state that the kernel expects to be entered in.
    pub protocol: Protocol,
    /// Guest physical address of the first instruction.
    pub rip: u64,
    /// Guest physical range of the kernel's segments, what lies between them included.
    pub kernel: Range<u64>,
    /// Guest physical range of the initrd, without padding to a page.
    pub initrd: Option<Range<u64>>,
}

/// The state that a kernel expects to be entered in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// 32-bit protected mode, paging off, `ebx` names a `hvm_start_info`.
    Pvh,
    /// Long mode on an identity map, `rsi` names a zero page (`Documentation/arch/x86/boot.rst`,
    /// "64-bit boot protocol").
    Linux64,
}

/// Loads a kernel and all it needs to start.
///
/// # Errors
/// The kernel is of no known kind, contradicts itself or does not fit; the initrd or the command
/// line does not fit; a file cannot be read.
pub fn load(memory: &GuestMemoryMmap, kernel: &Kernel) -> Result<Entry, Error> {
    let map = e820::map(memory)?;
    let unpacked;
    let (image, header) = if elf::is_elf(&kernel.image)? {
        (kernel.image, None)
    } else {
        let bzimage = BzImage::parse(&kernel.image)?;
        unpacked = bzimage.unpacked(&kernel.image, e820::ram(&map), kernel.unpacked)?;
        (unpacked.source(), Some(bzimage.header))
    };

    let elf = Elf::parse(&image, memory)?;
    let (protocol, rip) = match (elf.pvh_entry, &header) {
        (Some(entry), None) => (Protocol::Pvh, entry),
        _ => (Protocol::Linux64, elf.entry),
    };
    elf.check_entry(rip)?;
    cmdline::write(memory, kernel.cmdline, header.as_ref())?;
    elf.load(memory, &image)?;
    let initrd = initrd::load(memory, &map, kernel.initrd, elf.memory.end, header.as_ref())?;

    let parameters = Parameters {
        map: &map,
        initrd: initrd.as_ref(),
        rsdp: kernel.rsdp,
    };
    match protocol {
        Protocol::Pvh => pvh::write(memory, &parameters)?,
        Protocol::Linux64 => zero_page::write(memory, &parameters, header)?,
    }
    registers::write_tables(memory, protocol)?;
    Ok(Entry {
        protocol,
        rip,
        kernel: elf.memory,
        initrd,
    })
}

/// What both protocols tell the kernel, each in its own structures; the command line is always at
/// `layout::CMDLINE`.
struct Parameters<'a> {
    map: &'a [e820::Region],
    initrd: Option<&'a Range<u64>>,
    rsdp: Option<u64>,
}

#[cfg(test)]
mod tests;
