//! Storage that nobody needs after a crash.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;

use cowshed_qcow::storage::Identity;
use cowshed_qcow::{FileStorage, Storage};

/// A file whose content dies with this process, so that nothing is gained by making it durable.
#[derive(Debug)]
pub(super) struct Unsynced(FileStorage);

impl Unsynced {
    pub(super) fn new(file: File) -> Self {
        Self(FileStorage::new(file))
    }
}

impl Storage for Unsynced {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, buf)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.zero(offset, len)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.punch(offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.0.allocated()
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        self.0.file()
    }

    fn identity(&self) -> io::Result<Option<Identity>> {
        self.0.identity()
    }
}
