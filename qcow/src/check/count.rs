//! Counting references, window by window, and holding refcounts and flags against them.

use std::collections::BTreeSet;

use crate::entry::{self, COPIED, Compressed, Entry, Mapping, Standard};
use crate::error::{Result, Violation};
use crate::refcount;

use super::Subject;
use super::report::{Findings, Problem};
use super::survey::{L2Table, Survey, entry_violation, for_each_entry};
use super::window::{Counter, Place, Window};

/// Most runs that are noted as overlapping: a bound on memory.
const MAX_OVERLAPPING: usize = 1 << 16;
/// Entries of an L2 table whose counters are fetched together.
const AHEAD: usize = 64;

/// Counts the references to the clusters of one window after the other.
pub(super) struct Count<'a> {
    subject: &'a Subject<'a>,
    survey: &'a Survey,
    window: Window,
    /// All units that have a refcount block, ascending.
    units: Vec<u64>,
    /// Units in a window.
    per_window: usize,
    /// The first window: what does not depend on counters is checked there.
    first: bool,
    /// A cluster is referred to that no refcount block counts.
    pub(super) uncounted: bool,
    /// Which blocks would count them, of those that the table has room for.
    pub(super) missing: BTreeSet<usize>,
    /// Two tables share a cluster, neither of which counts references.
    pub(super) tables_overlap: bool,
    /// A refcount block or the refcount table lies where another table is.
    pub(super) refcounts_overlap: bool,
    /// What L2 entries name as data and has a table in it: first cluster and the one behind the
    /// last. At most [`MAX_OVERLAPPING`].
    pub(super) overlapping: BTreeSet<(u64, u64)>,
    /// The highest cluster that has a refcount or a reference.
    highest: u64,
}

impl<'a> Count<'a> {
    pub(super) fn new(subject: &'a Subject<'a>, survey: &'a Survey) -> Self {
        let most = (subject.options.counter_bytes / size_of::<Counter>()).max(1);
        let unit_bits = subject.per_block().ilog2().min(most.ilog2());
        let parts = subject.per_block() >> unit_bits;
        let in_file = subject.clusters().div_ceil(1 << unit_bits);
        let blocks = survey
            .blocks
            .iter()
            .zip(0_u64..)
            .filter(|(block, _)| **block != 0);
        let units: Vec<u64> = blocks
            .flat_map(|(_, index)| index * parts..(index + 1) * parts)
            .take_while(|&unit| unit < in_file)
            .collect();
        let all = in_file.min(survey.blocks.len() as u64 * parts);
        Count {
            subject,
            survey,
            window: Window::new(unit_bits, all, &units),
            units,
            per_window: (most >> unit_bits).max(1),
            first: true,
            uncounted: false,
            missing: BTreeSet::new(),
            tables_overlap: false,
            refcounts_overlap: false,
            overlapping: BTreeSet::new(),
            highest: 0,
        }
    }

    /// Counts all of it, a window at a time, each of which `visit` sees when it is complete.
    pub(super) fn run(
        &mut self,
        findings: &mut Findings,
        visit: &mut dyn FnMut(&mut Window) -> Result<()>,
    ) -> Result<()> {
        let units = std::mem::take(&mut self.units);
        // Without any block there is still everything to look at.
        let windows = units
            .chunks(self.per_window)
            .chain(units.is_empty().then_some(&[][..]));
        for units in windows {
            self.window.move_to(units);
            self.load()?;
            self.metadata(findings)?;
            self.l1_flags(findings)?;
            self.l2_tables(findings)?;
            self.compare(findings);
            visit(&mut self.window)?;
            self.first = false;
        }
        self.units = units;
        findings.report.image_end_offset =
            (self.highest + 1) * self.subject.header.geometry.cluster();
        Ok(())
    }

    /// Reads the window's refcounts.
    fn load(&mut self) -> Result<()> {
        let order = self.subject.header.refcount_order;
        for (first, counters) in self.window.units() {
            let mut block = vec![0; ((counters.len() as u64) << order).div_ceil(8) as usize];
            self.subject
                .host
                .read(self.survey.refcount_place(self.subject, first), &mut block)?;
            for (index, counter) in counters.iter_mut().enumerate() {
                let stored = refcount::get(&block, index as u64, order);
                counter.stored = u32::try_from(stored).unwrap_or(u32::MAX);
            }
        }
        Ok(())
    }

    /// Counts the clusters of tables, each of which has one place and one owner. Refcount
    /// structures come last: where they overlap something, it is they that move.
    fn metadata(&mut self, findings: &mut Findings) -> Result<()> {
        let (survey, cluster) = (self.survey, self.subject.header.geometry.cluster());
        for span in &survey.spans {
            self.tables_overlap |= self.table(findings, span.what, span.offset, span.len, 1);
        }
        for table in &survey.tables {
            self.tables_overlap |= self.table(
                findings,
                "L2 table",
                table.offset,
                cluster,
                table.references,
            );
        }
        self.bitmaps(findings)?;
        if let Some(span) = &survey.refcount_table {
            self.refcounts_overlap |= self.table(findings, span.what, span.offset, span.len, 1);
        }
        let blocks = survey.blocks.iter().filter(|block| **block != 0);
        for &block in blocks.chain(&survey.empty_blocks) {
            self.refcounts_overlap |= self.table(findings, "refcount block", block, cluster, 1);
        }
        Ok(())
    }

