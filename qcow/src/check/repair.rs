//! Repairing an image: which steps it takes, and what is done where its structures are, to refcounts
//! and the flag COPIED.
//!
//! A crash leaves an image that can be repaired again, and that loses nothing meanwhile: COPIED is
//! cleared where a cluster is shared, `|` refcounts are raised, `|` lowered, `|` COPIED is set,
//! where `|` is a sync. At no time is a refcount lower than it was and than the references are.

use std::path::Path;
use std::sync::Arc;

use crate::entry::{self, COPIED, Entry, Mapping, Standard};
use crate::error::{Error, Result};
use crate::header::{self, CORRUPT, DIRTY, Encryption, Header, RAW_DATA};
use crate::host::Host;
use crate::refcount;
use crate::storage::Storage;

use super::count::Count;
use super::report::{CheckReport, Findings};
use super::survey::Survey;
use super::window::{Counter, Place, Window};
use super::{CheckOptions, Examined, Subject, rebuild, relocate, sizes};

/// Autoclear features that a repair keeps true: bitmaps, and data files that are raw images.
const KNOWN_AUTOCLEAR: u64 = 0b11;

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Refcounts that are too high, which is safe whatever else is wrong.
    Leaks,
    /// Everything that can be repaired without changing a byte of the disk.
    All,
}

/// What one step of a repair does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Relocate,
    Rebuild,
    AddSizes,
    InPlace,
}

/// Steps that a repair takes at most: data under refcount structures shows once these are rebuilt,
/// and a table that grew has yet to be counted.
const MAX_STEPS: usize = 7;

/// Repairs the image in `storage`, known as `path` in messages, which nothing else may have open,
/// and checks it again: what the report finds could not be repaired. Nothing is written where
/// tables overlap each other, because what one of them says would change the other. An image that is clean then
/// is marked neither dirty nor corrupt any more.
pub fn repair(
    path: &Path,
    storage: Arc<dyn Storage>,
    what: Repair,
    options: &CheckOptions,
) -> Result<CheckReport> {
    let host = Host {
        path: path.to_owned(),
        storage,
    };
    let mut header = header::read_unplaced(&host)?;
    repair_host(&host, &mut header, what, options)
}

/// Makes refcounts of an image with the dirty bit that can be trusted, and clears the bit.
pub(crate) fn rebuild_dirty(host: &Host, mut header: Header) -> Result<Header> {
    let report = repair_host(host, &mut header, Repair::All, &CheckOptions::default())?;
    match report.findings.first() {
        None => Ok(header),
        Some(finding) => Err(Error::Corrupt {
            file: host.path.clone(),
            reason: format!(
                "its dirty bit is set, and of its refcounts' rebuilding is left: {finding}"
            ),
        }),
    }
}

fn repair_host(
    host: &Host,
    header: &mut Header,
    what: Repair,
    options: &CheckOptions,
) -> Result<CheckReport> {
    let mut found = Examined::read(host, header, options)?;
    let (corruptions, leaks) = (found.report.corruptions, found.report.leaks);
    let is_luks = matches!(header.encryption, Encryption::Luks { .. });
    let mut last = None;
    // One step at a time, and a fresh look after it.
    for _ in 0..MAX_STEPS {
        let unsized_snapshots = found.survey.unsized_snapshots;
        let step = match what {
            _ if found.report.is_clean() || found.tables_overlap => break,
            // LUKS's ciphertext means something else at another place.
            Repair::All if !found.overlapping.is_empty() && !is_luks => Step::Relocate,
            Repair::All if found.rebuild && !found.survey.incomplete => Step::Rebuild,
            // What is broken or overlaps is not written to.
            _ if found.rebuild || !found.overlapping.is_empty() => break,
            // When nothing else is left that would leave the image dirty.
            Repair::All
                if unsized_snapshots > 0 && unsized_snapshots == found.report.corruptions =>
            {
                Step::AddSizes
            }
            _ if last == Some(Step::InPlace) => break,
            _ => Step::InPlace,
        };
        change(host, header, |header| {
            header.autoclear &= KNOWN_AUTOCLEAR;
            if header.data_file().is_none() {
                header.autoclear &= !RAW_DATA;
            }
        })?;
        match step {
            Step::Relocate => {
                let subject = Subject::new(host, header, options)?;
                relocate::relocate(&subject, &found.survey, &found.overlapping)?;
            }
            Step::Rebuild => rebuild::rebuild(host, header, options)?,
            Step::AddSizes => sizes::add_sizes(host, header)?,
            Step::InPlace => in_place(host, header, what, options)?,
        }
        found = Examined::read(host, header, options)?;
        last = Some(step);
    }
    let mut report = found.report;
    report.corruptions_fixed = corruptions.saturating_sub(report.corruptions);
    report.leaks_fixed = leaks.saturating_sub(report.leaks);
    if report.is_clean() {
        change(host, header, |header| {
            header.incompatible &= !(DIRTY | CORRUPT)
        })?;
    }
    Ok(report)
}

/// Changes the header, if that changes anything.
pub(super) fn change(
    host: &Host,
    header: &mut Header,
    change: impl FnOnce(&mut Header),
) -> Result<()> {
    let mut next = header.clone();
    change(&mut next);
    if next != *header {
        header.replace(&mut next, host)?;
        *header = next;
    }
    Ok(())
}

