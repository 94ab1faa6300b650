//! Linux's bzImage: the setup header, and the packed ELF inside
//! (`Documentation/arch/x86/boot.rst`).

use std::fs::File;

use linux_loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::{Error, Source, UnpackedKernels, unpack};

const HEADER_OFFSET: u64 = 0x1f1;
const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = 0x5372_6448;
/// First version with `xloadflags` (Linux 3.8), and the flag of a 64-bit kernel in it.
const LEAST_VERSION: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
const SECTOR: u64 = 512;

/// A bzImage whose payload lies in its file.
pub(super) struct BzImage {
    /// The setup header, to be passed on in the zero page.
    pub(super) header: setup_header,
    payload_offset: u64,
    payload_len: usize,
}

/// An unpacked payload.
pub(super) enum Unpacked {
    Kept(File),
    Here(Vec<u8>),
}

impl Unpacked {
    pub(super) fn source(&self) -> Source<'_> {
        match self {
            Self::Kept(file) => Source::File(file),
            Self::Here(bytes) => Source::Bytes(bytes),
        }
    }
}

impl BzImage {
    pub(super) fn parse(image: &Source) -> Result<Self, Error> {
        let read = |source| Error::Read {
            what: "kernel",
            source,
        };
        let len = image.len().map_err(read)?;
        let mut header = setup_header::default();
        if len < HEADER_OFFSET + size_of::<setup_header>() as u64 {
            return Err(Error::UnknownKernel { hint: hint(image) });
        }
        image
            .read_exact_at(header.as_mut_slice(), HEADER_OFFSET)
            .map_err(read)?;
        if header.boot_flag != BOOT_FLAG || header.header != MAGIC {
            return Err(Error::UnknownKernel { hint: hint(image) });
        }
        let version = header.version;
        if version < LEAST_VERSION {
            let (major, minor) = (version >> 8, version & 0xff);
            return Err(Error::BzImage(format!(
                "its boot protocol {major}.{minor:02} is older than 2.12"
            )));
        }
        if header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(Error::BzImage("it has no 64-bit entry point".to_owned()));
        }

        // The jump at 0x200 ends where the header does; what follows is not for us.
        let [_, header_len] = header.jump.to_le_bytes();
        let known = usize::from(header_len) + (0x202 - HEADER_OFFSET as usize);
        if let Some(beyond) = header.as_mut_slice().get_mut(known..) {
            beyond.fill(0);
        }

        let setup_sectors = if header.setup_sects == 0 {
            4
        } else {
            u64::from(header.setup_sects)
        };
        let payload_offset = (setup_sectors + 1) * SECTOR + u64::from(header.payload_offset);
        if header.payload_length == 0 || payload_offset + u64::from(header.payload_length) > len {
            return Err(Error::BzImage(
                "its payload lies beyond the end of the file".to_owned(),
            ));
        }
        let payload_len = header.payload_length as usize;
        Ok(Self {
            header,
            payload_offset,
            payload_len,
        })
    }

    /// The payload, unpacked: an ELF, unless the file is damaged. No longer than `ram`. A file's is
    /// taken from `kept` or put there.
    pub(super) fn unpacked(
        &self,
        image: &Source,
        ram: u64,
        kept: Option<&UnpackedKernels>,
    ) -> Result<Unpacked, Error> {
        let read = |source| Error::Read {
            what: "kernel",
            source,
        };
        let cache = match image {
            Source::File(file) => kept.map(|kept| (kept, *file)),
            Source::Bytes(_) => None,
        };
        if let Some((kept, file)) = cache {
            let mut size = [0; 4];
            let at = self.payload_offset + (self.payload_len as u64).saturating_sub(4);
            image.read_exact_at(&mut size, at).map_err(read)?;
            let size = u64::from(u32::from_le_bytes(size));
            if size <= ram
                && let Some(elf) = kept.get(file, size)
            {
                return Ok(Unpacked::Kept(elf));
            }
        }
        let mut payload = vec![0; self.payload_len];
        image
            .read_exact_at(&mut payload, self.payload_offset)
            .map_err(read)?;
        let elf = unpack::unpack(&payload, ram)?;
        if let Some((kept, file)) = cache
            && let Err(error) = kept.put(file, &elf)
        {
            tracing::info!(%error, "the unpacked kernel is not kept");
        }
        Ok(Unpacked::Here(elf))
    }
}

/// What a file that is no kernel looks like.
fn hint(image: &Source) -> &'static str {
    let mut magic = [0; 6];
    if image.read_exact_at(&mut magic, 0).is_err() {
        return "";
    }
    match magic {
        [0x1f, 0x8b, ..] => "; this is gzip: unpack it first",
        [0xfd, b'7', b'z', b'X', b'Z', 0] => "; this is xz: unpack it first",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "; this is zstd: unpack it first",
        [b'M', b'Z', ..] => "; this is an EFI program of another kind",
        _ => "",
    }
}
