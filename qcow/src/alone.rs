//! Operations that change what every request stands on: they run alone.

use std::ops::Range;

use crate::alloc::Blocked;
use crate::error::Result;
use crate::qcow2::{Qcow2, Tables};
use crate::writing::Writing;

/// While it lives no request changes the image, and none is in flight that began before. Reads go
/// on.
pub(crate) struct Alone<'a> {
    qcow2: &'a Qcow2,
}

impl Qcow2 {
    /// Waits until everything that changes the image has ended, and keeps the next ones waiting.
    /// Everything is flushed then. Who holds a plan's pin waits for itself here.
    pub(crate) fn alone(&self) -> Result<Alone<'_>> {
        let mut state = self.state();
        loop {
            let (_, writing) = self.split(&mut state)?;
            if !writing.alone {
                writing.alone = true;
                break;
            }
            state = self.wait(state);
        }
        // From here on a failure ends it.
        let alone = Alone { qcow2: self };
        while !self.split(&mut state)?.1.allocating.is_empty() {
            state = self.wait(state);
        }
        drop(state);
        self.pins.drain();
        self.flush_alone()?;
        Ok(alone)
    }
}

impl Alone<'_> {
    /// Allocates `count` clusters in a row for a table, and counts them as metadata.
    pub(crate) fn allocate_table(
        &self,
        tables: &mut Tables,
        writing: &mut Writing,
        count: u64,
    ) -> Result<Range<u64>> {
        loop {
            match self.qcow2.allocate_row(tables, writing, count)? {
                Ok(row) => {
                    writing.metadata.extend(row.clone());
                    return Ok(row);
                }
                Err(Blocked::TableFull) => self.qcow2.move_table(tables, writing)?,
                Err(Blocked::FileFull) => return Err(self.qcow2.full(self.qcow2.file_limit())),
            }
        }
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        if let Some(writing) = &mut self.qcow2.state().writing {
            writing.alone = false;
        }
        self.qcow2.notify();
    }
}
