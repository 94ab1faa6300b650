//! Reading a snapshot without applying it: an image whose L1 table and size are the snapshot's.

use super::Selector;
use super::table::Table;
use crate::addr::be64;
use crate::error::Result;
use crate::header::Header;
use crate::host::Host;

impl Header {
    /// The header as it would be if the snapshot were the disk: for an image that is not written.
    pub(crate) fn at_snapshot(
        self,
        host: &Host,
        file_len: u64,
        which: &Selector,
    ) -> Result<Header> {
        let mut table = Table::read(host, &self, file_len)?;
        let entry = table.entries.swap_remove(table.find(host, which)?);
        Ok(Header {
            size: entry.disk_size(self.size),
            l1_offset: entry.l1_offset,
            l1_entries: entry.l1_entries,
            ..self
        })
    }
}

impl Host {
    /// The entries of an L1 table, whose place and length were checked.
    pub(crate) fn read_l1(&self, offset: u64, entries: usize) -> Result<Vec<u64>> {
        /// Bytes that are read at a time, so that a large table is not in memory twice.
        const PIECE: usize = 1 << 20;
        let mut table = Vec::with_capacity(entries);
        let mut bytes = vec![0; (entries * 8).min(PIECE)];
        while table.len() < entries {
            bytes.truncate((entries - table.len()) * 8);
            self.read(offset + table.len() as u64 * 8, &mut bytes)?;
            table.extend(bytes.chunks_exact(8).map(|entry| be64(entry, 0)));
        }
        Ok(table)
    }
}
