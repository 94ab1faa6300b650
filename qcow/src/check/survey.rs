//! Where an image's metadata is: every table that the header leads to, but for L2 tables' content.

use crate::addr::{Geometry, be64};
use crate::entry;
use crate::error::{Result, Violation};
use crate::header::{Encryption, RAW_DATA};
use crate::snapshot::table::{SIZES, Table};

use super::Subject;
use super::report::{Findings, Problem};

/// Tables are read in pieces of this many bytes.
const PIECE: u64 = 1 << 20;
/// Most bytes of L1, snapshot and bitmap tables that one image may have.
const MAX_SPANS: u64 = 256 << 20;
/// Most L1 entries that are kept before they are merged, and after it.
const MAX_RAW_TABLES: usize = 8 << 20;
const MAX_TABLES: usize = 6 << 20;

/// A table that lies in clusters of its own.
pub(super) struct Span {
    pub(super) what: &'static str,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// An L2 table, once, however many L1 entries name it.
#[derive(Clone, Copy)]
pub(crate) struct L2Table {
    pub(crate) offset: u64,
    /// L1 entries that name it.
    pub(crate) references: u32,
    /// The lowest index in the active L1 table; with [`INACTIVE`] set, in those of snapshots.
    index: u32,
}

/// Only snapshots use the L2 table. No L1 table has as many entries.
const INACTIVE: u32 = 1 << 31;

impl L2Table {
    /// Whether the disk uses it as it is now.
    pub(crate) fn is_active(&self) -> bool {
        self.index & INACTIVE == 0
    }

    /// The number of the first guest cluster that it maps.
    pub(crate) fn first_cluster(&self, geometry: Geometry) -> u64 {
        u64::from(self.index & !INACTIVE) * geometry.l2_entries()
    }
}

/// What the header leads to.
#[derive(Default)]
pub(super) struct Survey {
    /// All metadata but the refcount structures and L2 tables.
    pub(super) spans: Vec<Span>,
    /// In the order of the file.
    pub(super) tables: Vec<L2Table>,
    /// `None` if the header does not say where it can be.
    pub(super) refcount_table: Option<Span>,
    /// The refcount table, without the entries that cannot be followed.
    pub(super) blocks: Vec<u64>,
    /// Offsets and entries of the bitmaps' tables.
    pub(super) bitmap_tables: Vec<(u64, u64)>,
    /// The refcount structures cannot be repaired where they are.
    pub(super) rebuild: bool,
    /// Something could not be walked, so that not all references are known.
    pub(super) incomplete: bool,
    /// Blocks that lie in holes, which count nothing: they are not among `blocks`.
    pub(super) empty_blocks: Vec<u64>,
    /// Snapshots that do not say the sizes of their disk and VM state, which is a finding each.
    pub(super) unsized_snapshots: u64,
}

impl Survey {
    /// Reads all of it. What cannot be followed is a finding.
    pub(super) fn read(subject: &Subject<'_>, findings: &mut Findings) -> Result<Self> {
        let header = subject.header;
        let mut survey = Survey::default();
        survey.span("header", 0, header.geometry.cluster());
        if header.autoclear & RAW_DATA != 0 && header.data_file().is_none() {
            findings.add(Problem::Features, || {
                let value = format!("{:#x}", header.autoclear);
                let expected = "no bit 1, which speaks of a data file, where there is none";
                Violation::new("autoclear_features", 88, value, expected)
            });
        }
        survey.l1(
            subject,
            findings,
            header.l1_offset,
            header.l1_entries as u64,
            true,
        )?;
        survey.snapshots(subject, findings)?;
        survey.merge();
        survey.bitmaps(subject, findings)?;
        if let Encryption::Luks { offset, len } = header.encryption {
            survey.span("encryption header", offset, len);
        }
        survey.refcount_table(subject, findings)?;
        survey.check_size(subject)?;
        survey.find_holes(subject)?;
        Ok(survey)
    }

