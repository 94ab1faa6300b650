//! One qcow2 file: its tables, and what they say of a guest offset.

use std::path::Path;
use std::sync::{Arc, PoisonError};

use crate::addr::Geometry;
use crate::cache::Cache;
use crate::chain::Budget;
use crate::check;
use crate::compress::Compression;
use crate::crypt::keys::locked;
use crate::data::{Data, Form, Home};
use crate::entry::Compressed;
use crate::error::{Error, Result};
use crate::header::{self, CORRUPT, DIRTY, Header};
use crate::host::Host;
use crate::pin::Pins;
use crate::reference::Link;
use crate::snapshot::Selector;
use crate::storage::Storage;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard, Signal};
use crate::writing::Writing;

/// One open qcow2 file.
pub(crate) struct Qcow2 {
    pub(crate) host: Host,
    pub(crate) data: Data,
    pub(crate) version: u32,
    pub(crate) geometry: Geometry,
    pub(crate) compression: Compression,
    /// Size of the disk in bytes; changed under the lock only.
    size: AtomicU64,
    pub(crate) writable: bool,
    /// The file may not grow past this many bytes.
    pub(crate) max_file_size: Option<u64>,
    pub(crate) refcount_cache_bytes: usize,
    /// Data is read and written without this lock.
    state: Mutex<State>,
    /// Signalled when an allocation or a flush ends.
    changed: Signal,
    /// Held while a key slot changes, which may take seconds.
    pub(crate) key_slots: Mutex<()>,
    pub(crate) pins: Arc<Pins>,
}

/// What the lock guards.
pub(crate) struct State {
    pub(crate) tables: Tables,
    /// What a writer needs; made when the first write comes.
    pub(crate) writing: Option<Box<Writing>>,
}

/// The tables, as they will be in the file once everything is flushed.
pub(crate) struct Tables {
    /// As it is in the file.
    pub(crate) header: Header,
    pub(crate) l1: Vec<u64>,
    pub(crate) l2: Cache,
    /// Where the file ends: no table and no cluster begins past it.
    pub(crate) file_len: u64,
    /// Why nothing is written any more.
    pub(crate) stopped: Option<String>,
}

/// What becomes of tables that are not in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    Now,
    Never,
}

/// A run of guest bytes and where one file has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) len: u64,
    pub(crate) place: Place,
}

/// Where a run's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the backing file, if there is one.
    Below,
    /// Nowhere: they are zeros.
    Zero,
    /// At this offset of the file.
    Data(u64),
    /// In a compressed cluster, from this byte of its content on.
    Compressed(Compressed, u64),
}

impl Qcow2 {
    /// Reads the header and the L1 table, those of a snapshot if one is given.
    pub(crate) fn open(
        path: &Path,
        storage: Arc<dyn Storage>,
        writable: bool,
        max_file_size: Option<u64>,
        snapshot: Option<&Selector>,
        budget: &mut Budget,
    ) -> Result<Self> {
        let host = Host {
            path: path.to_owned(),
            storage,
        };
        let mut header = header::read(&host)?;
        if writable && header.incompatible & CORRUPT != 0 {
            let reason = "its header says so".into();
            return Err(Error::Corrupt {
                file: path.to_owned(),
                reason,
            });
        }
        if writable && header.incompatible & DIRTY != 0 {
            header = check::rebuild_dirty(&host, header)?;
        }
        let file_len = host.len()?;
        if let Some(snapshot) = snapshot {
            header = header.at_snapshot(&host, file_len, snapshot)?;
        }
        let l1_bytes = header.l1_entries as u64 * 8;
        let cache_bytes = budget.next_cache();
        budget.l1 = budget
            .l1
            .checked_sub(l1_bytes)
            .ok_or_else(|| Error::Unsupported {
                file: path.to_owned(),
                feature: format!(
                    "a chain with more than {} bytes of L1 tables",
                    Budget::L1_BYTES
                ),
                advice: "join some of its images with `cowshed img rebase` or `cowshed img convert`",
            })?;
        let l1 = host.read_l1(header.l1_offset, header.l1_entries)?;
        let (version, geometry, compression) =
            (header.version, header.geometry, header.compression);
        let size = AtomicU64::new(header.size);
        let tables = Tables {
            header,
            l1,
            l2: Cache::new(geometry.slice(), cache_bytes - cache_bytes / 4),
            file_len,
            stopped: None,
        };
        let form = budget.keys.unlock(&host, tables.header.encryption)?;
        if writable && matches!(form, Form::Locked) {
            return Err(locked(&host));
        }
        let home = match tables.header.data_file() {
            None => Home::Image,
            Some(name) => Home::Missing(name.to_owned()),
        };
        let data = Data {
            host: host.clone(),
            home,
            form,
        };
        Ok(Qcow2 {
            host,
            data,
            version,
            geometry,
            compression,
            size,
            writable,
            max_file_size,
            refcount_cache_bytes: cache_bytes / 4,
            state: Mutex::new(State {
                tables,
                writing: None,
            }),
            changed: Signal::default(),
            key_slots: Mutex::default(),
            pins: Arc::default(),
        })
    }

    /// Takes the data file that the header names.
    pub(crate) fn attach_data(&mut self, data: Host, link: &Link) -> Result<()> {
        let (len, size) = (data.len()?, self.size());
        if len < size {
            return Err(link.refuse(&format!(
                "it has {len} bytes and the disk {size}: it was cut, or is another file"
            )));
        }
        let raw = self.state().tables.header.has_raw_data();
        self.data.host = data;
        self.data.home = Home::File { raw };
        Ok(())
    }

    /// Size of the disk in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Changes the header, in the file first. After a failure it may be either there, so that
    /// nothing more is written.
    pub(crate) fn change_header(
        &self,
        tables: &mut Tables,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let mut next = tables.header.clone();
        change(&mut next);
        if let Err(error) = tables.header.replace(&mut next, &self.host) {
            tables.stopped = Some(format!("its header could not be written: {error}"));
            return Err(error);
        }
        self.size.store(next.size, Ordering::Release);
        tables.header = next;
        Ok(())
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for an allocation or a flush to end.
    pub(crate) fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state)
    }

    /// Wakes those who [`wait`](Self::wait).
    pub(crate) fn notify(&self) {
        self.changed.notify_all();
    }
}
