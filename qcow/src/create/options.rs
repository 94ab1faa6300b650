//! Which creation options go together.

use super::{CreateOptions, Preallocation};
use crate::addr::Geometry;
use crate::compress::Compression;

impl CreateOptions {
    /// How the disk falls into clusters, or why it cannot.
    pub(super) fn geometry(&self) -> Result<Geometry, String> {
        let size = self.cluster_size;
        let plain = size
            .is_power_of_two()
            .then(|| Geometry::new(size.trailing_zeros()))
            .flatten()
            .ok_or_else(|| {
                format!("the cluster size is {size}, it can be a power of two from 512 to 2 MiB")
            })?;
        if !self.extended_l2 {
            return Ok(plain);
        }
        plain.extended().ok_or_else(|| {
            format!("extended L2 entries need a cluster size of at least 16384, it is {size}")
        })
    }

    /// Says which options are out of range or contradict each other.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.size > i64::MAX as u64 || !self.size.is_multiple_of(512) {
            return Err(format!("the size {} is no multiple of 512", self.size));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            let bits = self.refcount_bits;
            return Err(format!(
                "refcounts of {bits} bits: it can be 1, 2, 4, 8, 16, 32 or 64"
            ));
        }
        self.check_version()?;
        self.check_files()
    }

    fn check_version(&self) -> Result<(), String> {
        if !(2..=3).contains(&self.version) {
            return Err(format!("the version is {}, it can be 2 or 3", self.version));
        }
        let newer = [
            (self.refcount_bits != 16, "refcounts of other than 16 bits"),
            (
                self.compression != Compression::Zlib,
                "compression other than zlib",
            ),
            (self.lazy_refcounts, "lazy refcounts"),
            (self.extended_l2, "extended L2 entries"),
            (self.data_file.is_some(), "a data file"),
            (
                self.encryption.is_some() && self.preallocation != Preallocation::Off,
                "preallocation and encryption",
            ),
        ];
        let newer = newer.into_iter().find(|(asked, _)| *asked);
        match newer {
            Some((_, what)) if self.version < 3 => Err(format!(
                "version {} cannot have {what}: that takes version 3",
                self.version
            )),
            _ => Ok(()),
        }
    }

    fn check_files(&self) -> Result<(), String> {
        if let Some((name, _)) = &self.backing {
            if name.is_empty() {
                return Err("the backing file has no name".into());
            }
            if self.preallocation != Preallocation::Off && !self.extended_l2 {
                return Err(
                    "preallocation would hide the backing file: it takes extended L2 entries, \
                     whose clusters can have a place and no content"
                        .into(),
                );
            }
        }
        match &self.data_file {
            Some(file) if file.name.is_empty() => Err("the data file has no name".into()),
            Some(file) if file.raw && self.encryption.is_some() => {
                Err("a raw data file has the disk as it is, and not encrypted".into())
            }
            Some(file) if file.raw && self.backing.is_some() => {
                Err("a raw data file has all of the disk, so that there is no backing file".into())
            }
            _ => Ok(()),
        }
    }
}