    /// Where the refcounts from a cluster on are in the file; the cluster must have a block.
    pub(super) fn refcount_place(&self, subject: &Subject<'_>, cluster: u64) -> u64 {
        let index = (cluster / subject.per_block()) as usize;
        let bits = (cluster % subject.per_block()) << subject.header.refcount_order;
        self.blocks.get(index).copied().unwrap_or(0) + bits / 8
    }

    pub(super) fn span(&mut self, what: &'static str, offset: u64, len: u64) {
        if len > 0 {
            self.spans.push(Span { what, offset, len });
        }
    }

    fn check_size(&self, subject: &Subject<'_>) -> Result<()> {
        let total = self
            .spans
            .iter()
            .fold(0_u64, |sum, span| sum.saturating_add(span.len));
        if total > MAX_SPANS {
            let feature = format!("{total} bytes of L1, snapshot and bitmap tables");
            return Err(subject.unsupported(feature, "delete some of its internal snapshots"));
        }
        Ok(())
    }

    fn refcount_table(&mut self, subject: &Subject<'_>, findings: &mut Findings) -> Result<()> {
        let (header, geometry) = (subject.header, subject.header.geometry);
        if let Err(violation) = header.check_refcount_table(subject.file_len) {
            self.rebuild = true;
            findings.add(Problem::RefcountStructure, || violation);
            return Ok(());
        }
        let table = header.refcount_table_offset;
        let len = header.refcount_table_clusters * geometry.cluster();
        self.refcount_table = Some(Span {
            what: "refcount table",
            offset: table,
            len,
        });
        let mut bytes = vec![0; len as usize];
        subject.host.read(table, &mut bytes)?;
        let mut seen = Vec::new();
        for (index, value) in bytes
            .chunks_exact(8)
            .map(|entry| be64(entry, 0))
            .enumerate()
        {
            let wrong = match entry::refcount_block(value, geometry) {
                Ok(Some(block)) if !subject.has(block, geometry.cluster()) => {
                    Some((Problem::PastEnd, subject.inside()))
                }
                Ok(block) => {
                    seen.extend(block.map(|block| (block, index)));
                    None
                }
                Err(expected) => Some((Problem::RefcountStructure, expected)),
            };
            if let Some((problem, expected)) = wrong {
                self.rebuild = true;
                let at = table + index as u64 * 8;
                findings.add(problem, || {
                    entry_violation("refcount table entry", at, value, expected)
                });
            }
        }
        self.blocks = vec![0; bytes.len() / 8];
        seen.sort_unstable();
        for pair in seen.chunk_by(|a, b| a.0 == b.0) {
            let [(block, index), twins @ ..] = pair else {
                continue;
            };
            if let Some(entry) = self.blocks.get_mut(*index) {
                *entry = *block;
            }
            for (_, index) in twins {
                self.rebuild = true;
                let at = table + *index as u64 * 8;
                findings.add(Problem::RefcountStructure, || {
                    entry_violation(
                        "refcount table entry",
                        at,
                        *block,
                        "a block that no other entry names".into(),
                    )
                });
            }
        }
        Ok(())
    }

