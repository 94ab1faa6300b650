use std::io;

use vm_memory::GuestMemoryError;

/// Why a kernel cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read, or is shorter than what it says of itself.
    #[error("cannot read the {what}")]
    Read {
        /// What was being read: kernel or initrd.
        what: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
    /// A file could not be read into guest memory.
    #[error("cannot read the {what} into guest memory at {address:#x}")]
    Load {
        /// What was being read: kernel or initrd.
        what: &'static str,
        /// Guest physical address.
        address: u64,
        /// The error of guest memory, or of the file.
        source: GuestMemoryError,
    },
    /// A table for the kernel could not be written.
    #[error("cannot write the {what} to guest memory")]
    Write {
        /// Which table.
        what: &'static str,
        /// The error of guest memory.
        source: GuestMemoryError,
    },
    /// Less memory than a kernel and the tables around it need.
    #[error("{0} bytes of guest memory are too few to boot a kernel: give at least 2 MiB")]
    TooLittleMemory(u64),
    /// Neither an ELF executable nor a bzImage.
    #[error("not a kernel: expected an x86_64 ELF executable or a bzImage{hint}")]
    UnknownKernel {
        /// What it looks like instead, if that is known.
        hint: &'static str,
    },
    /// An ELF that is no x86_64 executable, or that contradicts itself.
    #[error("cannot boot this ELF kernel: {0}")]
    Elf(&'static str),
    /// A segment that lies outside RAM or on the tables that the kernel is given.
    #[error(
        "kernel segment {start:#x}..{end:#x} does not lie in free guest memory: \
         give the guest more memory, or link the kernel elsewhere"
    )]
    SegmentPlacement {
        /// First guest physical address.
        start: u64,
        /// Guest physical address past the end.
        end: u64,
    },
    /// Two segments share memory.
    #[error("kernel segments overlap at {0:#x}")]
    SegmentOverlap(u64),
    /// The entry point is in no segment.
    #[error("kernel entry point {0:#x} is outside its segments")]
    EntryPoint(u64),
    /// A bzImage that contradicts itself or is too old.
    #[error("cannot boot this bzImage: {0}")]
    BzImage(String),
    /// A compression that is not unpacked here.
    #[error(
        "the kernel is packed with {0}, which is not supported: \
         use gzip, xz, lz4 or zstd, or the uncompressed vmlinux"
    )]
    Compression(&'static str),
    /// The packed kernel is damaged.
    #[error("cannot unpack the kernel ({format})")]
    Unpack {
        /// Compression's name.
        format: &'static str,
        /// What the decompressor says.
        source: io::Error,
    },
    /// The packed kernel is larger than what could boot.
    #[error("the kernel unpacks to more than {limit} bytes: give the guest more memory")]
    UnpackedSize {
        /// Most bytes allowed.
        limit: u64,
    },
    /// The initrd does not fit.
    #[error(
        "no room for an initrd of {size} bytes between {low:#x} and {high:#x}: \
         give the guest more memory, or make the initrd smaller"
    )]
    InitrdPlacement {
        /// Size, padding between its parts included.
        size: u64,
        /// End of the kernel.
        low: u64,
        /// End of the memory that the kernel allows an initrd in.
        high: u64,
    },
    /// The command line is too long.
    #[error("the kernel command line has {len} bytes, the kernel takes at most {max}")]
    CmdlineLength {
        /// Its length, without a NUL.
        len: usize,
        /// Most bytes that this kernel takes.
        max: usize,
    },
    /// The command line has a byte that would end it.
    #[error("the kernel command line contains {0:?}: remove it")]
    CmdlineCharacter(char),
}
