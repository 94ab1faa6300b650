//! Checking an image: every reference counted and held against the refcounts, every entry decoded.
//!
//! What may be referred to is found in two steps. A [`Survey`] follows the header to every table:
//! L1 tables of the disk and its snapshots, refcount blocks, bitmaps. L2 tables are noted once,
//! with the number of L1 entries that name them, so that a thousand snapshots that share a table
//! cost no more than one. Then a [`Count`] reads the L2 tables in the order of the file, as often
//! as there are windows of counters: 8 bytes a cluster, 64 MiB in all.
//!
//! Memory is bounded by [`CheckOptions::counter_bytes`], 128 MiB for the L2 tables' places, 8 MiB
//! for the refcount table and 64 MiB for the snapshot table; an image with more is refused, and one
//! with more than 256 MiB of L1, snapshot and bitmap tables. Time is bounded by these and by the bytes
//! that the file has, times the windows: tables in its holes are not read.

mod bitmaps;
mod count;
mod holes;
mod rebuild;
mod relocate;
mod repair;
mod report;
mod sizes;
mod survey;
mod window;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::header::{self, Header};
use crate::host::Host;
use crate::storage::Storage;

use count::Count;
pub(crate) use rebuild::change_refcount_width;
pub(crate) use repair::rebuild_dirty;
pub use repair::{Repair, repair};
use report::Findings;
pub use report::{CheckReport, Finding, Problem};
pub(crate) use survey::L2Table;
use survey::Survey;

/// How to check an image.
#[derive(Clone, Debug)]
pub struct CheckOptions {
    /// Findings that are kept; all are counted.
    pub max_findings: usize,
    /// Bytes of counters, 8 a cluster. An image with more clusters has its L2 tables read as often
    /// as it takes.
    pub counter_bytes: usize,
}

impl Default for CheckOptions {
    fn default() -> Self {
        CheckOptions {
            max_findings: 1000,
            counter_bytes: 64 << 20,
        }
    }
}

/// Checks the image in `storage`, known as `path` in messages. Nothing is written. An error says
/// that the image cannot be checked: it cannot be read, its header or snapshot table is wrong, or
/// it is larger than the bounds; what is wrong elsewhere is a [`Finding`].
pub fn check(
    path: &Path,
    storage: Arc<dyn Storage>,
    options: &CheckOptions,
) -> Result<CheckReport> {
    let host = Host {
        path: path.to_owned(),
        storage,
    };
    let header = header::read_unplaced(&host)?;
    Ok(Examined::read(&host, &header, options)?.report)
}

/// Visits every L2 table of the disk and of its snapshots once, in the order of the file. An image
/// with an L1 table that cannot be followed is refused.
pub(crate) fn for_each_l2_table(
    host: &Host,
    header: &Header,
    visit: impl FnMut(&L2Table, &[u8]) -> Result<()>,
) -> Result<()> {
    let options = CheckOptions::default();
    let subject = Subject::new(host, header, &options)?;
    let mut findings = Findings::new(&subject);
    let survey = Survey::read(&subject, &mut findings)?;
    match findings.report.findings.into_iter().next() {
        Some(finding) => Err(host.invalid(finding.what)),
        None => survey.for_each_table(&subject, visit),
    }
}

/// What a check knows in the end.
struct Examined {
    report: CheckReport,
    survey: Survey,
    /// Of tables that overlap only one can be right, and nothing says which.
    tables_overlap: bool,
    /// The refcount structures cannot be repaired where they are.
    rebuild: bool,
    /// Runs of clusters that L2 entries name as data, and that have a table in them.
    overlapping: BTreeSet<(u64, u64)>,
}

impl Examined {
    fn read(host: &Host, header: &Header, options: &CheckOptions) -> Result<Self> {
        let subject = Subject::new(host, header, options)?;
        let mut findings = Findings::new(&subject);
        let survey = Survey::read(&subject, &mut findings)?;
        let mut count = Count::new(&subject, &survey);
        count.run(&mut findings, &mut |_| Ok(()))?;
        let rebuild = survey.rebuild || count.uncounted || count.refcounts_overlap;
        let tables_overlap = count.tables_overlap;
        let overlapping = count.overlapping;
        Ok(Examined {
            report: findings.report,
            tables_overlap,
            rebuild,
            overlapping,
            survey,
        })
    }
}

/// What is checked.
struct Subject<'a> {
    host: &'a Host,
    header: &'a Header,
    options: &'a CheckOptions,
    file_len: u64,
}

impl<'a> Subject<'a> {
    fn new(host: &'a Host, header: &'a Header, options: &'a CheckOptions) -> Result<Self> {
        let file_len = host.len()?;
        Ok(Subject {
            host,
            header,
            options,
            file_len,
        })
    }

    /// Clusters in the file, the last one perhaps not whole.
    fn clusters(&self) -> u64 {
        self.header.geometry.clusters(self.file_len)
    }

    /// Clusters that a refcount block counts.
    fn per_block(&self) -> u64 {
        (self.header.geometry.cluster() * 8) >> self.header.refcount_order
    }

    /// Whether the file has a run of bytes; its last cluster counts as whole.
    fn has(&self, offset: u64, len: u64) -> bool {
        let geometry = self.header.geometry;
        offset < self.file_len && geometry.span(offset, len).end <= self.clusters()
    }

    /// What is expected where something lies past the end.
    fn inside(&self) -> String {
        format!("a place before the file's end at {:#x}", self.file_len)
    }

    fn unsupported(&self, feature: String, advice: &'static str) -> Error {
        Error::Unsupported {
            file: self.host.path.clone(),
            feature,
            advice,
        }
    }
}