    /// Counts a table, and says whether it overlaps another one.
    fn table(
        &mut self,
        findings: &mut Findings,
        what: &str,
        offset: u64,
        len: u64,
        references: u32,
    ) -> bool {
        let geometry = self.subject.header.geometry;
        let mut overlaps = false;
        for cluster in geometry.span(offset, len) {
            let Place::Here(counter) = self.refer(findings, cluster, references) else {
                continue;
            };
            if counter.is_metadata() {
                overlaps = true;
                let at = cluster * geometry.cluster();
                findings.add(Problem::Overlap, || {
                    Violation::new(
                        what,
                        offset,
                        format!("in the cluster at {at:#x}"),
                        "no other table there",
                    )
                });
            }
            counter.mark();
        }
        overlaps
    }

    /// Adds references to a cluster.
    fn refer(&mut self, findings: &mut Findings, cluster: u64, references: u32) -> Place<'_> {
        match self.window.at(cluster) {
            Place::Here(counter) => counter.add(references),
            Place::Nowhere if self.first => {
                self.uncounted = true;
                let block = (cluster / self.subject.per_block()) as usize;
                if block < self.survey.blocks.len() {
                    self.missing.insert(block);
                }
                self.highest = self.highest.max(cluster);
                let at = cluster * self.subject.header.geometry.cluster();
                findings.add(Problem::Refcount, || refcount_violation(at, 0, references));
            }
            Place::Elsewhere | Place::Nowhere => {}
        }
        self.window.at(cluster)
    }

    /// The refcount in the file of a cluster of this window, or of one that has none, once.
    fn stored(&mut self, cluster: u64) -> Option<u32> {
        match self.window.at(cluster) {
            Place::Here(counter) => Some(counter.stored),
            Place::Nowhere if self.first => Some(0),
            Place::Elsewhere | Place::Nowhere => None,
        }
    }

    /// COPIED in the active L1 table says whether an L2 table's refcount is one.
    fn l1_flags(&mut self, findings: &mut Findings) -> Result<()> {
        let subject = self.subject;
        let (geometry, header) = (subject.header.geometry, subject.header);
        for_each_entry(
            subject,
            header.l1_offset,
            header.l1_entries as u64,
            &mut |_, at, value| {
                let table = value & entry::OFFSET;
                if table != 0
                    && let Some(stored) = self.stored(geometry.index(table))
                {
                    check_copied(findings, "L1 entry", at, value, stored);
                }
                Ok(())
            },
        )
    }

    fn bitmaps(&mut self, findings: &mut Findings) -> Result<()> {
        let (subject, survey) = (self.subject, self.survey);
        let first = self.first;
        survey.for_each_bitmap_cluster(subject, findings, first, &mut |findings, cluster| {
            let at = cluster * subject.header.geometry.cluster();
            self.tables_overlap |= self.table(findings, "bitmap", at, 1, 1);
        })
    }

    fn l2_tables(&mut self, findings: &mut Findings) -> Result<()> {
        let (subject, survey) = (self.subject, self.survey);
        survey.for_each_table(subject, |table, bytes| {
            self.l2_table(findings, table, bytes);
            Ok(())
        })
    }

    fn l2_table(&mut self, findings: &mut Findings, table: &L2Table, all: &[u8]) {
        let (header, geometry) = (self.subject.header, self.subject.header.geometry);
        let active = table.is_active();
        let entry_bytes = geometry.l2_entry() as usize;
        let mut next = None;
        for (index, bytes) in all.chunks_exact(entry_bytes).enumerate() {
            if index % AHEAD == 0 {
                let ahead = all[index * entry_bytes..].chunks_exact(entry_bytes);
                let offsets = ahead
                    .take(AHEAD)
                    .map(|b| Entry::read(b).descriptor & entry::OFFSET);
                self.window
                    .fetch(offsets.map(|offset| geometry.index(offset)));
            }
            let entry = Entry::read(bytes);
            let value = entry.descriptor;
            if value == 0 && entry.bitmap == 0 {
                continue;
            }
            let at = table.offset + (index * entry_bytes) as u64;
            let external = header.data_file().is_some();
            let mapping = if external {
                let cluster = table.first_cluster(geometry) + index as u64;
                Mapping::decode_external(entry, cluster * geometry.cluster(), geometry)
            } else {
                Mapping::decode(entry, header.version, geometry)
            };
            if self.first {
                self.entry(findings, at, entry, &mapping);
                if active {
                    tally(findings, &mapping, geometry.cluster(), &mut next);
                }
            }
            let (offset, len) = match mapping {
                // A data file's clusters are not counted: each has one reference.
                Ok(Mapping::Standard(Standard { host: Some(_), .. })) if external => {
                    if self.first {
                        check_copied(findings, "L2 entry", at, value, 1);
                    }
                    continue;
                }
                _ if external => continue,
                Ok(Mapping::Standard(Standard { host: None, .. })) => continue,
                Ok(Mapping::Standard(Standard {
                    host: Some(host), ..
                })) => (host, geometry.cluster()),
                Ok(Mapping::Compressed(Compressed { offset, len })) => (offset, len),
                // Whatever its other bits may mean, this is in use.
                Err(_) if value & entry::OFFSET == 0 => continue,
                Err(_) => (value & entry::OFFSET, geometry.cluster()),
            };
            if !self.subject.has(offset, len) {
                continue;
            }
            let flagged = matches!(mapping, Ok(Mapping::Standard(_)));
            let clusters = geometry.span(offset, len);
            for cluster in clusters.clone() {
                let place = self.refer(findings, cluster, table.references);
                if !matches!(place, Place::Here(counter) if counter.is_metadata()) {
                    continue;
                }
                let expected = "a cluster that holds no table";
                findings.add(Problem::Overlap, || {
                    entry_violation("L2 entry", at, value, expected.into())
                });
                if mapping.is_ok() && self.overlapping.len() < MAX_OVERLAPPING {
                    self.overlapping.insert((clusters.start, clusters.end));
                }
            }
            if active
                && flagged
                && let Some(stored) = self.stored(geometry.index(offset))
            {
                check_copied(findings, "L2 entry", at, value, stored);
            }
        }
    }

    /// Checks what an entry says, whatever the refcounts are.
    fn entry(
        &self,
        findings: &mut Findings,
        at: u64,
        entry: Entry,
        mapping: &Result<Mapping, String>,
    ) {
        let wrong = |expected: &str| Violation::new("L2 entry", at, entry, expected);
        let cluster = self.subject.header.geometry.cluster();
        let range = match mapping {
            Err(expected) => {
                findings.add(Problem::Entry, || wrong(expected));
                return;
            }
            Ok(Mapping::Standard(_)) if self.subject.header.data_file().is_some() => return,
            Ok(Mapping::Standard(Standard { host: None, .. })) => return,
            Ok(Mapping::Standard(Standard {
                host: Some(host), ..
            })) => (*host, cluster),
            Ok(Mapping::Compressed(Compressed { offset, len })) => {
                if entry.descriptor & COPIED != 0 {
                    let expected = "COPIED never set for a compressed cluster";
                    findings.add(Problem::Copied, || wrong(expected));
                }
                if entry.bitmap != 0 {
                    findings.add(Problem::Entry, || wrong("no subclusters if compressed"));
                }
                (*offset, *len)
            }
        };
        if !self.subject.has(range.0, range.1) {
            findings.add(Problem::PastEnd, || wrong(&self.subject.inside()));
        }
    }

    /// Holds the window's refcounts against its references.
    fn compare(&mut self, findings: &mut Findings) {
        let (clusters, bytes) = (
            self.subject.clusters(),
            self.subject.header.geometry.cluster(),
        );
        for (first, counters) in self.window.units() {
            let inside = (clusters - first).min(counters.len() as u64) as usize;
            for (counter, cluster) in counters.iter().take(inside).zip(first..) {
                let (stored, references) = (counter.stored, counter.references());
                if stored > 0 || references > 0 {
                    self.highest = self.highest.max(cluster);
                }
                let problem = match stored.cmp(&references) {
                    std::cmp::Ordering::Equal => continue,
                    std::cmp::Ordering::Less => Problem::Refcount,
                    std::cmp::Ordering::Greater => Problem::Leak,
                };
                findings.add(problem, || {
                    refcount_violation(cluster * bytes, stored, references)
                });
            }
        }
    }
}