    /// Adds an L1 table and the L2 tables that it names.
    fn l1(
        &mut self,
        subject: &Subject<'_>,
        findings: &mut Findings,
        offset: u64,
        entries: u64,
        active: bool,
    ) -> Result<()> {
        self.span("L1 table", offset, entries * 8);
        self.check_size(subject)?;
        let geometry = subject.header.geometry;
        for_each_entry(subject, offset, entries, &mut |index, at, value| {
            let problem = match entry::l1(value, geometry) {
                // What its other bits may mean, its table is in use.
                _ if value == 0 => return Ok(()),
                Ok(Some((table, _))) if !subject.has(table, geometry.cluster()) => {
                    Some((Problem::PastEnd, subject.inside()))
                }
                Ok(Some(_)) => None,
                Ok(None) => Some((Problem::Copied, "COPIED only beside an L2 table".into())),
                Err(expected) => Some((Problem::Entry, expected)),
            };
            if let Some((problem, expected)) = problem {
                findings.add(problem, || entry_violation("L1 entry", at, value, expected));
            }
            let table = value & entry::OFFSET;
            if geometry.within(table) != 0 || !subject.has(table, geometry.cluster()) {
                self.incomplete = true;
            } else if table != 0 {
                let index = index as u32 | if active { 0 } else { INACTIVE };
                self.tables.push(L2Table {
                    offset: table,
                    references: 1,
                    index,
                });
            }
            if self.tables.len() < MAX_RAW_TABLES {
                return Ok(());
            }
            self.merge();
            if self.tables.len() > MAX_TABLES {
                let feature = format!("more than {MAX_TABLES} L2 tables");
                return Err(subject.unsupported(feature, "delete some of its internal snapshots"));
            }
            Ok(())
        })
    }

    /// Counts the L1 entries that name the same L2 table.
    fn merge(&mut self) {
        self.tables
            .sort_unstable_by_key(|table| (table.offset, table.index));
        self.tables.dedup_by(|next, kept| {
            let same = next.offset == kept.offset;
            if same {
                kept.references = kept.references.saturating_add(next.references);
            }
            same
        });
    }

    fn snapshots(&mut self, subject: &Subject<'_>, findings: &mut Findings) -> Result<()> {
        let header = subject.header;
        let snapshots = Table::read_unchecked(subject.host, header, subject.file_len)?;
        self.span("snapshot table", header.snapshots_offset, snapshots.len);
        for (at, snapshot) in snapshots.placed() {
            let extra = snapshot.extra.len();
            if header.version >= 3 && !snapshot.has_sizes() {
                self.unsized_snapshots += 1;
                let expected = format!("at least {SIZES} in version 3");
                findings.add(Problem::Snapshot, || {
                    Violation::new("extra_data_size of a snapshot", at + 36, extra, expected)
                });
            }
            if let Err(violation) = snapshot.check(at, header.geometry, subject.file_len) {
                self.incomplete = true;
                findings.add(Problem::Snapshot, || violation);
                continue;
            }
            let (offset, entries) = (snapshot.l1_offset, snapshot.l1_entries as u64);
            // Where there is nothing to walk it does no harm to who opens the image.
            if header.geometry.within(offset) != 0 {
                findings.add(Problem::Snapshot, || {
                    let expected = format!("a multiple of {}", header.geometry.cluster());
                    let (field, value) = ("l1_table_offset of a snapshot", format!("{offset:#x}"));
                    Violation::new(field, at, value, expected)
                });
            }
            self.l1(subject, findings, offset, entries, false)?;
        }
        Ok(())
    }
}

/// Visits the entries of a table of offsets: index, place in the file, value.
pub(super) fn for_each_entry(
    subject: &Subject<'_>,
    offset: u64,
    entries: u64,
    visit: &mut dyn FnMut(u64, u64, u64) -> Result<()>,
) -> Result<()> {
    let mut bytes = Vec::new();
    let mut index = 0;
    while index < entries {
        let start = offset + index * 8;
        bytes.resize(((entries - index) * 8).min(PIECE) as usize, 0);
        subject.host.read(start, &mut bytes)?;
        for (i, entry) in bytes.chunks_exact(8).enumerate() {
            visit(index + i as u64, start + i as u64 * 8, be64(entry, 0))?;
        }
        index += bytes.len() as u64 / 8;
    }
    Ok(())
}

/// An entry that is wrong, its value as it is in the file.
pub(super) fn entry_violation(field: &str, at: u64, value: u64, expected: String) -> Violation {
    Violation::new(field, at, format!("{value:#018x}"), expected)
}
