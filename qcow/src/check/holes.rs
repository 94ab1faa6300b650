//! Tables in holes of the file: they are zeros, and are not read. So a file that names more tables
//! than it has bytes takes no longer than its bytes do.

use std::ops::Range;

use crate::error::Result;
use crate::host::Host;

use super::Subject;
use super::survey::{L2Table, Survey};

/// Tables are read in pieces of this many bytes.
const PIECE: u64 = 1 << 20;

/// Walks along the file from one run of data to the next.
struct Data<'a> {
    host: &'a Host,
    run: Range<u64>,
}

impl Data<'_> {
    /// Whether any byte of a range is no hole. Ranges come in the order of the file.
    fn is_in(&mut self, offset: u64, len: u64) -> Result<bool> {
        if self.run.end <= offset {
            let next = self.host.next_data(offset)?;
            self.run = next.unwrap_or(u64::MAX..u64::MAX);
        }
        Ok(self.run.start < offset.saturating_add(len))
    }
}

impl Survey {
    /// Where there is data; everywhere in a file that has as many bytes as its tables need: in an
    /// ordinary one holes are not looked for.
    fn data<'a>(&self, subject: &'a Subject<'_>) -> Data<'a> {
        let run = if self.sparse { 0..0 } else { 0..u64::MAX };
        let host = subject.host;
        Data { host, run }
    }

    /// Sets the refcount blocks apart that lie in holes.
    pub(super) fn find_holes(&mut self, subject: &Subject<'_>) -> Result<()> {
        let cluster = subject.header.geometry.cluster();
        let named = self.blocks.iter().filter(|block| **block != 0);
        let mut blocks: Vec<u64> = named.copied().collect();
        let tables = (self.tables.len() + blocks.len()) as u64;
        self.sparse = tables.saturating_mul(cluster) > subject.host.allocated()?;
        if !self.sparse {
            return Ok(());
        }
        blocks.sort_unstable();
        let mut data = self.data(subject);
        for block in blocks {
            if !data.is_in(block, cluster)? {
                self.empty_blocks.push(block);
            }
        }
        let empty = &self.empty_blocks;
        for block in &mut self.blocks {
            if empty.binary_search(block).is_ok() {
                *block = 0;
            }
        }
        Ok(())
    }

    /// Reads the L2 tables in the order of the file, adjacent ones at once.
    pub(super) fn for_each_table(
        &self,
        subject: &Subject<'_>,
        mut visit: impl FnMut(&L2Table, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let size = subject.header.geometry.cluster();
        let most = if self.sparse {
            1
        } else {
            (PIECE / size).max(1)
        };
        let mut data = self.data(subject);
        let mut bytes = Vec::new();
        let follows = |a: &L2Table, b: &L2Table| a.offset.checked_add(size) == Some(b.offset);
        for run in self.tables.chunk_by(follows) {
            for part in run.chunks(most as usize) {
                let (offset, len) = (part.first().map_or(0, |table| table.offset), part.len());
                if !data.is_in(offset, len as u64 * size)? {
                    continue;
                }
                bytes.resize(len * size as usize, 0);
                subject.host.read(offset, &mut bytes)?;
                for (table, bytes) in part.iter().zip(bytes.chunks_exact(size as usize)) {
                    visit(table, bytes)?;
                }
            }
        }
        Ok(())
    }
}
