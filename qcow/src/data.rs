//! Where guest bytes are: every one of an uncompressed cluster passes here.

use crate::content::Content;
use crate::crypt::Encrypted;
use crate::crypt::keys::locked;
use crate::error::{Error, Reference, Result};
use crate::host::Host;

/// Bytes of zeros that are encrypted at a time.
const CHUNK: u64 = 1 << 20;

/// The file that has the guest's bytes, and how it has them.
pub(crate) struct Data {
    /// The image itself, or its data file.
    pub(crate) host: Host,
    pub(crate) home: Home,
    pub(crate) form: Form,
}

/// Which file has the guest's bytes.
pub(crate) enum Home {
    /// The image itself.
    Image,
    /// A data file of this name, which the image was opened without.
    Missing(String),
    /// A data file, where the guest's bytes are at the guest's offsets.
    File {
        /// It is to be a valid raw image at all times.
        raw: bool,
    },
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
    /// The name of a data file that is not there.
    pub(crate) fn missing(&self) -> Option<&str> {
        match &self.home {
            Home::Missing(name) => Some(name),
            Home::Image | Home::File { .. } => None,
        }
    }

    fn file(&self) -> Result<&Host> {
        match &self.home {
            Home::Image | Home::File { .. } => Ok(&self.host),
            Home::Missing(name) => Err(Error::Reference {
                file: self.host.path.clone(),
                kind: Reference::DataFile,
                name: name.clone(),
                reason: "it was opened without".into(),
            }),
        }
    }

    /// Reads what the disk has at `guest` and the file at `host`.
    pub(crate) fn read(&self, guest: u64, host: u64, buf: &mut [u8]) -> Result<()> {
        let file = self.file()?;
        match &self.form {
            Form::Plain => file.read(host, buf),
            Form::Locked => Err(locked(file)),
            Form::Encrypted(encrypted) => encrypted.read(file, guest, host, buf),
        }
    }

    /// Writes what the disk is to have at `guest` and the file at `host`.
    pub(crate) fn write(&self, guest: u64, host: u64, buf: &[u8]) -> Result<()> {
        let file = self.file()?;
        match &self.form {
            Form::Plain => file.write(host, buf),
            Form::Locked => Err(locked(file)),
            Form::Encrypted(encrypted) => encrypted.write(file, guest, host, buf),
        }
    }

    /// The same, of whatever kind the content is.
    pub(crate) fn put(&self, guest: u64, host: u64, content: Content<'_>) -> Result<()> {
        match content {
            Content::Bytes(buf) => self.write(guest, host, buf),
            Content::File(_) => self.file()?.put(host, content),
        }
    }

    /// Makes what the disk has at `guest` and the file at `host` read as zeros.
    pub(crate) fn zero(&self, guest: u64, host: u64, len: u64) -> Result<()> {
        if self.is_plain() {
            return self.file()?.zero(host, len);
        }
        let zeros = vec![0; len.min(CHUNK) as usize];
        for at in (0..len).step_by(CHUNK as usize) {
            let part = (len - at).min(CHUNK) as usize;
            self.write(guest + at, host + at, zeros.get(..part).unwrap_or_default())?;
        }
        Ok(())
    }

    /// Gives a range of a data file back, so that it reads as zeros, or says that this cannot be.
    pub(crate) fn punch(&self, offset: u64, len: u64) -> Result<bool> {
        Ok(self.is_plain() && self.file()?.punch(offset, len)?)
    }

    /// Makes durable what a data file has.
    pub(crate) fn sync(&self) -> Result<()> {
        match self.home {
            Home::File { .. } => self.host.sync(),
            Home::Image | Home::Missing(_) => Ok(()),
        }
    }

    /// Makes a data file as long as the disk, with zeros where that is new.
    pub(crate) fn resize(&self, old: u64, size: u64) -> Result<()> {
        if !self.is_external() {
            return Ok(());
        }
        let (file, len) = (self.file()?, self.host.len()?);
        // Whatever lies past the disk's old end is none of it.
        file.zero(old, len.min(size).saturating_sub(old))?;
        if len < size || size < old {
            file.set_len(size)?;
        }
        file.sync()
    }

    /// Whether the file has the bytes as the guest has them: zeros for zeros.
    pub(crate) fn is_plain(&self) -> bool {
        matches!(self.form, Form::Plain)
    }

    /// Whether a caller may move bytes between the file and its own memory.
    pub(crate) fn is_direct(&self) -> bool {
        self.missing().is_none() && self.is_plain() && self.host.storage.file().is_some()
    }

    /// Whether that is another file than the image.
    pub(crate) fn is_external(&self) -> bool {
        !matches!(self.home, Home::Image)
    }

    /// Whether a data file must be a valid raw image at all times.
    pub(crate) fn is_raw(&self) -> bool {
        matches!(self.home, Home::File { raw: true })
    }
}
