//! Writing: in place where the cluster is the image's own, else prepare, write data, commit.

use std::ops::Range;

use crate::content::{Content, FileRange};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::layer::{Layer, walk};
use crate::pin::Pin;
use crate::plan::{self, Extent, Plan};
use crate::prepare::{Prepared, Step};
use crate::qcow2::{Load, Place, Qcow2};
use crate::way::{Way, way};

impl Image {
    /// Where `len` bytes at `offset` can be written: in place, where they lie in clusters of the top
    /// image that nothing else refers to, or to clusters that are allocated for them. No other write
    /// is waited for, and nothing is read but tables.
    pub fn plan_write(&self, offset: u64, len: u64) -> Result<Plan> {
        self.plan_write_with(offset, len, Load::Now)
    }

    /// The same, but [`Plan::Slow`] where the table that maps the bytes would have to be loaded, and
    /// while an operation has the image to itself: that may wait for the caller's other plans.
    pub fn plan_write_at_once(&self, offset: u64, len: u64) -> Result<Plan> {
        self.plan_write_with(offset, len, Load::Never)
    }

    fn plan_write_with(&self, offset: u64, len: u64, load: Load) -> Result<Plan> {
        self.check_range(offset, len)?;
        let Some(qcow2) = self.writable_top()? else {
            let extents = vec![Extent::File {
                file: 0,
                offset,
                len,
            }];
            let fast = self.layers.first().is_some_and(Layer::is_direct);
            return Ok(if fast {
                Plan::Fast {
                    extents,
                    pin: Pin::none(),
                }
            } else {
                Plan::Slow
            });
        };
        if !qcow2.data.is_direct() {
            return Ok(Plan::Slow);
        }
        let Some(mut state) = qcow2.state_with(offset, len, load)? else {
            return Ok(Plan::Slow);
        };
        while qcow2.split(&mut state)?.1.alone {
            if load == Load::Never {
                return Ok(Plan::Slow);
            }
            state = qcow2.wait(state);
        }
        let (tables, writing) = qcow2.split(&mut state)?;
        let mut extents = Vec::new();
        let mut fast = true;
        // No flush comes first, and no other allocation.
        let mut whole = !tables.l2.is_strained()
            && !writing.is_strained()
            && !writing.is_allocating(&qcow2.geometry.subclusters(offset..offset + len));
        let mut overlap = None;
        let mut at = offset;
        qcow2.mappings(tables, offset, len, &mut |within, len, mapping| {
            let bytes = at..at + len;
            let touched = qcow2.geometry.touched(&bytes, qcow2.geometry.index(at));
            at += len;
            let Way::InPlace(host) = way(mapping, touched) else {
                fast = false;
                whole &= qcow2.is_whole(bytes, mapping);
                return whole;
            };
            overlap = qcow2.find_table(writing, qcow2.geometry.span(host, 1));
            plan::push(
                &mut extents,
                Extent::File {
                    file: 0,
                    offset: host + within,
                    len,
                },
            );
            overlap.is_none()
        })?;
        if let Some(host) = overlap {
            return Err(qcow2.overlaps(tables, host));
        }
        if fast {
            qcow2.mark_dirty(tables, writing, offset..offset + len)?;
            let pin = qcow2.pins.pin();
            return Ok(Plan::Fast { extents, pin });
        }
        let filled = match whole {
            true => qcow2.plan_fill(tables, writing, offset..offset + len)?,
            false => None,
        };
        Ok(filled.map_or(Plan::Slow, |(extents, fill)| Plan::Fill { extents, fill }))
    }

    /// Writes `buf` at `offset` of the disk.
    pub fn write(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        self.write_through(offset, Content::Bytes(buf))
    }

    /// Writes what a range of a file has, which the host copies: the top image's file has the
    /// guest's bytes as they are. After an error it is not known what the range of the disk has.
    pub(crate) fn write_from(&self, offset: u64, range: FileRange<'_>) -> Result<()> {
        self.check_range(offset, range.len)?;
        self.write_through(offset, Content::File(range))
    }

