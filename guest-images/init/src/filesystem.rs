//! What file system a block device has, by its superblock.

use rustix::fd::AsFd;
use rustix::fs::{Mode, OFlags};

/// Name, offset of the magic number, magic number.
const MAGIC: &[(&str, u64, &[u8])] = &[
    ("ext4", 0x438, &[0x53, 0xef]),
    ("xfs", 0, b"XFSB"),
    ("btrfs", 0x1_0040, b"_BHRfS_M"),
    ("erofs", 0x400, &[0xe2, 0xe1, 0xf5, 0xe0]),
    ("squashfs", 0, b"hsqs"),
];

/// The file system's name for `mount`, if it is one that we know.
pub(crate) fn kind(device: &str) -> Option<&'static str> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open(device, flags, Mode::empty()).ok()?;
    let has = |offset, magic: &[u8]| {
        let mut found = [0; 8];
        let found = found.get_mut(..magic.len()).unwrap_or_default();
        rustix::io::pread(file.as_fd(), &mut *found, offset) == Ok(magic.len()) && found == magic
    };
    MAGIC
        .iter()
        .find(|(_, offset, magic)| has(*offset, magic))
        .map(|(name, ..)| *name)
}
