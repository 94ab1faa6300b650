//! `PATH[,key=value...]`: a disk on the command line.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use super::value::{self, ValueError, split_doubled};
use crate::config::{Disk, Format, Overlay, SecretSource};

/// The keys, as errors and `--help` list them.
pub(super) const KEYS: &str = "format=qcow2|raw, readonly, serial=TEXT, size=SIZE, overlay=PATH|none, \
                        backing-format=qcow2|raw, allow-outside, secret-file=PATH, secret-fd=N, \
                        snapshot=NAME";

/// Why a disk is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum DiskError {
    #[error("the path is missing: write PATH[,key=value...]")]
    NoPath,
    #[error("'{0}' is not one of the disk keys: {KEYS} (a comma within a path is written ',,')")]
    UnknownKey(String),
    #[error("'{0}' is given twice")]
    Twice(&'static str),
    #[error("'{0}' needs a value")]
    NoValue(&'static str),
    #[error("'{0}' takes no value")]
    Value(&'static str),
    #[error("{key}={value} is not known: cowshed reads qcow2 and raw")]
    Format { key: &'static str, value: String },
    #[error("a serial number is at most 20 printable ASCII characters")]
    Serial,
    #[error("size={value}: {why}")]
    Size { value: String, why: ValueError },
    #[error("a disk's size is a multiple of 512 bytes, and not 0")]
    SizeUnaligned,
    #[error("secret-fd={0} is not the number of a file descriptor")]
    Descriptor(String),
    #[error("{0} and {1} exclude each other{2}")]
    Conflict(&'static str, &'static str, &'static str),
    #[error("backing-format= is for a qcow2 image: a raw one has no backing file")]
    RawBacking,
}

/// Parses a disk.
pub(super) fn parse(text: OsString) -> Result<Disk, DiskError> {
    let mut parts = split_doubled(&text, b',').into_iter();
    let path = parts
        .next()
        .filter(|p| !p.is_empty())
        .ok_or(DiskError::NoPath)?;
    let mut given = Given::default();
    for part in parts {
        given.take(&part)?;
    }
    given.check(path.into())
}

/// The value of `--overlay` and `overlay=`.
pub(super) fn overlay(value: OsString) -> Overlay {
    if value == "none" {
        Overlay::Direct
    } else {
        Overlay::At(value.into())
    }
}

#[derive(Default)]
struct Given {
    format: Option<Format>,
    read_only: Option<()>,
    serial: Option<String>,
    size: Option<u64>,
    overlay: Option<Overlay>,
    backing_format: Option<Format>,
    allow_outside: Option<()>,
    secrets: Vec<SecretSource>,
    snapshot: Option<String>,
}

impl Given {
    fn take(&mut self, part: &OsStr) -> Result<(), DiskError> {
        let mut halves = part.as_encoded_bytes().splitn(2, |&b| b == b'=');
        let key = halves.next().unwrap_or_default();
        // Split after ASCII, so both halves are as valid as the whole.
        let value = halves.next().map(os_string);
        match key {
            b"format" => set(&mut self.format, "format", format("format", value)?),
            b"readonly" => set(&mut self.read_only, "readonly", flag("readonly", value)?),
            b"serial" => set(&mut self.serial, "serial", serial(text("serial", value)?)?),
            b"size" => set(&mut self.size, "size", size(text("size", value)?)?),
            b"overlay" => set(
                &mut self.overlay,
                "overlay",
                overlay(filled("overlay", value)?),
            ),
            b"backing-format" => {
                let named = format("backing-format", value)?;
                set(&mut self.backing_format, "backing-format", named)
            }
            b"allow-outside" => set(
                &mut self.allow_outside,
                "allow-outside",
                flag("allow-outside", value)?,
            ),
            b"secret-file" => {
                let path = filled("secret-file", value)?.into();
                self.secrets.push(SecretSource::File(path));
                Ok(())
            }
            b"secret-fd" => {
                let number = text("secret-fd", value)?;
                let number = number
                    .parse()
                    .map_err(|_| DiskError::Descriptor(number.clone()))?;
                self.secrets.push(SecretSource::Descriptor(number));
                Ok(())
            }
            b"snapshot" => set(&mut self.snapshot, "snapshot", text("snapshot", value)?),
            _ => Err(DiskError::UnknownKey(
                String::from_utf8_lossy(key).into_owned(),
            )),
        }
    }

    fn check(self, path: PathBuf) -> Result<Disk, DiskError> {
        if self.read_only.is_some() && matches!(self.overlay, Some(Overlay::At(_))) {
            return Err(DiskError::Conflict("readonly", "overlay=PATH", ""));
        }
        if self.read_only.is_some() && self.size.is_some() {
            return Err(DiskError::Conflict("readonly", "size=", ""));
        }
        if self.overlay == Some(Overlay::Direct) && self.size.is_some() {
            let why = ": growing the image itself is cowshed img resize's work";
            return Err(DiskError::Conflict("size=", "overlay=none", why));
        }
        if self.snapshot.is_some() {
            let why = ": a snapshot cannot be written, and no file can name one as its base";
            let named = match self.overlay {
                Some(Overlay::Direct) => Some("overlay=none"),
                Some(Overlay::At(_)) => Some("overlay=PATH"),
                _ => None,
            };
            if let Some(named) = named {
                return Err(DiskError::Conflict("snapshot=", named, why));
            }
        }
        if self.format == Some(Format::Raw) && self.backing_format.is_some() {
            return Err(DiskError::RawBacking);
        }
        Ok(Disk {
            path,
            format: self.format,
            read_only: self.read_only.is_some(),
            serial: self.serial,
            size: self.size,
            overlay: self.overlay.unwrap_or(Overlay::Throwaway),
            backing_format: self.backing_format,
            // Who names the format vouches for the image.
            allow_outside: self.allow_outside.is_some() || self.format.is_some(),
            secrets: self.secrets,
            snapshot: self.snapshot,
        })
    }
}

fn set<T>(slot: &mut Option<T>, key: &'static str, value: T) -> Result<(), DiskError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(DiskError::Twice(key)),
    }
}

fn os_string(bytes: &[u8]) -> OsString {
    use std::os::unix::ffi::OsStrExt;
    OsStr::from_bytes(bytes).to_os_string()
}

fn filled(key: &'static str, value: Option<OsString>) -> Result<OsString, DiskError> {
    value
        .filter(|v| !v.is_empty())
        .ok_or(DiskError::NoValue(key))
}

fn text(key: &'static str, value: Option<OsString>) -> Result<String, DiskError> {
    Ok(filled(key, value)?.to_string_lossy().into_owned())
}

fn flag(key: &'static str, value: Option<OsString>) -> Result<(), DiskError> {
    if value.is_some() {
        Err(DiskError::Value(key))
    } else {
        Ok(())
    }
}

fn format(key: &'static str, value: Option<OsString>) -> Result<Format, DiskError> {
    match text(key, value)? {
        value if value == "qcow2" => Ok(Format::Qcow2),
        value if value == "raw" => Ok(Format::Raw),
        value => Err(DiskError::Format { key, value }),
    }
}

fn serial(value: String) -> Result<String, DiskError> {
    let printable = value.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
    if printable && value.len() <= 20 {
        Ok(value)
    } else {
        Err(DiskError::Serial)
    }
}

fn size(value: String) -> Result<u64, DiskError> {
    match value::size(&value) {
        Ok(bytes) if bytes > 0 && bytes.is_multiple_of(512) => Ok(bytes),
        Ok(_) => Err(DiskError::SizeUnaligned),
        Err(why) => Err(DiskError::Size { value, why }),
    }
}

#[cfg(test)]
#[path = "disk_option_tests.rs"]
mod tests;
