//! Operations that change what every request stands on: they run alone.

use std::ops::Range;

use crate::alloc::{Allocation, Blocked};
use crate::error::Result;
use crate::qcow2::{Qcow2, Tables};
use crate::writing::Writing;

/// While it lives no request changes the image, and none is in flight that began before. Reads go
/// on.
pub(crate) struct Alone<'a> {
    pub(crate) qcow2: &'a Qcow2,
}

impl Qcow2 {
    /// Waits until everything that changes the image has ended, and keeps the next ones waiting.
    /// Everything is flushed then. Who holds a plan's pin or fill waits for itself here.
    pub(crate) fn alone(&self) -> Result<Alone<'_>> {
        let mut state = self.state();
        let is_first = state.writing.is_none();
        loop {
            let (_, writing) = self.split(&mut state)?;
            if !writing.alone {
                writing.alone = true;
                break;
            }
            state = self.wait(state);
        }
        // From here on a failure ends it, which takes the lock: so that is to be let go of before.
        let alone = Alone { qcow2: self };
        let mut state = state;
        while !self.split(&mut state)?.1.allocating.is_empty() {
            state = self.wait(state);
        }
        drop(state);
        self.pins.drain();
        // Where nothing was written yet nothing waits, and a sync takes its time.
        if !is_first {
            self.flush_alone()?;
        }
        Ok(alone)
    }

    /// The same for who closes the image: only plans can be left, and nobody waits for those.
    pub(crate) fn alone_at_last(&self) -> Alone<'_> {
        Alone { qcow2: self }
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
                    writing.metadata.insert(row.clone());
                    return Ok(row);
                }
                Err(blocked) => self.unblock(tables, writing, &blocked)?,
            }
        }
    }

    /// Allocates one to `most` clusters in a row.
    pub(crate) fn allocate(
        &self,
        tables: &mut Tables,
        writing: &mut Writing,
        most: u64,
    ) -> Result<Allocation> {
        let mut thorough = false;
        loop {
            match self.qcow2.allocate(tables, writing, most, thorough)? {
                Ok(allocation) => return Ok(allocation),
                Err(Blocked::FileFull) if !thorough => thorough = true,
                Err(blocked) => self.unblock(tables, writing, &blocked)?,
            }
        }
    }

    /// The L2 table of an L1 entry, made or copied if it is not there or not the image's own.
    pub(crate) fn own_table(
        &self,
        tables: &mut Tables,
        writing: &mut Writing,
        index: usize,
    ) -> Result<u64> {
        let mut thorough = false;
        loop {
            match self.qcow2.own_l2_table(tables, writing, index, thorough)? {
                Ok(table) => return Ok(table),
                Err(Blocked::FileFull) if !thorough => thorough = true,
                Err(blocked) => self.unblock(tables, writing, &blocked)?,
            }
        }
    }

    fn unblock(&self, tables: &mut Tables, writing: &mut Writing, blocked: &Blocked) -> Result<()> {
        match blocked {
            Blocked::TableFull => self.qcow2.move_table(tables, writing),
            Blocked::FileFull => Err(self.qcow2.full(self.qcow2.file_limit())),
        }
    }

    /// Flushes if that many changes wait that it is time to.
    pub(crate) fn keep_within_bounds(&self) -> Result<()> {
        let mut state = self.qcow2.state();
        let (tables, writing) = self.qcow2.split(&mut state)?;
        if tables.l2.is_strained() || writing.is_strained() {
            drop(state);
            self.qcow2.flush_alone()?;
        }
        Ok(())
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

// Shuttle's locks work in its schedules only.
#[cfg(all(test, not(shuttle)))]
mod tests {
    use std::path::Path;
    use std::sync::{Arc, mpsc};
    use std::time::Duration;

    use super::*;
    use crate::layer::Layer;
    use crate::{CreateOptions, Format, Image, MemoryStorage, OpenOptions, create};

    fn top(image: &Image) -> &Qcow2 {
        match image.layers.first() {
            Some(Layer::Qcow2(qcow2)) => qcow2,
            _ => panic!("it was made as qcow2"),
        }
    }

    /// Who waits for an allocation when all writing is stopped lets go of the image.
    #[test]
    fn a_failed_wait_ends() {
        let (path, storage) = (Path::new("disk"), Arc::new(MemoryStorage::default()));
        create(path, storage.clone(), &CreateOptions::new(1 << 20)).unwrap();
        let options = OpenOptions::new(Format::Qcow2);
        let image = Arc::new(Image::open_over(path, storage, &options, None).unwrap());
        let qcow2 = top(&image);
        let mut state = qcow2.state();
        qcow2.split(&mut state).unwrap().1.allocating.push(0..1);
        drop(state);

        let (sender, ended) = mpsc::channel();
        let waits = image.clone();
        // Not joined: it might never end.
        std::thread::spawn(move || sender.send(top(&waits).alone().is_err()));
        let is_alone = || qcow2.state().writing.as_ref().unwrap().alone;
        while !is_alone() {
            std::thread::yield_now();
        }
        qcow2.state().tables.stopped = Some("it is broken".into());
        qcow2.notify();
        assert_eq!(ended.recv_timeout(Duration::from_secs(30)), Ok(true));
        assert!(!is_alone());
    }
}
