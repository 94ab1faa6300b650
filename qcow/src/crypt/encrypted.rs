//! An encrypted file's sectors: read and decrypted, encrypted and written.

use std::sync::PoisonError;

use super::sectors::{SECTOR, Sectors};
use crate::error::Result;
use crate::host::Host;
use crate::sync::RwLock;

/// Bytes that are encrypted at a time.
const CHUNK: usize = 1 << 20;

/// Where a sector's number comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Numbered {
    /// From its place on the guest's disk.
    ByGuest,
    /// From its place in the file.
    ByHost,
}

/// Reads and writes an encrypted file.
pub(crate) struct Encrypted {
    sectors: Sectors,
    numbered: Numbered,
    /// Who writes a part of a sector writes all of it, and is alone.
    parts: RwLock<()>,
}

impl Encrypted {
    pub(crate) fn new(sectors: Sectors, numbered: Numbered) -> Self {
        Encrypted {
            sectors,
            numbered,
            parts: RwLock::new(()),
        }
    }

    /// Reads what the disk has at `guest` and the file at `host`, of any length.
    pub(crate) fn read(&self, file: &Host, guest: u64, host: u64, buf: &mut [u8]) -> Result<()> {
        let _others_too = self.parts.read().unwrap_or_else(PoisonError::into_inner);
        if is_whole(guest, buf.len()) {
            return self.read_whole(file, guest, host, buf);
        }
        let (skip, mut whole) = around(guest, buf.len());
        self.read_whole(file, guest - skip as u64, host - skip as u64, &mut whole)?;
        buf.copy_from_slice(whole.get(skip..skip + buf.len()).unwrap_or_default());
        Ok(())
    }

    /// Writes what the disk is to have at `guest` and the file at `host`, of any length.
    pub(crate) fn write(&self, file: &Host, guest: u64, host: u64, buf: &[u8]) -> Result<()> {
        if is_whole(guest, buf.len()) {
            let _others_too = self.parts.read().unwrap_or_else(PoisonError::into_inner);
            return self.write_whole(file, guest, host, buf);
        }
        let _alone = self.parts.write().unwrap_or_else(PoisonError::into_inner);
        let (skip, mut whole) = around(guest, buf.len());
        let (guest, host) = (guest - skip as u64, host - skip as u64);
        self.read_whole(file, guest, host, &mut whole)?;
        if let Some(part) = whole.get_mut(skip..skip + buf.len()) {
            part.copy_from_slice(buf);
        }
        self.write_whole(file, guest, host, &whole)
    }

    fn read_whole(&self, file: &Host, guest: u64, host: u64, buf: &mut [u8]) -> Result<()> {
        file.read(host, buf)?;
        self.sectors.decrypt(self.number(guest, host), buf);
        Ok(())
    }

    fn write_whole(&self, file: &Host, guest: u64, host: u64, buf: &[u8]) -> Result<()> {
        for (at, chunk) in (0..).step_by(CHUNK).zip(buf.chunks(CHUNK)) {
            let mut sectors = chunk.to_vec();
            self.sectors
                .encrypt(self.number(guest + at, host + at), &mut sectors);
            file.write(host + at, &sectors)?;
        }
        Ok(())
    }

    /// The number of the sector that begins there.
    fn number(&self, guest: u64, host: u64) -> u64 {
        let at = match self.numbered {
            Numbered::ByGuest => guest,
            Numbered::ByHost => host,
        };
        at / SECTOR as u64
    }
}

/// Whether a run of bytes is one of whole sectors.
fn is_whole(at: u64, len: usize) -> bool {
    at.is_multiple_of(SECTOR as u64) && len.is_multiple_of(SECTOR)
}

/// Room for the sectors that a run of bytes touches, and where it begins in them.
fn around(at: u64, len: usize) -> (usize, Vec<u8>) {
    let skip = (at % SECTOR as u64) as usize;
    (skip, vec![0; (skip + len).next_multiple_of(SECTOR)])
}