    /// The same, and perhaps past the disk's end, within its last cluster.
    pub(crate) fn write_through(&self, offset: u64, content: Content<'_>) -> Result<()> {
        let Some(qcow2) = self.writable_top()? else {
            return self
                .layers
                .first()
                .map_or(Ok(()), |raw| raw.host().put(offset, content));
        };
        let (mut at, mut rest) = (offset, content);
        while rest.len() > 0 {
            let step = qcow2.prepare(at, rest.len())?;
            let len = match &step {
                Step::InPlace { len, .. } => *len,
                Step::Fill(prepared) => prepared.len,
            };
            let (part, after) = rest.split_at(len);
            match step {
                Step::InPlace { host, .. } => qcow2.data.put(at, host, part)?,
                Step::Fill(prepared) => {
                    let filled = self.fill(qcow2, &prepared, at, part);
                    let written = filled.is_ok();
                    filled.and(qcow2.finish(&prepared, written))?;
                }
            }
            (at, rest) = (at + len, after);
        }
        Ok(())
    }

    /// The top image if it is qcow2, or `None` if it is a raw file; an error if it is read-only.
    pub(crate) fn writable_top(&self) -> Result<Option<&Qcow2>> {
        match self.layers.first() {
            Some(layer) if !layer.writable() => Err(Error::ReadOnly {
                file: layer.host().path.clone(),
            }),
            Some(Layer::Qcow2(qcow2)) => Ok(Some(qcow2)),
            _ => Ok(None),
        }
    }

    /// Writes into a run of clusters: `content` at `at`, and before and after it what comes along.
    fn fill(
        &self,
        qcow2: &Qcow2,
        prepared: &Prepared,
        at: u64,
        content: Content<'_>,
    ) -> Result<()> {
        let start = prepared.guest.start * qcow2.geometry.cluster();
        let (touch, data_end) = (&prepared.touch, at + content.len());
        let host = |guest: u64| prepared.host + (guest - start);
        let head = self.beside(qcow2, prepared, touch.start..at, host(touch.start))?;
        let tail = self.beside(qcow2, prepared, data_end..touch.end, host(data_end))?;
        if head.is_empty() && tail.is_empty() {
            return qcow2.data.put(at, host(at), content);
        }
        // One write for a small run, so that a cluster lands at once.
        if let Content::Bytes(data) = content
            && touch.end - touch.start <= qcow2.geometry.cluster()
        {
            let from = at - head.len() as u64;
            let whole = [&head, data, &tail].concat();
            return qcow2.data.write(from, host(from), &whole);
        }
        if !head.is_empty() {
            qcow2.data.write(touch.start, host(touch.start), &head)?;
        }
        qcow2.data.put(at, host(at), content)?;
        if tail.is_empty() {
            Ok(())
        } else {
            qcow2.data.write(data_end, host(data_end), &tail)
        }
    }

    /// The old content of a range beside the data, to be copied; empty if there is nothing to
    /// copy, because the range is zeros and its new place is so too.
    fn beside(
        &self,
        qcow2: &Qcow2,
        prepared: &Prepared,
        guest: Range<u64>,
        host: u64,
    ) -> Result<Vec<u8>> {
        if guest.is_empty() {
            return Ok(Vec::new());
        }
        let on_disk = guest.end.min(self.size()).saturating_sub(guest.start);
        let len = guest.end - guest.start;
        let zeros = self.reads_as_zeros(guest.start, on_disk)?;
        if zeros && qcow2.data.is_plain() {
            if !prepared.fresh {
                qcow2.data.zero(guest.start, host, len)?;
            }
            return Ok(Vec::new());
        }
        let mut old = vec![0; len as usize];
        if zeros {
            return Ok(old);
        }
        let on_disk = old.get_mut(..on_disk as usize).unwrap_or_default();
        self.read(guest.start, on_disk)?;
        Ok(old)
    }

    /// Whether the tables alone say that a range is zeros.
    pub(crate) fn reads_as_zeros(&self, offset: u64, len: u64) -> Result<bool> {
        let mut zeros = true;
        walk(&self.layers, offset, len, &mut |_, run| {
            zeros &= matches!(run.place, Place::Zero | Place::Below);
            Ok(())
        })?;
        Ok(zeros)
    }
}