fn in_place(host: &Host, header: &Header, what: Repair, options: &CheckOptions) -> Result<()> {
    let subject = Subject::new(host, header, options)?;
    let mut findings = Findings::new(&subject);
    let survey = Survey::read(&subject, &mut findings)?;
    let all = what == Repair::All;
    Count::new(&subject, &survey).run(&mut findings, &mut |window| {
        if all {
            flags(&subject, &survey, window, false, &|counter| {
                counter.references() == 1
            })?;
            refcounts(&subject, &survey, window, &|counter| {
                counter.references().max(counter.stored)
            })?;
        }
        if !survey.incomplete {
            refcounts(&subject, &survey, window, &|counter| {
                counter.references().min(counter.stored)
            })?;
        }
        // What `refcounts` wrote is in the counters.
        flags(&subject, &survey, window, true, &|counter| {
            counter.references() == 1 && counter.stored == 1
        })
    })
}

/// Writes those of a window's refcounts that are to be others, and syncs.
pub(super) fn refcounts(
    subject: &Subject<'_>,
    survey: &Survey,
    window: &mut Window,
    wanted: &dyn Fn(&Counter) -> u32,
) -> Result<()> {
    let order = subject.header.refcount_order;
    let most = u64::MAX >> (64 - (1 << order));
    let mut written = false;
    let clusters = subject.clusters();
    for (first, counters) in window.units() {
        let inside = clusters.saturating_sub(first).min(counters.len() as u64) as usize;
        let Some(counters) = counters.get_mut(..inside) else {
            continue;
        };
        if counters
            .iter()
            .all(|counter| counter.stored == wanted(counter))
        {
            continue;
        }
        let at = survey.refcount_place(subject, first);
        let mut block = vec![0; ((inside as u64) << order).div_ceil(8) as usize];
        subject.host.read(at, &mut block)?;
        for (index, counter) in counters.iter_mut().enumerate() {
            // A width that cannot hold it holds what it can, and the image keeps its finding.
            let value = u64::from(wanted(counter)).min(most) as u32;
            if value != counter.stored {
                refcount::set(&mut block, index as u64, order, value.into());
                counter.stored = value;
            }
        }
        subject.host.write(at, &block)?;
        written = true;
    }
    if written { subject.host.sync() } else { Ok(()) }
}

/// Sets or clears COPIED in the active tables where what an entry names is in the window and is
/// to have it, or not; and syncs.
fn flags(
    subject: &Subject<'_>,
    survey: &Survey,
    window: &mut Window,
    set: bool,
    wanted: &dyn Fn(&Counter) -> bool,
) -> Result<()> {
    let (header, geometry) = (subject.header, subject.header.geometry);
    let mut written = false;
    let mut change = |value: u64, host: Option<u64>| {
        let is_wrong = match host.map(|host| window.at(geometry.index(host))) {
            // Nothing there can have the flag.
            None => !set,
            Some(Place::Here(counter)) => wanted(counter) == set,
            Some(_) => false,
        };
        ((value & COPIED != 0) != set && is_wrong).then_some(value ^ COPIED)
    };
    let mut l1 = vec![0; header.l1_entries * 8];
    subject.host.read(header.l1_offset, &mut l1)?;
    written |= patch(subject.host, header.l1_offset, &mut l1, 8, &mut |entry| {
        let table = entry::l1(entry.descriptor, geometry).ok()?;
        change(entry.descriptor, table.map(|(table, _)| table))
    })?;
    survey.for_each_table(subject, |table, bytes| {
        if table.is_active() {
            let mut bytes = bytes.to_vec();
            let size = geometry.l2_entry() as usize;
            written |= patch(subject.host, table.offset, &mut bytes, size, &mut |entry| {
                let value = entry.descriptor;
                if header.data_file().is_some() {
                    // What lies in a data file has one reference, and no refcount to say so.
                    let wrong = value & COPIED == 0 && value & entry::OFFSET != 0;
                    return (set && wrong).then_some(value | COPIED);
                }
                match Mapping::decode(entry, header.version, geometry).ok()? {
                    Mapping::Standard(Standard { host: None, .. }) => None,
                    Mapping::Standard(Standard { host, .. }) => change(value, host),
                    Mapping::Compressed(_) => change(value, None),
                }
            })?;
        }
        Ok(())
    })?;
    if written { subject.host.sync() } else { Ok(()) }
}

/// Changes the descriptors of entries of `size` bytes, of a table that was read at `at`. Says
/// whether any was changed.
pub(super) fn patch(
    host: &Host,
    at: u64,
    bytes: &mut [u8],
    size: usize,
    change: &mut dyn FnMut(Entry) -> Option<u64>,
) -> Result<bool> {
    let mut changed: Option<(usize, usize)> = None;
    for (index, entry) in bytes.chunks_exact_mut(size).enumerate() {
        let old = Entry::read(entry);
        if let Some(descriptor) = change(old) {
            Entry { descriptor, ..old }.write(entry);
            let start = changed.map_or(index * size, |(start, _)| start);
            changed = Some((start, (index + 1) * size));
        }
    }
    let Some((start, end)) = changed else {
        return Ok(false);
    };
    host.write(at + start as u64, bytes.get(start..end).unwrap_or_default())?;
    Ok(true)
}
