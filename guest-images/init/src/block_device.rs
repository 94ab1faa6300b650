//! The disks and partitions that the kernel has found.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use rustix::fd::AsFd;
use rustix::fs::{Dir, Mode, OFlags};

use crate::filesystem::{self, FileSystem};
use crate::kernel_args::read_file;
use crate::partition_table::PartitionTable;
use crate::volume::{Names, ReadAt};

const CLASS: &str = "/sys/class/block";

/// A disk or a partition of one.
pub(crate) struct BlockDevice {
    /// Such as `vda1`.
    name: String,
}

impl BlockDevice {
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.into() }
    }

    /// All that there are, in the order of their names.
    pub(crate) fn all() -> Vec<Self> {
        Self::below(CLASS, "")
    }

    /// The partitions of a disk.
    pub(crate) fn partitions(&self) -> Vec<Self> {
        Self::below(&format!("{CLASS}/{}", self.name), &self.name)
    }

    fn below(folder: &str, prefix: &str) -> Vec<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let entries = rustix::fs::open(folder, flags, Mode::empty()).and_then(Dir::new);
        let entries = entries.into_iter().flatten().flatten();
        let mut names: Vec<String> = entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with(prefix) && !name.starts_with('.'))
            .collect();
        names.sort_unstable();
        names.into_iter().map(|name| Self { name }).collect()
    }

    /// Its file in `/dev`.
    pub(crate) fn path(&self) -> String {
        format!("/dev/{}", self.name)
    }

    /// In sectors of 512 bytes.
    pub(crate) fn size(&self) -> u64 {
        self.attribute("size").unwrap_or(0)
    }

    fn attribute(&self, name: &str) -> Option<u64> {
        let content = read_file(&format!("{CLASS}/{}/{name}", self.name)).ok()?;
        core::str::from_utf8(&content).ok()?.trim().parse().ok()
    }

    /// Its file system, if it is one that we know.
    pub(crate) fn file_system(&self) -> Option<FileSystem> {
        self.read(filesystem::identify)
    }

    /// The partitions of a disk with the names that its table gives them.
    pub(crate) fn named_partitions(&self) -> Vec<(Self, Names)> {
        let Some(table) = self.read(PartitionTable::of) else {
            return Vec::new();
        };
        let partitions = self.partitions().into_iter();
        let named = partitions.filter_map(|partition| {
            let number = partition.attribute("partition")?.try_into().ok()?;
            let names = self.read(|read| table.names(read, number))?;
            Some((partition, names))
        });
        named.collect()
    }

    fn read<T>(&self, parse: impl FnOnce(ReadAt<'_>) -> Option<T>) -> Option<T> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::open(self.path(), flags, Mode::empty()).ok()?;
        parse(&|offset, into| {
            let len = into.len();
            rustix::io::pread(file.as_fd(), into, offset) == Ok(len)
        })
    }
}
