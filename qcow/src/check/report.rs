//! What a check found.

use crate::error::Violation;

use super::Subject;

/// What is wrong with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Problem {
    /// A cluster's refcount is lower than its references are many: it may be overwritten or freed
    /// while it is in use.
    Refcount,
    /// A cluster's refcount is higher than its references are many: its bytes are lost to the
    /// image, and nothing else.
    Leak,
    /// The flag COPIED does not say whether the refcount is one.
    Copied,
    /// A cluster of metadata that something else claims too.
    Overlap,
    /// An entry with reserved bits set, an unaligned offset, or flags that contradict each other.
    Entry,
    /// Something past the end of the file.
    PastEnd,
    /// A refcount table or block that cannot be what it is said to be.
    RefcountStructure,
    /// A snapshot whose tables cannot be walked, or one that does not say the sizes that version 3
    /// demands.
    Snapshot,
    /// A bitmap whose tables cannot be walked, that does not fit the disk, or is of a kind that the
    /// format does not have.
    Bitmap,
    /// Features in the header that contradict each other.
    Features,
}

/// One thing that a check found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct Finding {
    /// Its kind.
    pub problem: Problem,
    /// Field, offset in the file, value and expectation.
    pub what: Violation,
}

/// What a check found, and counted on the way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Findings but leaks: what may lose data, now or with the next write.
    pub corruptions: u64,
    /// Clusters with refcounts that are too high: lost room.
    pub leaks: u64,
    /// Corruptions that a repair removed.
    pub corruptions_fixed: u64,
    /// Leaks that a repair removed.
    pub leaks_fixed: u64,
    /// Where the last cluster in use ends, in bytes.
    pub image_end_offset: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Those of them that have a place in the file.
    pub allocated_clusters: u64,
    /// Those that do not follow the one before in the file.
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
    /// The first findings, at most [`CheckOptions::max_findings`](super::CheckOptions::max_findings).
    pub findings: Vec<Finding>,
}

impl CheckReport {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0
    }
}

/// Where findings go: all are counted, the first are kept.
pub(super) struct Findings {
    pub(super) report: CheckReport,
    /// How many are kept.
    most: usize,
}

impl Findings {
    pub(super) fn new(subject: &Subject<'_>) -> Self {
        let header = subject.header;
        Findings {
            report: CheckReport {
                total_clusters: header.geometry.clusters(header.size),
                ..CheckReport::default()
            },
            most: subject.options.max_findings,
        }
    }

    pub(super) fn add(&mut self, problem: Problem, what: impl FnOnce() -> Violation) {
        if problem == Problem::Leak {
            self.report.leaks += 1;
        } else {
            self.report.corruptions += 1;
        }
        if self.report.findings.len() < self.most {
            let what = what();
            self.report.findings.push(Finding { problem, what });
        }
    }
}
