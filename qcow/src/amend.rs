//! Changing what an image is: its version, how wide its refcounts are, and what its header names.
//!
//! The image is closed by it, because what was open was the other one.

use crate::check;
use crate::error::{Error, Result};
use crate::extension::{BACKING_FORMAT, DATA_FILE_NAME};
use crate::header::{LAZY_REFCOUNTS, RAW_DATA};
use crate::image::{Backing, Image};
use crate::qcow2::Qcow2;

/// Autoclear features that stay true when the header alone changes: bitmaps, and data files that
/// are raw images.
const KNOWN_AUTOCLEAR: u64 = 0b11;

/// What an image is to be; `None` leaves it as it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct AmendOptions {
    /// Version of the format: 2 (which QEMU calls `compat=0.10`) or 3 (`compat=1.1`).
    pub version: Option<u32>,
    /// Width of a refcount: 1, 2, 4, 8, 16, 32 or 64. Version 2 has 16 only.
    pub refcount_bits: Option<u32>,
    /// Writers may let refcounts be wrong while the image is open. Version 3 only.
    pub lazy_refcounts: Option<bool>,
}

impl Image {
    /// Makes the top image what `options` say. A crash leaves an image with the same content that
    /// is as before, or as after some of the steps: a newer version, refcounts, flags, an older
    /// version.
    ///
    /// Version 2 has no zero clusters: in the disk and in its snapshots they become unallocated, or
    /// over a backing file are filled with zeros. Features and header fields of version 3 that are not known are lost with it, if
    /// they are compatible ones.
    ///
    /// # Errors
    /// The format does not allow it; the disk uses what version 2 does not have; a cluster has more
    /// references than the refcounts could say.
    pub fn amend(self, options: &AmendOptions) -> Result<()> {
        let qcow2 = self.amendable()?;
        qcow2.store_marks_at_last()?;
        qcow2.close()?;
        let (old, order) = {
            let header = &qcow2.state().tables.header;
            (header.version, header.refcount_order)
        };
        let version = options.version.unwrap_or(old);
        let bits = options.refcount_bits.unwrap_or(1 << order);
        let refuse = |reason: String| Err(qcow2.cannot_change(reason));
        if !(2..=3).contains(&version) {
            return refuse(format!("the version {version} is neither 2 nor 3"));
        }
        if !bits.is_power_of_two() || bits > 64 {
            return refuse(format!(
                "refcounts of {bits} bits: it can be 1, 2, 4, 8, 16, 32 or 64"
            ));
        }
        if version == 2 && bits != 16 {
            return refuse(format!(
                "version 2 has refcounts of 16 bits, not {bits}: change them too"
            ));
        }
        if version == 2 && options.lazy_refcounts == Some(true) {
            return refuse("version 2 has no lazy refcounts".into());
        }
        if version == 2 && old == 3 {
            self.check_downgrade(qcow2)?;
        }
        if version == 3 && old == 2 {
            qcow2.upgrade()?;
        }
        if bits != 1 << order {
            qcow2.change_refcount_width(bits.trailing_zeros())?;
        }
        if let Some(lazy) = options.lazy_refcounts.filter(|_| version == 3) {
            qcow2.rewrite_header(|header| {
                header.compatible &= !LAZY_REFCOUNTS;
                header.compatible |= if lazy { LAZY_REFCOUNTS } else { 0 };
            })?;
        }
        if version == 2 && old == 3 {
            self.downgrade(qcow2)?;
        }
        Ok(())
    }

    /// Records another backing file, or none. Not a byte of the disk is copied: it reads as what
    /// the new one has where it is not allocated. The name is not looked at.
    pub fn set_backing(self, backing: Option<Backing>) -> Result<()> {
        let qcow2 = self.amendable()?;
        if backing.is_some() && qcow2.state().tables.header.autoclear & RAW_DATA != 0 {
            let reason = "its data file is a raw image at all times, which excludes a backing file";
            return Err(qcow2.cannot_change(reason.into()));
        }
        if backing
            .as_ref()
            .is_some_and(|backing| backing.name.is_empty())
        {
            return Err(qcow2.cannot_change("a backing file must have a name".into()));
        }
        let format = backing.as_ref().and_then(|backing| backing.format);
        let format = format.map(|format| format.name().into());
        qcow2.rewrite_header(|header| {
            header.extensions.set(BACKING_FORMAT, format);
            header.backing = backing;
        })
    }

    /// Records another name for the data file, which is the same file under that name: not a byte of
    /// the disk is copied. The name is not looked at.
    pub fn set_data_file(self, name: &str) -> Result<()> {
        let qcow2 = self.amendable()?;
        if qcow2.state().tables.header.data_file().is_none() {
            let reason = "it has no data file, and gets one by being converted only";
            return Err(qcow2.cannot_change(reason.into()));
        }
        if name.is_empty() {
            return Err(qcow2.cannot_change("a data file must have a name".into()));
        }
        qcow2.rewrite_header(|header| header.extensions.set(DATA_FILE_NAME, Some(name.into())))
    }

    fn amendable(&self) -> Result<&Qcow2> {
        self.writable_top()?.ok_or_else(|| Error::Change {
            file: self.path().to_owned(),
            reason: "a raw file has no header".into(),
        })
    }
}

impl Qcow2 {
    /// Changes what the header says beside the tables.
    pub(crate) fn rewrite_header(
        &self,
        change: impl FnOnce(&mut crate::header::Header),
    ) -> Result<()> {
        let mut state = self.state();
        if let Some(reason) = &state.tables.stopped {
            return Err(self.cannot_change(reason.clone()));
        }
        self.change_header(&mut state.tables, |header| {
            header.autoclear &= KNOWN_AUTOCLEAR;
            change(header);
        })
    }

    fn upgrade(&self) -> Result<()> {
        self.alone()?.record_sizes()?;
        self.rewrite_header(|header| {
            header.version = 3;
            header.tail = vec![0; 8];
        })
    }

    /// Writes new refcount structures beside the old ones, and switches to them.
    fn change_refcount_width(&self, order: u32) -> Result<()> {
        let mut state = self.state();
        let written = check::change_refcount_width(&self.host, &mut state.tables.header, order);
        // Its refcounts are not these.
        state.writing = None;
        state.tables.file_len = self.host.len()?;
        if let Err(error) = &written {
            state.tables.stopped = Some(format!("its refcounts could not be changed: {error}"));
        }
        written
    }
}
