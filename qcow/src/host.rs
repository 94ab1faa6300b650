//! A storage with its name, so that every failed call says where it failed.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use crate::content::{Content, FileRange};
use crate::error::{Error, Result, Violation};
use crate::header::Refusal;
use crate::storage::Storage;

/// A storage with the name that messages give it.
#[derive(Clone)]
pub(crate) struct Host {
    pub(crate) path: PathBuf,
    pub(crate) storage: Arc<dyn Storage>,
}

impl Host {
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.storage
            .read_at(offset, buf)
            .map_err(Error::io(&self.path, || {
                format!("read {} bytes at {offset:#x} of", buf.len())
            }))
    }

    pub(crate) fn write(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.storage
            .write_at(offset, buf)
            .map_err(Error::io(&self.path, || {
                format!("write {} bytes at {offset:#x} of", buf.len())
            }))
    }

    /// Writes bytes, or has the host copy them from a file.
    pub(crate) fn put(&self, offset: u64, content: Content<'_>) -> Result<()> {
        let FileRange { file, from, len } = match content {
            Content::Bytes(buf) => return self.write(offset, buf),
            Content::File(range) => range,
        };
        self.storage
            .copy_from(offset, file, from, len)
            .map_err(Error::io(&self.path, || {
                format!("have {len} bytes copied to {offset:#x} of")
            }))
    }

    pub(crate) fn zero(&self, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        self.storage
            .zero(offset, len)
            .map_err(Error::io(&self.path, || {
                format!("zero {len} bytes at {offset:#x} of")
            }))
    }

    /// Gives a range back, or says that the host cannot.
    pub(crate) fn punch(&self, offset: u64, len: u64) -> Result<bool> {
        if len == 0 {
            return Ok(true);
        }
        match self.storage.punch(offset, len) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(false),
            Err(error) => {
                let action = || format!("punch {len} bytes at {offset:#x} of");
                Err(Error::io(&self.path, action)(error))
            }
        }
    }

    /// Reserves a range's space, or says that the host cannot.
    pub(crate) fn allocate(&self, offset: u64, len: u64) -> Result<bool> {
        if len == 0 {
            return Ok(true);
        }
        match self.storage.allocate(offset, len) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(false),
            Err(error) => {
                let action = || format!("reserve {len} bytes at {offset:#x} of");
                Err(Error::io(&self.path, action)(error))
            }
        }
    }

    pub(crate) fn sync(&self) -> Result<()> {
        self.sync_ended(self.storage.sync())
    }

    /// The same where the caller has synced the file.
    pub(crate) fn synced(&self, result: io::Result<()>) -> Result<()> {
        self.sync_ended(self.storage.synced(result))
    }

    fn sync_ended(&self, result: io::Result<()>) -> Result<()> {
        result.map_err(Error::io(&self.path, || "sync".into()))
    }

    pub(crate) fn len(&self) -> Result<u64> {
        self.storage
            .len()
            .map_err(Error::io(&self.path, || "get the length of".into()))
    }

    pub(crate) fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        self.storage
            .next_data(offset)
            .map_err(Error::io(&self.path, || {
                format!("find data from {offset:#x} on in")
            }))
    }

    pub(crate) fn set_len(&self, len: u64) -> Result<()> {
        self.storage.set_len(len).map_err(Error::io(&self.path, || {
            format!("set the length to {len} of")
        }))
    }

    pub(crate) fn allocated(&self) -> Result<u64> {
        self.storage
            .allocated()
            .map_err(Error::io(&self.path, || "get the blocks of".into()))
    }

    /// The error for a header of this file that is not opened.
    pub(crate) fn refuse(&self, refusal: Refusal) -> Error {
        match refusal {
            Refusal::Invalid(violation) => self.invalid(violation),
            Refusal::Unsupported { feature, advice } => Error::Unsupported {
                file: self.path.clone(),
                feature,
                advice,
            },
        }
    }

    /// The error for something in this file that breaks the format.
    pub(crate) fn invalid(&self, violation: Violation) -> Error {
        Error::Invalid {
            file: self.path.clone(),
            source: violation,
        }
    }
}
