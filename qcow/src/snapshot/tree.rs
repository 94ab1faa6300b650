//! The L2 tables of one L1 table, read in the file's order and in large pieces.

use crate::entry::{self, Entry};
use crate::error::{Result, Violation};
use crate::holes::Data;
use crate::qcow2::Qcow2;

/// Adjacent L2 tables are read together up to this many bytes.
const RUN_BYTES: u64 = 1 << 20;

/// The L2 tables of an L1 table. Who walks them has the image alone, so that the file has what the
/// caches have.
pub(crate) struct Tree {
    /// Offsets, in the file's order.
    tables: Vec<u64>,
    /// Where the file ended when the tree was made.
    file_len: u64,
}

impl Tree {
    /// Checks the entries of the L1 table that is at `offset` of the file. A table that two of them
    /// name is refused: then the time for a walk is bounded by the bytes of the file.
    pub(crate) fn new(qcow2: &Qcow2, offset: u64, l1: &[u64], file_len: u64) -> Result<Self> {
        let wrong = |index: usize, expected: String| {
            let at = offset + index as u64 * 8;
            let value = format!("{:#018x}", l1.get(index).copied().unwrap_or(0));
            qcow2
                .host
                .invalid(Violation::new("L1 entry", at, value, expected))
        };
        let mut tables = Vec::new();
        for (index, &entry) in l1.iter().enumerate() {
            match entry::l1(entry, qcow2.geometry).map_err(|expected| wrong(index, expected))? {
                Some((table, _)) if table >= file_len => {
                    let expected = format!("an L2 table before the file's end at {file_len:#x}");
                    return Err(wrong(index, expected));
                }
                Some((table, _)) => tables.push(table),
                None => {}
            }
        }
        tables.sort_unstable();
        if let Some([twice, _]) = tables.array_windows().find(|[a, b]| a == b) {
            let names = |&entry| {
                entry::l1(entry, qcow2.geometry)
                    .is_ok_and(|named| matches!(named, Some((table, _)) if table == *twice))
            };
            let expected = "an L2 table that no other entry names".into();
            return Err(wrong(l1.iter().rposition(names).unwrap_or(0), expected));
        }
        Ok(Tree { tables, file_len })
    }

    /// Offsets of the L2 tables, in the file's order.
    pub(crate) fn tables(&self) -> &[u64] {
        &self.tables
    }

    pub(crate) fn has(&self, table: u64) -> bool {
        self.tables.binary_search(&table).is_ok()
    }

    /// Visits the clusters that L2 entries refer to, many at a time.
    pub(crate) fn references(&self, qcow2: &Qcow2, visit: &mut dyn FnMut(&[u64])) -> Result<()> {
        let geometry = qcow2.geometry;
        let entry_bytes = geometry.l2_entry();
        let (mut bytes, mut clusters) = (Vec::new(), Vec::new());
        let mut data = self.data(qcow2)?;
        for run in self.runs(qcow2, &data) {
            if !self.load(qcow2, &mut data, run, &mut bytes)? {
                continue;
            }
            let start = run.first().copied().unwrap_or(0);
            for (i, entry) in bytes.chunks_exact(entry_bytes as usize).enumerate() {
                let (entry, at) = (Entry::read(entry), start + i as u64 * entry_bytes);
                let place = entry::plain_place(entry.descriptor, geometry);
                match place.filter(|&place| place < self.file_len && !geometry.is_extended()) {
                    Some(place) => clusters.push(geometry.index(place)),
                    None => {
                        let mapping = qcow2.decode(entry, at, self.file_len)?;
                        clusters.extend(mapping.clusters(geometry));
                    }
                }
            }
            visit(&clusters);
            clusters.clear();
        }
        Ok(())
    }

    /// Lets `change` change COPIED: it gets each entry and where it is, and returns what its
    /// descriptor is to be. What it did is in the file then, without a sync.
    pub(crate) fn rewrite(
        &self,
        qcow2: &Qcow2,
        change: &mut dyn FnMut(u64, Entry) -> Result<u64>,
    ) -> Result<()> {
        let entry_bytes = qcow2.geometry.l2_entry();
        let mut bytes = Vec::new();
        let mut data = self.data(qcow2)?;
        for run in self.runs(qcow2, &data) {
            // A reader must not put what is here now into the cache after it was changed.
            let mut state = qcow2.state();
            if !self.load(qcow2, &mut data, run, &mut bytes)? {
                continue;
            }
            let start = run.first().copied().unwrap_or(0);
            let mut changed = false;
            for (i, bytes) in bytes.chunks_exact_mut(entry_bytes as usize).enumerate() {
                let entry = Entry::read(bytes);
                let descriptor = change(start + i as u64 * entry_bytes, entry)?;
                if descriptor != entry.descriptor {
                    Entry {
                        descriptor,
                        ..entry
                    }
                    .write(bytes);
                    changed = true;
                }
            }
            if changed {
                state.tables.l2.forget(start, bytes.len() as u64);
                qcow2.host.write(start, &bytes)?;
            }
        }
        Ok(())
    }

    /// Where there is data.
    fn data<'a>(&self, qcow2: &'a Qcow2) -> Result<Data<'a>> {
        let bytes = self.tables.len() as u64 * qcow2.geometry.cluster();
        Data::new(&qcow2.host, bytes)
    }

    /// The tables in runs that lie side by side; one by one where some lie in holes.
    fn runs(&self, qcow2: &Qcow2, data: &Data<'_>) -> impl Iterator<Item = &[u64]> + use<'_> {
        let cluster = qcow2.geometry.cluster();
        let most = match data.is_sparse() {
            true => 1,
            false => (RUN_BYTES / cluster).max(1) as usize,
        };
        self.tables
            .chunk_by(move |a, b| a + cluster == *b)
            .flat_map(move |run| run.chunks(most))
    }

    /// Reads a run; not one in a hole, where no entry says anything.
    fn load(
        &self,
        qcow2: &Qcow2,
        data: &mut Data<'_>,
        run: &[u64],
        bytes: &mut Vec<u8>,
    ) -> Result<bool> {
        let (start, len) = (run.first().copied().unwrap_or(0), run.len());
        bytes.resize(len * qcow2.geometry.cluster() as usize, 0);
        let has_data = data.is_in(start, bytes.len() as u64)?;
        if has_data {
            qcow2.host.read(start, bytes)?;
        }
        Ok(has_data)
    }
}
