//! Opens the images of a run, and what lies beneath them.

use std::path::PathBuf;

use cowshed_qcow::storage::Identity;
use cowshed_qcow::{Format, Image, OpenOptions, ReferencePolicy, Secret, Selector};

use super::Error;
use super::files::{Files, guest_storage, recognise};
use super::lock::Use;
use crate::config::{self, Overlay, SecretSource};

/// An image that a person named, open.
pub(super) struct Base {
    /// Its chain.
    pub(super) image: Image,
    /// The path that the person gave.
    pub(super) path: PathBuf,
    /// Its format.
    pub(super) format: Format,
    /// Which file it is.
    pub(super) identity: Option<Identity>,
}

/// Opens a disk's image. What is beneath it is only read, however it is opened itself.
pub(super) fn open(disk: &config::Disk, how: Use) -> Result<Base, Error> {
    let path = &disk.path;
    let cache_bytes = disk.cache_size.unwrap_or(OpenOptions::DEFAULT_CACHE_BYTES);
    // Half is for the overlay, if there is one.
    let cache_bytes = match disk.overlay {
        _ if disk.read_only => cache_bytes,
        Overlay::Direct => cache_bytes,
        Overlay::At(_) | Overlay::Throwaway => cache_bytes / 2,
    };
    let storage =
        guest_storage(path, how, disk.cache).map_err(|source| Error::open(path, source))?;
    let format = match disk.format {
        Some(format) => name(format),
        None => recognise(path, &*storage)?,
    };
    let identity = storage
        .identity()
        .map_err(|source| Error::open(path, source))?;
    let options = OpenOptions {
        read_only: how == Use::Read,
        references: match disk.allow_outside {
            true => ReferencePolicy::Any,
            false => ReferencePolicy::OwnFolder,
        },
        backing_format: disk.backing_format.map(name),
        secrets: disk.secrets.iter().map(secret).collect::<Result<_, _>>()?,
        snapshot: disk.snapshot.clone().map(Selector::IdOrName),
        cache_bytes,
        ..OpenOptions::new(format)
    };
    let image = Image::open(path, &options, &Files::under_guest(storage, disk.cache))?;
    Ok(Base {
        image,
        path: path.clone(),
        format,
        identity,
    })
}

/// Reads a password.
fn secret(source: &SecretSource) -> Result<Secret, Error> {
    let path = match source {
        SecretSource::File(path) => path.clone(),
        SecretSource::Descriptor(number) => format!("/proc/self/fd/{number}").into(),
    };
    match std::fs::read(&path) {
        Ok(bytes) => Ok(Secret::new(bytes)),
        Err(source) => Err(Error::Secret { path, source }),
    }
}

fn name(format: config::Format) -> Format {
    match format {
        config::Format::Qcow2 => Format::Qcow2,
        config::Format::Raw => Format::Raw,
    }
}
