//! What file system a volume has, by its superblock.

use crate::volume::{Names, ReadAt, bytes, label, uuid};

/// A file system that we know.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct FileSystem {
    /// Its name for `mount`.
    pub(crate) kind: &'static str,
    pub(crate) names: Names,
}

/// Where a superblock has what: offsets in the volume.
struct Format {
    kind: &'static str,
    magic: (u64, &'static [u8]),
    uuid: Option<u64>,
    /// And its length.
    label: Option<(u64, usize)>,
}

/// `fs/ext4/ext4.h`, `fs/xfs/libxfs/xfs_format.h`, `include/uapi/linux/btrfs_tree.h`,
/// `fs/erofs/erofs_fs.h`, `fs/squashfs/squashfs_fs.h`.
const FORMATS: &[Format] = &[
    Format {
        kind: "ext4",
        magic: (0x438, &[0x53, 0xef]),
        uuid: Some(0x468),
        label: Some((0x478, 16)),
    },
    Format {
        kind: "xfs",
        magic: (0, b"XFSB"),
        uuid: Some(0x20),
        label: Some((0x6c, 12)),
    },
    Format {
        kind: "btrfs",
        magic: (0x1_0040, b"_BHRfS_M"),
        uuid: Some(0x1_0020),
        label: Some((0x1_012b, 256)),
    },
    Format {
        kind: "erofs",
        magic: (0x400, &[0xe2, 0xe1, 0xf5, 0xe0]),
        uuid: None,
        label: None,
    },
    Format {
        kind: "squashfs",
        magic: (0, b"hsqs"),
        uuid: None,
        label: None,
    },
];

/// The file system that `read` reads, if it is one that we know.
pub(crate) fn identify(read: ReadAt<'_>) -> Option<FileSystem> {
    let format = FORMATS.iter().find(|format| {
        let (offset, magic) = format.magic;
        let mut found = [0; 8];
        let found = found.get_mut(..magic.len()).unwrap_or_default();
        read(offset, found) && found == magic
    })?;
    let text = |(offset, len)| {
        let mut text = [0; 256];
        let text = text.get_mut(..len)?;
        read(offset, text).then(|| label(text)).flatten()
    };
    Some(FileSystem {
        kind: format.kind,
        names: Names {
            uuid: format.uuid.and_then(|offset| bytes(read, offset)).map(uuid),
            label: format.label.and_then(text),
        },
    })
}
