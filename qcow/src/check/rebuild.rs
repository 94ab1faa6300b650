//! New refcount structures at the end of the file, for an image whose own cannot be trusted or are
//! to have another width.
//!
//! Nothing names them until the header does, in one write: a crash leaves the image as it was, or
//! with refcounts that are right. The old ones are free clusters then.

use crate::error::{Error, Result};
use crate::header::{Header, MAX_REFCOUNT_TABLE_BYTES};
use crate::host::Host;

use super::count::Count;
use super::repair::{change, refcounts};
use super::report::Findings;
use super::survey::Survey;
use super::window::{Counter, Window};
use super::{CheckOptions, Subject};

/// Writes a refcount table and blocks for all of the file, and moves the header to them.
pub(super) fn rebuild(host: &Host, header: &mut Header, options: &CheckOptions) -> Result<()> {
    let order = header.refcount_order;
    rebuild_as(host, header, order, options, &|_| Ok(()))
}

/// Makes refcounts `1 << order` bits wide. References that they could not count are an error.
pub(crate) fn change_refcount_width(host: &Host, header: &mut Header, order: u32) -> Result<()> {
    let most = u64::MAX >> (64 - (1 << order));
    rebuild_as(host, header, order, &CheckOptions::default(), &|window| {
        for (first, counters) in window.units() {
            let references = |counter: &Counter| u64::from(counter.references());
            if let Some(index) = counters.iter().position(|c| references(c) > most) {
                return Err(Error::Change {
                    file: host.path.clone(),
                    reason: format!(
                        "cluster {} has more references than refcounts of {} bits can say",
                        first + index as u64,
                        1 << order
                    ),
                });
            }
        }
        Ok(())
    })
}

fn rebuild_as(
    host: &Host,
    header: &mut Header,
    order: u32,
    options: &CheckOptions,
    allow: &dyn Fn(&mut Window) -> Result<()>,
) -> Result<()> {
    let old_len = host.len()?;
    let mut next = header.clone();
    next.refcount_order = order;
    let written = write(host, &mut next, options, allow);
    if let Err(error) = written {
        if let Err(error) = host.set_len(old_len) {
            tracing::debug!(%error, "what a rebuild began stays at the file's end");
        }
        return Err(error);
    }
    change(host, header, |header| {
        header.refcount_table_offset = next.refcount_table_offset;
        header.refcount_table_clusters = next.refcount_table_clusters;
        header.refcount_order = order;
    })
}

/// Writes the new structures, and says in `next` where they are.
fn write(
    host: &Host,
    next: &mut Header,
    options: &CheckOptions,
    allow: &dyn Fn(&mut Window) -> Result<()>,
) -> Result<()> {
    let geometry = next.geometry;
    let cluster = geometry.cluster();
    let (start, table, blocks) = {
        let subject = Subject::new(host, next, options)?;
        let start = subject.clusters();
        let (table, blocks) = layout(&subject, start)?;
        (start, table, blocks)
    };
    next.refcount_table_offset = start * cluster;
    next.refcount_table_clusters = table;
    host.set_len((start + table + blocks) * cluster)?;
    let places: Vec<u64> = (0..blocks)
        .map(|index| (start + table + index) * cluster)
        .collect();
    let bytes: Vec<u8> = places
        .iter()
        .flat_map(|place| place.to_be_bytes())
        .collect();
    host.write(next.refcount_table_offset, &bytes)?;
    // As the file will be: refcounts of zero everywhere, to be raised.
    let subject = Subject::new(host, next, options)?;
    let mut findings = Findings::new(&subject);
    let mut survey = Survey::read(&subject, &mut findings)?;
    if !survey.empty_blocks.is_empty() {
        // They are holes because nothing has been counted yet. Those that stay so are not looked at.
        let mut count = Count::new(&subject, &survey);
        count.run(&mut findings, &mut |_| Ok(()))?;
        let missing = count.missing;
        survey.fill_holes(&missing, &places);
    }
    // The header's own cluster is counted: something is written, and synced with the table.
    let mut count = Count::new(&subject, &survey);
    count.run(&mut findings, &mut |window| {
        allow(window)?;
        refcounts(&subject, &survey, window, &|counter| counter.references())
    })?;
    match count.uncounted {
        true => Err(Error::Corrupt {
            file: host.path.clone(),
            reason: "new refcounts would not count all that it refers to".into(),
        }),
        false => Ok(()),
    }
}

/// Clusters of a table and of blocks that count everything, themselves too, from `start` on.
fn layout(subject: &Subject<'_>, start: u64) -> Result<(u64, u64)> {
    let geometry = subject.header.geometry;
    let (mut table, mut blocks) = (1, 1);
    loop {
        let clusters = start.saturating_add(table).saturating_add(blocks);
        let needed = clusters.div_ceil(subject.per_block());
        let needed_table = needed.div_ceil(geometry.table_entries());
        if needed_table * geometry.cluster() > MAX_REFCOUNT_TABLE_BYTES {
            let feature = format!("{clusters} clusters, more than a refcount table can count");
            return Err(subject.unsupported(feature, "copy it with `cowshed img convert`"));
        }
        if needed <= blocks && needed_table <= table {
            return Ok((table, blocks));
        }
        (table, blocks) = (needed_table.max(table), needed.max(blocks));
    }
}
