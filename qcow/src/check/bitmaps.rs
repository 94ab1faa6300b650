//! The bitmap directory, as far as a check needs it.

use crate::addr::{be32, be64};
use crate::error::{Result, Violation};
use crate::extension::BITMAPS;

use super::Subject;
use super::report::{Findings, Problem};
use super::survey::{Survey, entry_violation, for_each_entry};

/// Bit 0 of the autoclear features: the bitmaps are as the extension says. Without it they are
/// nothing, and their clusters are leaks.
const CONSISTENT: u64 = 1;
/// Most bitmaps and most bytes of their directory, which are QEMU's limits.
const MAX_BITMAPS: u32 = 65535;
const MAX_DIRECTORY: u64 = 64 << 20;
/// Bytes of a directory entry before extra data and name.
const FIXED: usize = 24;

/// Bits of a table entry that are no offset, and the one of them that may be set without one.
const RESERVED: u64 = 0xff00_0000_0000_01fe;
const ALL_ONES: u64 = 1;

impl Survey {
    /// Adds the directory and the tables of the bitmaps.
    pub(super) fn bitmaps(&mut self, subject: &Subject<'_>, findings: &mut Findings) -> Result<()> {
        let header = subject.header;
        let Some(extension) = header.extensions.get(BITMAPS) else {
            return Ok(());
        };
        if header.autoclear & CONSISTENT == 0 {
            return Ok(());
        }
        let (count, len, start) = (be32(extension, 0), be64(extension, 8), be64(extension, 16));
        let directory = if count > MAX_BITMAPS
            || len > MAX_DIRECTORY
            || header.geometry.within(start) != 0
        {
            Err((
                Problem::Bitmap,
                format!("at most {MAX_BITMAPS} bitmaps and {MAX_DIRECTORY} bytes, at a cluster"),
            ))
        } else if !subject.has(start, len) {
            Err((Problem::PastEnd, subject.inside()))
        } else {
            Ok(())
        };
        if let Err((problem, expected)) = directory {
            self.incomplete = true;
            findings.add(problem, || {
                let value = format!("{count} bitmaps in {len} bytes");
                Violation::new("bitmap directory", start, value, expected)
            });
            return Ok(());
        }
        self.span("bitmap directory", start, len);
        let mut bytes = vec![0; len as usize];
        subject.host.read(start, &mut bytes)?;
        let mut at = 0;
        for _ in 0..count {
            let entry = bytes.get(at..).unwrap_or_default();
            let (name, extra) = (be32(entry, 16) & 0xffff, be32(entry, 20));
            let len = FIXED + name as usize + extra as usize;
            if entry.len() < len {
                self.incomplete = true;
                findings.add(Problem::Bitmap, || {
                    let expected = format!("at most {}, where the directory ends", entry.len());
                    Violation::new(
                        "bitmap directory entry's length",
                        start + at as u64,
                        len,
                        expected,
                    )
                });
                return Ok(());
            }
            self.bitmap_table(
                subject,
                findings,
                start + at as u64,
                be64(entry, 0),
                be32(entry, 8).into(),
            );
            at += len.next_multiple_of(8);
        }
        Ok(())
    }

    fn bitmap_table(
        &mut self,
        subject: &Subject<'_>,
        findings: &mut Findings,
        at: u64,
        offset: u64,
        entries: u64,
    ) {
        let len = entries * 8;
        let (problem, expected) = if subject.header.geometry.within(offset) != 0 {
            (Problem::Bitmap, "a table at a cluster".into())
        } else if len > 0 && !subject.has(offset, len) {
            (Problem::PastEnd, subject.inside())
        } else {
            self.span("bitmap table", offset, len);
            self.bitmap_tables.push((offset, entries));
            return;
        };
        self.incomplete = true;
        findings.add(problem, || {
            let value = format!("{offset:#x} with {len} bytes");
            Violation::new("bitmap table", at, value, expected)
        });
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
