//! Where guest bytes are: every one of an uncompressed cluster passes here.

use crate::crypt::Encrypted;
use crate::crypt::keys::locked;
use crate::error::Result;
use crate::host::Host;

/// Bytes of zeros that are encrypted at a time.
const CHUNK: u64 = 1 << 20;

/// The file that has the guest's bytes, and how it has them.
pub(crate) struct Data {
    /// The image itself.
    pub(crate) host: Host,
    pub(crate) form: Form,
}

/// How a file has the guest's bytes.
pub(crate) enum Form {
    /// As they are.
    Plain,
    /// Encrypted, and there is no key.
    Locked,
    Encrypted(Encrypted),
}

impl Data {
    /// Reads what the disk has at `guest` and the file at `host`.
    pub(crate) fn read(&self, guest: u64, host: u64, buf: &mut [u8]) -> Result<()> {
        match &self.form {
            Form::Plain => self.host.read(host, buf),
            Form::Locked => Err(locked(&self.host)),
            Form::Encrypted(encrypted) => encrypted.read(&self.host, guest, host, buf),
        }
    }

    /// Writes what the disk is to have at `guest` and the file at `host`.
    pub(crate) fn write(&self, guest: u64, host: u64, buf: &[u8]) -> Result<()> {
        match &self.form {
            Form::Plain => self.host.write(host, buf),
            Form::Locked => Err(locked(&self.host)),
            Form::Encrypted(encrypted) => encrypted.write(&self.host, guest, host, buf),
        }
    }

    /// Makes what the disk has at `guest` and the file at `host` read as zeros.
    pub(crate) fn zero(&self, guest: u64, host: u64, len: u64) -> Result<()> {
        if self.is_plain() {
            return self.host.zero(host, len);
        }
        let zeros = vec![0; len.min(CHUNK) as usize];
        for at in (0..len).step_by(CHUNK as usize) {
            let part = (len - at).min(CHUNK) as usize;
            self.write(guest + at, host + at, zeros.get(..part).unwrap_or_default())?;
        }
        Ok(())
    }

    /// Whether the file has the bytes as the guest has them: zeros for zeros.
    pub(crate) fn is_plain(&self) -> bool {
        matches!(self.form, Form::Plain)
    }

    /// Whether a caller may move bytes between the file and its own memory.
    pub(crate) fn is_direct(&self) -> bool {
        self.is_plain() && self.host.storage.file().is_some()
    }
}
