//! How a range of the disk can be written, going by what its entries say.

use std::ops::Range;

use crate::entry::{Mapping, Standard};
use crate::error::Result;
use crate::qcow2::{Qcow2, Tables};

/// How some subclusters of a guest cluster can be written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// All of them are allocated, in a cluster that nothing else refers to.
    InPlace(u64),
    /// The cluster has a place of its own, where they are to be allocated.
    Own(u64),
    Allocate,
}

pub(crate) fn way(mapping: Mapping, touched: u32) -> Way {
    match mapping {
        Mapping::Standard(Standard {
            host: Some(host),
            copied: true,
            alloc,
            ..
        }) => {
            if alloc & touched == touched {
                Way::InPlace(host)
            } else {
                Way::Own(host)
            }
        }
        _ => Way::Allocate,
    }
}

/// The clusters at the ends of a run, as they are before it is written.
pub(crate) struct Ends {
    first: Mapping,
    last: Mapping,
}

impl Qcow2 {
    /// How the first cluster can be written, and for how many bytes that holds: host clusters
    /// that are used as they are must follow each other.
    pub(crate) fn first_run(
        &self,
        tables: &mut Tables,
        at: u64,
        len: u64,
    ) -> Result<(Way, u64, Ends)> {
        let mut first: Option<Way> = None;
        let mut ends = Ends {
            first: Mapping::NONE,
            last: Mapping::NONE,
        };
        let mut covered = 0;
        let from = self.geometry.floor(at);
        self.mappings(tables, at, len, &mut |_, part, mapping| {
            let begin = at + covered;
            let distance = self.geometry.floor(begin) - from;
            let expected = match first {
                Some(Way::InPlace(host)) => Some(Way::InPlace(host + distance)),
                Some(Way::Own(host)) => Some(Way::Own(host + distance)),
                other => other,
            };
            let cluster = self.geometry.index(begin);
            let found = way(
                mapping,
                self.geometry.touched(&(begin..begin + part), cluster),
            );
            if expected.is_some_and(|expected| expected != found) {
                return false;
            }
            if first.is_none() {
                first = Some(found);
                ends.first = mapping;
            }
            ends.last = mapping;
            covered += part;
            true
        })?;
        Ok((first.unwrap_or(Way::Allocate), covered, ends))
    }

    /// Whether `bytes` of one cluster can be written with nothing else coming along.
    pub(crate) fn is_whole(&self, bytes: Range<u64>, mapping: Mapping) -> bool {
        let ends = Ends {
            first: mapping,
            last: mapping,
        };
        self.touch(bytes.clone(), &ends) == bytes
    }

    /// What must be in the host clusters when `bytes` are written. A subcluster that has no bytes
    /// there yet comes whole; a cluster that leaves its old place takes all of them along.
    pub(crate) fn touch(&self, bytes: Range<u64>, ends: &Ends) -> Range<u64> {
        let geometry = self.geometry;
        let alone = |at: u64, mapping| match mapping {
            Mapping::Standard(Standard {
                host,
                copied,
                alloc,
                ..
            }) => {
                let own = copied && host.is_some();
                let there = own && alloc & geometry.touched(&(at..at + 1), geometry.index(at)) != 0;
                match (there, own || alloc == 0) {
                    (true, _) => at..at + 1,
                    (_, true) => geometry.subclusters(at..at + 1),
                    _ => geometry.floor(at)..geometry.floor(at) + geometry.cluster(),
                }
            }
            Mapping::Compressed(_) => geometry.floor(at)..geometry.floor(at) + geometry.cluster(),
        };
        let start = alone(bytes.start, ends.first).start;
        let end = alone(bytes.end - 1, ends.last).end;
        // A data file ends where the disk does.
        if self.data.is_external() {
            start..end.min(self.size()).max(bytes.end)
        } else {
            start..end
        }
    }
}
