//! One file of a chain, and walking down a chain of them.

use std::path::Path;
use std::sync::Arc;

use crate::error::{Result, Violation};
use crate::host::Host;
use crate::qcow2::{Load, Place, Qcow2, Run};
use crate::reference::Link;
use crate::storage::Storage;
use crate::sync::atomic::{AtomicU64, Ordering};

/// One file of a chain.
pub(crate) enum Layer {
    Qcow2(Box<Qcow2>),
    Raw(Raw),
}

/// A raw file: the disk's bytes as they are.
pub(crate) struct Raw {
    pub(crate) host: Host,
    /// The file's length rounded up to 512: the tail reads as zeros.
    size: AtomicU64,
    pub(crate) writable: bool,
}

impl Raw {
    pub(crate) fn open(path: &Path, storage: Arc<dyn Storage>, writable: bool) -> Result<Self> {
        let host = Host {
            path: path.to_owned(),
            storage,
        };
        let len = host.len()?;
        let size = len
            .checked_next_multiple_of(512)
            .filter(|&size| size <= i64::MAX as u64);
        let size = size.ok_or_else(|| {
            let most = i64::MAX.to_string();
            host.invalid(Violation::new("length", 0, len, format!("at most {most}")))
        })?;
        Ok(Raw {
            host,
            size: AtomicU64::new(size),
            writable,
        })
    }

    /// Makes known that the file was cut or has grown.
    pub(crate) fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }
}

impl Layer {
    pub(crate) fn host(&self) -> &Host {
        match self {
            Layer::Qcow2(qcow2) => &qcow2.host,
            Layer::Raw(raw) => &raw.host,
        }
    }

    /// The file that has the guest's bytes.
    pub(crate) fn data(&self) -> &Host {
        match self {
            Layer::Qcow2(qcow2) => &qcow2.data.host,
            Layer::Raw(raw) => &raw.host,
        }
    }

    /// The name of a data file that is not there yet.
    pub(crate) fn missing_data(&self) -> Option<&str> {
        match self {
            Layer::Qcow2(qcow2) => qcow2.data.missing(),
            Layer::Raw(_) => None,
        }
    }

    /// Gives a qcow2 file the data file that it names.
    pub(crate) fn attach_data(&mut self, data: Host, link: &Link) -> Result<()> {
        match self {
            Layer::Qcow2(qcow2) => qcow2.attach_data(data, link),
            Layer::Raw(_) => Ok(()),
        }
    }

    /// Whether a caller may move bytes between that file and its own memory.
    pub(crate) fn is_direct(&self) -> bool {
        match self {
            Layer::Qcow2(qcow2) => qcow2.data.is_direct(),
            Layer::Raw(raw) => raw.host.storage.file().is_some(),
        }
    }

    /// Whether that file has the bytes as the guest has them.
    pub(crate) fn is_plain(&self) -> bool {
        match self {
            Layer::Qcow2(qcow2) => qcow2.data.is_plain(),
            Layer::Raw(_) => true,
        }
    }

    /// Reads what the disk has at `guest` and the layer's file at `host`.
    pub(crate) fn read(&self, guest: u64, host: u64, buf: &mut [u8]) -> Result<()> {
        match self {
            Layer::Qcow2(qcow2) => qcow2.data.read(guest, host, buf),
            Layer::Raw(raw) => raw.host.read(host, buf),
        }
    }

    /// Visits what the host keeps of `len` bytes at `host` of the file that has the guest's bytes,
    /// in order: lengths, and whether there is data. What is not data is a hole, of zeros.
    pub(crate) fn kept(
        &self,
        host: u64,
        len: u64,
        visit: &mut dyn FnMut(u64, bool) -> Result<()>,
    ) -> Result<()> {
        let (mut at, end) = (host, host + len);
        while at < end {
            let data = self.data().next_data(at)?.unwrap_or(end..end);
            let (from, to) = (data.start.min(end), data.end.min(end));
            if at < from {
                visit(from - at, false)?;
            }
            if from < to {
                visit(to - from, true)?;
            }
            at = to;
        }
        Ok(())
    }

