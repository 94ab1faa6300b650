//! The clusters of persistent bitmaps.

use crate::bitmap::directory::Directory;
use crate::error::{Error, Result, Violation};

use super::Subject;
use super::report::{Findings, Problem};
use super::survey::{Survey, entry_violation, for_each_entry};

/// Bits of a table entry that are no offset, and the one of them that may be set without one.
const RESERVED: u64 = 0xff00_0000_0000_01fe;
const ALL_ONES: u64 = 1;

impl Survey {
    /// Adds the directory and the tables of the bitmaps, if they are valid; otherwise they are
    /// nothing, and their clusters are leaks.
    pub(super) fn bitmaps(&mut self, subject: &Subject<'_>, findings: &mut Findings) -> Result<()> {
        match Directory::load(subject.host, subject.header, subject.file_len) {
            Ok(directory) => {
                self.span("bitmap directory", directory.offset, directory.len);
                for entry in &directory.entries {
                    let entries = u64::from(entry.parts);
                    self.span("bitmap table", entry.table, entries * 8);
                    let (size, geometry) = (subject.header.size, subject.header.geometry);
                    if let Some(reason) = entry.fault(size, geometry) {
                        findings.add(Problem::Bitmap, || {
                            let expected = "one that fits the format and the disk";
                            Violation::new("bitmap", entry.at, format!("wrong: {reason}"), expected)
                        });
                    }
                    self.bitmap_tables.push((entry.table, entries));
                }
                Ok(())
            }
            Err(Error::Invalid { source, .. }) => {
                self.incomplete = true;
                findings.add(Problem::Bitmap, || source);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Visits the clusters of all bitmaps' data; what is wrong with an entry is a finding the
    /// first time.
    pub(super) fn for_each_bitmap_cluster(
        &self,
        subject: &Subject<'_>,
        findings: &mut Findings,
        first: bool,
        visit: &mut dyn FnMut(&mut Findings, u64),
    ) -> Result<()> {
        let geometry = subject.header.geometry;
        for &(offset, entries) in &self.bitmap_tables {
            for_each_entry(subject, offset, entries, &mut |_, at, value| {
                let data = value & !(RESERVED | ALL_ONES);
                let problem = if value & RESERVED != 0 || data != 0 && value & ALL_ONES != 0 {
                    Some((Problem::Entry, "no reserved bit".into()))
                } else if geometry.within(data) != 0 {
                    Some((
                        Problem::Entry,
                        format!("a multiple of {}", geometry.cluster()),
                    ))
                } else if data != 0 && !subject.has(data, 1) {
                    Some((Problem::PastEnd, subject.inside()))
                } else {
                    None
                };
                match problem {
                    Some((problem, expected)) if first => {
                        findings.add(problem, || {
                            entry_violation("bitmap table entry", at, value, expected)
                        });
                    }
                    None if data != 0 => visit(findings, geometry.index(data)),
                    _ => {}
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}
