//! Where guest bytes are: every one of an uncompressed cluster passes here.

use crate::error::Result;
use crate::host::Host;

/// The file that has the guest's bytes, and how it has them.
pub(crate) struct Data {
    /// The image itself.
    pub(crate) host: Host,
}

impl Data {
    /// Reads what the disk has at `_guest` and the file at `host`.
    pub(crate) fn read(&self, _guest: u64, host: u64, buf: &mut [u8]) -> Result<()> {
        self.host.read(host, buf)
    }

    /// Writes what the disk is to have at `_guest` and the file at `host`.
    pub(crate) fn write(&self, _guest: u64, host: u64, buf: &[u8]) -> Result<()> {
        self.host.write(host, buf)
    }

    /// Makes what the disk has at `_guest` and the file at `host` read as zeros.
    pub(crate) fn zero(&self, _guest: u64, host: u64, len: u64) -> Result<()> {
        self.host.zero(host, len)
    }

    /// Whether a caller may move bytes between the file and its own memory.
    pub(crate) fn is_direct(&self) -> bool {
        self.host.storage.file().is_some()
    }
}
