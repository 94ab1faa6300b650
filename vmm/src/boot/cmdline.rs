use linux_loader::bootparam::setup_header;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Error;
use crate::layout;

/// Writes the command line with its NUL, if the kernel can take it.
pub(super) fn write(
    memory: &GuestMemoryMmap,
    cmdline: &str,
    header: Option<&setup_header>,
) -> Result<(), Error> {
    let room = layout::CMDLINE_MAX - 1;
    let max = header.map_or(room, |header| room.min(header.cmdline_size as usize));
    if cmdline.len() > max {
        return Err(Error::CmdlineLength {
            len: cmdline.len(),
            max,
        });
    }
    if let Some(stray) = cmdline.chars().find(|c| matches!(c, '\0' | '\n' | '\r')) {
        return Err(Error::CmdlineCharacter(stray));
    }
    let bytes = [cmdline.as_bytes(), b"\0"].concat();
    memory
        .write_slice(&bytes, GuestAddress(layout::CMDLINE))
        .map_err(|source| Error::Write {
            what: "command line",
            source,
        })
}