    /// How far the layer says nothing of the disk from `at` on: it reads as zeros there, or as what
    /// lies beneath.
    pub(crate) fn nothing_until(&self, at: u64) -> Result<u64> {
        let size = self.size();
        let until = match self {
            _ if at >= size => size,
            Layer::Qcow2(qcow2) => qcow2.nothing_until(at)?,
            Layer::Raw(raw) => raw.host.next_data(at)?.map_or(size, |data| data.start),
        };
        Ok(if until >= size { u64::MAX } else { until })
    }

    pub(crate) fn size(&self) -> u64 {
        match self {
            Layer::Qcow2(qcow2) => qcow2.size(),
            Layer::Raw(raw) => raw.size.load(Ordering::Acquire),
        }
    }

    pub(crate) fn writable(&self) -> bool {
        match self {
            Layer::Qcow2(qcow2) => qcow2.writable,
            Layer::Raw(raw) => raw.writable,
        }
    }

    /// `offset..offset + len` lies inside [`size`](Self::size).
    fn resolve(&self, offset: u64, len: u64, load: Load, runs: &mut Vec<Run>) -> Result<bool> {
        match self {
            Layer::Qcow2(qcow2) => qcow2.resolve(offset, len, load, runs),
            Layer::Raw(_) => {
                runs.push(Run {
                    len,
                    place: Place::Data(offset),
                });
                Ok(true)
            }
        }
    }
}

/// How far no layer says anything of the disk from `at` on.
pub(crate) fn nothing_until(layers: &[Layer], at: u64) -> Result<u64> {
    let mut until = u64::MAX;
    for layer in layers {
        until = until.min(layer.nothing_until(at)?);
        if until == at {
            break;
        }
    }
    Ok(until)
}

/// Refuses a chain in which a table is named twice for a range of the disk: what it has there may be
/// without bound.
pub(crate) fn check_tables(layers: &[Layer], offset: u64, len: u64) -> Result<()> {
    layers.iter().try_for_each(|layer| match layer {
        Layer::Qcow2(qcow2) => qcow2.check_l1(offset, len),
        Layer::Raw(_) => Ok(()),
    })
}

/// Visits where a range of the disk is, in order: the layer's index, and the run there. What no
/// layer has comes as [`Place::Zero`].
pub(crate) fn walk(
    layers: &[Layer],
    offset: u64,
    len: u64,
    visit: &mut dyn FnMut(usize, Run) -> Result<()>,
) -> Result<()> {
    walk_with(layers, offset, len, Load::Now, visit).map(drop)
}

/// The same. Whether it came to the end: it stops where tables must not be loaded. Does not recurse,
/// so that no chain is too deep for a stack.
pub(crate) fn walk_with(
    layers: &[Layer],
    offset: u64,
    len: u64,
    load: Load,
    visit: &mut dyn FnMut(usize, Run) -> Result<()>,
) -> Result<bool> {
    /// A run of a layer, or, if `place` is `Below`, a range that the layer is still to be asked.
    struct Todo {
        layer: usize,
        offset: u64,
        run: Run,
    }
    let ask = |layer, offset, len| Todo {
        layer,
        offset,
        run: Run {
            len,
            place: Place::Below,
        },
    };
    let mut todo = vec![ask(0, offset, len)];
    let mut runs = Vec::new();
    while let Some(Todo {
        layer: index,
        offset,
        run,
    }) = todo.pop()
    {
        if run.place != Place::Below {
            visit(index, run)?;
            continue;
        }
        // Past its end a layer hides what longer layers below it have there.
        let size = layers.get(index).map_or(0, Layer::size);
        let inside = run.len.min(size.saturating_sub(offset));
        if inside < run.len {
            let beyond = Run {
                len: run.len - inside,
                place: Place::Zero,
            };
            todo.push(Todo {
                layer: index,
                offset: offset + inside,
                run: beyond,
            });
        }
        let Some(layer) = layers.get(index).filter(|_| inside > 0) else {
            continue;
        };
        runs.clear();
        if !layer.resolve(offset, inside, load, &mut runs)? {
            return Ok(false);
        }
        let mut end = offset + inside;
        for &run in runs.iter().rev() {
            end -= run.len;
            let layer = if run.place == Place::Below {
                index + 1
            } else {
                index
            };
            todo.push(Todo {
                layer,
                offset: end,
                run,
            });
        }
    }
    Ok(true)
}
