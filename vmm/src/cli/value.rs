//! Values of options, parsed by pure functions.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::config::Copy;
use crate::memory;

/// Why a value is refused. clap puts the option's name before it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ValueError {
    #[error("a size is a number with an optional k, M, G, T, P or E, such as 20G or 1.5T")]
    Size,
    #[error("a duration is a whole number with an optional ms, s, m or h, such as 90, 90s or 2m")]
    Duration,
    #[error("too large")]
    TooLarge,
    #[error("a duration must be longer than nothing")]
    NoTime,
    #[error("{0} bytes are too few for a guest: did you mean {0}M?")]
    MemoryUnit(u64),
    #[error("a guest needs at least {}M", memory::MIN >> 20)]
    MemoryTooSmall,
    #[error("memory comes in whole mebibytes")]
    MemoryUnaligned,
    #[error("an environment variable is NAME=VALUE")]
    Env,
    #[error("write SRC:DST (a colon within a path is written '::')")]
    Copy,
    #[error("{} is a path in the guest: it must begin with '/'", .0.display())]
    GuestPath(PathBuf),
}

/// A size in bytes: a number with an optional k, M, G, T, P or E, powers of 1024, and perhaps a
/// fraction, such as 1.5G; or a hexadecimal number, such as 0x100000.
pub(super) fn size(text: &str) -> Result<u64, ValueError> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(ValueError::Size);
        }
        let size = u64::from_str_radix(digits, 16).map_err(|_| ValueError::TooLarge)?;
        return fits(size);
    }
    let unit = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[unit.len()..] {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(ValueError::Size),
    };
    let (whole, fraction) = unit.split_once('.').unwrap_or((unit, ""));
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) {
        return Err(ValueError::Size);
    }
    let whole: u64 = whole.parse().map_err(|_| ValueError::TooLarge)?;
    // What a person writes after a point is far from the ends of a number of 64 bits.
    let fraction: f64 = format!("0.{fraction}0").parse().unwrap_or(0.0);
    let fraction = (fraction * (1_u64 << shift) as f64) as u64;
    whole
        .checked_mul(1 << shift)
        .and_then(|whole| whole.checked_add(fraction))
        .ok_or(ValueError::TooLarge)
        .and_then(fits)
}

fn fits(size: u64) -> Result<u64, ValueError> {
    let fits = size <= i64::MAX as u64;
    fits.then_some(size).ok_or(ValueError::TooLarge)
}

/// Guest memory in bytes.
pub(super) fn memory(text: &str) -> Result<u64, ValueError> {
    let bytes = size(text)?;
    if bytes < memory::MIN && text.bytes().all(|b| b.is_ascii_digit()) {
        Err(ValueError::MemoryUnit(bytes))
    } else if bytes < memory::MIN {
        Err(ValueError::MemoryTooSmall)
    } else if !bytes.is_multiple_of(1 << 20) {
        Err(ValueError::MemoryUnaligned)
    } else {
        Ok(bytes)
    }
}

/// A duration longer than nothing: a number of seconds, or one with ms, s, m or h.
pub(super) fn duration(text: &str) -> Result<Duration, ValueError> {
    let (digits, unit) = split_number(text).ok_or(ValueError::Duration)?;
    let milliseconds: u64 = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(ValueError::Duration),
    };
    let number: u64 = digits.parse().map_err(|_| ValueError::TooLarge)?;
    // A year is enough for anything that is called a timeout.
    let longest = 366 * 24 * 3_600_000;
    match number.checked_mul(milliseconds) {
        Some(0) => Err(ValueError::NoTime),
        Some(time) if time <= longest => Ok(Duration::from_millis(time)),
        _ => Err(ValueError::TooLarge),
    }
}

/// `NAME=VALUE`.
pub(super) fn env(text: OsString) -> Result<(OsString, OsString), ValueError> {
    let bytes = text.as_bytes();
    match bytes.iter().position(|&b| b == b'=') {
        None | Some(0) => Err(ValueError::Env),
        Some(at) => Ok((
            OsStr::from_bytes(&bytes[..at]).to_os_string(),
            OsStr::from_bytes(&bytes[at + 1..]).to_os_string(),
        )),
    }
}

/// `SRC:DST`, from the host into the guest.
pub(super) fn copy_in(text: OsString) -> Result<Copy, ValueError> {
    let copy = copy(&text)?;
    guest_path(&copy.to)?;
    Ok(copy)
}

/// `SRC:DST`, from the guest to the host.
pub(super) fn copy_out(text: OsString) -> Result<Copy, ValueError> {
    let copy = copy(&text)?;
    guest_path(&copy.from)?;
    Ok(copy)
}

/// An absolute path in the guest.
pub(super) fn working_directory(text: OsString) -> Result<PathBuf, ValueError> {
    let path = PathBuf::from(text);
    guest_path(&path)?;
    Ok(path)
}

fn guest_path(path: &Path) -> Result<(), ValueError> {
    if path.is_absolute() {
        Ok(())
    } else {
        Err(ValueError::GuestPath(path.to_path_buf()))
    }
}

fn copy(text: &OsStr) -> Result<Copy, ValueError> {
    match <[OsString; 2]>::try_from(split_doubled(text, b':')) {
        Ok([from, to]) if !from.is_empty() && !to.is_empty() => Ok(Copy {
            from: from.into(),
            to: to.into(),
        }),
        _ => Err(ValueError::Copy),
    }
}

/// Splits at each `separator`; a doubled one stands for itself.
pub(super) fn split_doubled(text: &OsStr, separator: u8) -> Vec<OsString> {
    let mut parts = Vec::new();
    let mut part = Vec::new();
    let mut bytes = text.as_bytes().iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte != separator || bytes.next_if_eq(&separator).is_some() {
            part.push(byte);
        } else {
            parts.push(OsString::from_vec(std::mem::take(&mut part)));
        }
    }
    parts.push(OsString::from_vec(part));
    parts
}

/// The leading digits, at least one, and what follows them.
fn split_number(text: &str) -> Option<(&str, &str)> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    (end > 0).then(|| text.split_at(end))
}

#[cfg(test)]
#[path = "value_tests.rs"]
mod tests;