/// Counts what the disk has in its active tree.
fn tally(
    findings: &mut Findings,
    mapping: &Result<Mapping, String>,
    cluster: u64,
    next: &mut Option<u64>,
) {
    let report = &mut findings.report;
    match mapping {
        Ok(Mapping::Compressed(_)) => {
            report.allocated_clusters += 1;
            report.compressed_clusters += 1;
            // Compressed clusters are fragments by nature.
            report.fragmented_clusters += 1;
        }
        Ok(Mapping::Standard(Standard {
            host: Some(host), ..
        })) => {
            report.allocated_clusters += 1;
            report.fragmented_clusters += u64::from(next.is_some_and(|next| next != *host));
            *next = host.checked_add(cluster);
        }
        _ => {}
    }
}

fn check_copied(findings: &mut Findings, field: &str, at: u64, value: u64, stored: u32) {
    if (value & COPIED != 0) != (stored == 1) {
        let is = if stored == 1 { "set" } else { "clear" };
        let expected = format!("COPIED {is} beside the refcount {stored}");
        findings.add(Problem::Copied, || {
            entry_violation(field, at, value, expected)
        });
    }
}

fn refcount_violation(at: u64, stored: u32, references: u32) -> Violation {
    Violation::new(
        "refcount of the cluster",
        at,
        stored,
        format!("{references}, its references"),
    )
}
