//! Tables in holes of the file: they are zeros, and are not read. So a file that names more tables
//! than it has bytes takes no longer than its bytes do.

use std::ops::Range;

use crate::error::Result;
use crate::host::Host;

/// Where a file has data.
pub(crate) struct Data<'a> {
    host: &'a Host,
    /// From here to the run's end it is known: a hole, then the run.
    from: u64,
    run: Range<u64>,
}

impl<'a> Data<'a> {
    /// For who looks at tables of so many bytes in all. In a file that has as many, which is an
    /// ordinary one, everything counts as data, and holes are not looked for.
    pub(crate) fn new(host: &'a Host, tables: u64) -> Result<Self> {
        let (from, run) = match tables > host.allocated()? {
            true => (0, 0..0),
            false => (0, 0..u64::MAX),
        };
        Ok(Data { host, from, run })
    }

    /// Whether holes are looked for.
    pub(crate) fn is_sparse(&self) -> bool {
        self.run != (0..u64::MAX)
    }

    /// Where there is data next, at or after an offset; `u64::MAX` if nowhere.
    pub(crate) fn next(&mut self, offset: u64) -> Result<u64> {
        if !(self.from..self.run.end).contains(&offset) {
            let next = self.host.next_data(offset)?;
            self.run = next.unwrap_or(u64::MAX..u64::MAX);
            self.from = offset;
        }
        Ok(self.run.start.max(offset))
    }

    /// Whether any byte of a range is no hole.
    pub(crate) fn is_in(&mut self, offset: u64, len: u64) -> Result<bool> {
        Ok(self.next(offset)? < offset.saturating_add(len))
    }
}
