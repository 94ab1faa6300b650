//! Internal snapshots: earlier states of the disk in the same file, which share clusters with it.
//!
//! A snapshot is an L1 table of its own and what the snapshot table says of it. What two L1 tables
//! lead to has a refcount above one and is copied before it is written. All operations are one
//! scheme, with `|` for a sync: new tables, COPIED cleared `|` refcount increments `|` the header
//! `|` refcount decrements `|` COPIED set where the refcount is one again. A crash leaves leaks, or
//! COPIED clear at refcount one, which costs a copy; never COPIED set above one.

mod apply;
mod copied;
mod create;
mod delete;
mod read;
mod recount;
mod sizes;
mod switch;
pub(crate) mod table;
pub(crate) mod tree;
mod vm_state;

use std::fmt;
use std::time::{Duration, SystemTime};

use crate::error::{Error, Result};
use crate::header::DATA_FILE;
use crate::image::Image;
use crate::layer::Layer;
use crate::qcow2::Qcow2;

/// What the snapshot table says of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Unique in its image; a decimal number if this crate or QEMU made it. Bytes that are no UTF-8
    /// are replaced.
    pub id: String,
    /// Not always unique. Bytes that are no UTF-8 are replaced.
    pub name: String,
    /// Size of the disk in bytes when it was made: applying the snapshot restores it.
    pub disk_size: u64,
    /// Bytes of the VM state; 0 for a snapshot of the disk alone.
    pub vm_state_size: u64,
    /// When it was made.
    pub date: SystemTime,
    /// How long the guest had run.
    pub vm_clock: Duration,
    /// Instructions that the guest had run, if they were counted.
    pub icount: Option<u64>,
}

/// What a new snapshot is to record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSnapshot {
    /// 1 to 255 bytes. Others may have the same name.
    pub name: String,
    /// Kept in whole nanoseconds, from 1970 to 2106.
    pub date: SystemTime,
    /// Bytes of VM state that [`Image::write_vm_state`] wrote before; 0 if there is none.
    pub vm_state_size: u64,
    /// How long the guest has run.
    pub vm_clock: Duration,
    /// Instructions that the guest has run, if they are counted.
    pub icount: Option<u64>,
}

impl NewSnapshot {
    /// A snapshot of the disk alone, made now.
    pub fn new(name: impl Into<String>) -> Self {
        NewSnapshot {
            name: name.into(),
            date: SystemTime::now(),
            vm_state_size: 0,
            vm_clock: Duration::ZERO,
            icount: None,
        }
    }
}

/// Which snapshot is meant. Where it fits several, it is the first of them, as with QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// The one with this ID.
    Id(String),
    /// The one with this name.
    Name(String),
    /// The one with this ID, or if there is none the one with this name.
    IdOrName(String),
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Selector::Id(id) => write!(f, "the ID {id:?}"),
            Selector::Name(name) => write!(f, "the name {name:?}"),
            Selector::IdOrName(either) => write!(f, "the ID or name {either:?}"),
        }
    }
}

impl Image {
    /// The snapshots in the top image's file, in the order of its table; none if it is raw.
    ///
    /// To read one without applying it, open the image with
    /// [`OpenOptions::snapshot`](crate::OpenOptions::snapshot).
    ///
    /// ```
    /// # use std::{path::Path, sync::Arc};
    /// # use cowshed_qcow::*;
    /// # fn main() -> Result<()> {
    /// # let file = Arc::new(MemoryStorage::default());
    /// # create(Path::new("disk"), file.clone(), &CreateOptions::new(1 << 20))?;
    /// let disk = Image::open_over(Path::new("disk"), file, &OpenOptions::new(Format::Qcow2), None)?;
    /// disk.write(0, b"before")?;
    /// let made = disk.create_snapshot(&NewSnapshot::new("before the upgrade"))?;
    /// assert_eq!(disk.snapshots()?, [made]);
    ///
    /// disk.write(0, b"broken")?;
    /// disk.apply_snapshot(&Selector::Name("before the upgrade".into()))?;
    /// let mut bytes = [0; 6];
    /// disk.read(0, &mut bytes)?;
    /// assert_eq!(&bytes, b"before");
    ///
    /// disk.delete_snapshot(&Selector::Id("1".into()))?;
    /// assert_eq!(disk.snapshots()?, []);
    /// # Ok(())
    /// # }
    /// ```
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        let Some(Layer::Qcow2(qcow2)) = self.layers.first() else {
            return Ok(Vec::new());
        };
        let state = qcow2.state();
        let (header, file_len) = (&state.tables.header, state.tables.file_len);
        let table = table::Table::read(&qcow2.host, header, file_len)?;
        let entries = table.entries.iter();
        Ok(entries.map(|entry| entry.describe(header.size)).collect())
    }

    /// The top image, if it can have snapshots and is open for writing.
    fn with_snapshots(&self) -> Result<&Qcow2> {
        let unsupported = |feature: &str, advice| {
            let file = self.layers.first().map(|top| top.host().path.clone());
            Err(Error::Unsupported {
                file: file.unwrap_or_default(),
                feature: feature.into(),
                advice,
            })
        };
        let Some(qcow2) = self.writable_top()? else {
            let advice = "convert it with `cowshed img convert -O qcow2` to have snapshots";
            return unsupported("the raw format", advice);
        };
        if qcow2.state().tables.header.incompatible & DATA_FILE != 0 {
            let advice = "use overlays instead: clusters there have no refcounts";
            return unsupported("an external data file", advice);
        }
        Ok(qcow2)
    }
}
