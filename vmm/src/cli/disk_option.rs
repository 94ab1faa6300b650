//! `PATH[,key=value...]`: a disk on the command line.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use cowshed_devices::virtio::block::MAX_QUEUES;

use super::value::{self, ValueError, split_doubled};
use crate::config::{Cache, Disk, Format, Io, Overlay, SecretSource};

/// More requests a second than any disk does.
const MAX_IOPS: u64 = 1 << 30;

/// The keys, as errors and `--help` list them.
pub(super) const KEYS: &str = "format=qcow2|raw, readonly, serial=TEXT, size=SIZE, overlay=PATH|none, \
                        backing-format=qcow2|raw, allow-outside, secret-file=PATH, secret-fd=N, \
                        snapshot=NAME, cache=writeback|none|unsafe, io=io_uring|threads, queues=N, \
                        cache-size=SIZE, bps=SIZE, iops=N";

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
    #[error("{key}={value} is not known: it is one of {known}")]
    Choice {
        key: &'static str,
        value: String,
        known: &'static str,
    },
    #[error("{key}={value}: {why}")]
    Size {
        key: &'static str,
        value: String,
        why: ValueError,
    },
    #[error("{key}={value}: it is a number from 1 to {most}")]
    Number {
        key: &'static str,
        value: String,
        most: u64,
    },
    #[error("a disk's size is a multiple of 512 bytes")]
    SizeUnaligned,
    #[error("{0}= must be more than 0")]
    NoBytes(&'static str),
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
    cache: Option<Cache>,
    io: Option<Io>,
    queues: Option<u64>,
    cache_size: Option<u64>,
    bytes_per_second: Option<u64>,
    requests_per_second: Option<u64>,
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
            b"cache" => set(&mut self.cache, "cache", cache(text("cache", value)?)?),
            b"io" => set(&mut self.io, "io", io(text("io", value)?)?),
            b"queues" => {
                let queues = number("queues", text("queues", value)?, MAX_QUEUES.into())?;
                set(&mut self.queues, "queues", queues)
            }
            b"cache-size" => {
                let bytes = bytes("cache-size", text("cache-size", value)?)?;
                set(&mut self.cache_size, "cache-size", bytes)
            }
            b"bps" => {
                let bytes = bytes("bps", text("bps", value)?)?;
                set(&mut self.bytes_per_second, "bps", bytes)
            }
            b"iops" => {
                let requests = number("iops", text("iops", value)?, MAX_IOPS)?;
                set(&mut self.requests_per_second, "iops", requests)
            }
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
            cache: self.cache.unwrap_or_default(),
            io: self.io.unwrap_or_default(),
            // In range: it was checked.
            queues: self.queues.map(|queues| queues as u16),
            cache_size: self.cache_size.map(|bytes| bytes as usize),
            bytes_per_second: self.bytes_per_second,
            requests_per_second: self.requests_per_second,
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
    match bytes("size", value)? {
        bytes if bytes.is_multiple_of(512) => Ok(bytes),
        _ => Err(DiskError::SizeUnaligned),
    }
}

/// Some bytes, not none.
fn bytes(key: &'static str, value: String) -> Result<u64, DiskError> {
    match value::size(&value) {
        Ok(0) => Err(DiskError::NoBytes(key)),
        Ok(bytes) => Ok(bytes),
        Err(why) => Err(DiskError::Size { key, value, why }),
    }
}

fn number(key: &'static str, value: String, most: u64) -> Result<u64, DiskError> {
    match value.parse() {
        Ok(number) if (1..=most).contains(&number) => Ok(number),
        _ => Err(DiskError::Number { key, value, most }),
    }
}

fn cache(value: String) -> Result<Cache, DiskError> {
    match value.as_str() {
        "writeback" => Ok(Cache::Writeback),
        "none" => Ok(Cache::None),
        "unsafe" => Ok(Cache::Unsafe),
        _ => Err(DiskError::Choice {
            key: "cache",
            value,
            known: "writeback, none, unsafe",
        }),
    }
}

fn io(value: String) -> Result<Io, DiskError> {
    match value.as_str() {
        "io_uring" => Ok(Io::IoUring),
        "threads" => Ok(Io::Threads),
        _ => Err(DiskError::Choice {
            key: "io",
            value,
            known: "io_uring, threads",
        }),
    }
}

#[cfg(test)]
#[path = "disk_option_tests.rs"]
mod tests;
