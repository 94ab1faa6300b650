//! Initramfs archives: the `newc` format of cpio, as in the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`.
//!
//! The kernel unpacks archives that follow each other one after the other, and what a later one
//! has replaces what an earlier one had.

const TRAILER: &str = "TRAILER!!!";

/// An archive in memory.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

impl Archive {
    /// Adds a directory of mode 0755. Its parents must have been added.
    pub fn directory(&mut self, path: &str) {
        self.entry(path, 0o040_755, (0, 0), &[]);
    }

    /// Adds a regular file with these permission bits. Its parents must have been added.
    ///
    /// A file of 4 GiB or more, which the format cannot say, is cut to its first 4 GiB - 1.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.entry(path, 0o100_000 | (permissions & 0o7777), (0, 0), content);
    }

    /// Adds a character device of mode 0600.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, 0o020_600, (major, minor), &[]);
    }

    /// The archive's bytes, padded to a multiple of four so that another may follow.
    pub fn finish(mut self) -> Vec<u8> {
        self.inodes = 0;
        self.entry(TRAILER, 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let content = content.get(..size as usize).unwrap_or_default();
        let name_size = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        let inode = self.inodes;
        self.inodes = self.inodes.wrapping_add(1);
        let (links, owner, time, check) = (1, 0, 0, 0);
        self.bytes.extend_from_slice(b"070701");
        for field in [
            inode, mode, owner, owner, links, time, size, 0, 0, device.0, device.1, name_size,
            check,
        ] {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The archive that makes `init` PID 1, alone or appended to another that has the kernel's
/// modules: `/init`, `/dev/console` and the mount points it uses.
pub fn initramfs(init: &[u8]) -> Vec<u8> {
    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", "run", "tmp", "root"] {
        archive.directory(directory);
    }
    archive.character_device("dev/console", 5, 1);
    archive.file("init", 0o755, init);
    archive.finish()
}
