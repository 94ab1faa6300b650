//! Writing the header: what is not known is written as it was read.

use super::{Header, MAX_BACKING_NAME, V3_LENGTH};
use crate::compress::Compression;
use crate::error::{Error, Result};
use crate::extension::FILLER;
use crate::host::Host;

/// The unit that a disk writes at once or not at all.
const SECTOR: usize = 512;

impl Header {
    /// The fields, without the extensions and the backing file's name.
    pub(crate) fn fields(&self) -> Vec<u8> {
        let name = self.backing.as_ref().map_or("", |backing| &backing.name);
        let mut bytes = b"QFI\xfb".to_vec();
        bytes.extend(self.version.to_be_bytes());
        bytes.extend(self.name_offset.to_be_bytes());
        bytes.extend((name.len() as u32).to_be_bytes());
        bytes.extend(self.geometry.cluster_bits().to_be_bytes());
        bytes.extend(self.size.to_be_bytes());
        bytes.extend(self.encryption.method().to_be_bytes());
        bytes.extend((self.l1_entries as u32).to_be_bytes());
        bytes.extend(self.l1_offset.to_be_bytes());
        bytes.extend(self.refcount_table_offset.to_be_bytes());
        bytes.extend((self.refcount_table_clusters as u32).to_be_bytes());
        bytes.extend(self.snapshots.to_be_bytes());
        bytes.extend(self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            bytes.extend(self.incompatible.to_be_bytes());
            bytes.extend(self.compatible.to_be_bytes());
            bytes.extend(self.autoclear.to_be_bytes());
            bytes.extend(self.refcount_order.to_be_bytes());
            bytes.extend(((V3_LENGTH + self.tail.len()) as u32).to_be_bytes());
            bytes.extend(&self.tail);
            if let Some(compression) = bytes.get_mut(V3_LENGTH) {
                *compression = match self.compression {
                    Compression::Zlib => 0,
                    Compression::Zstd => 1,
                };
            }
        }
        bytes
    }

    /// What the first cluster begins with: fields, extensions, the backing file's name, which gets
    /// its place here. The rest of the cluster has no meaning. Says why if they do not fit.
    pub(crate) fn encode(&mut self) -> Result<Vec<u8>, String> {
        let extensions = self.extensions.encode();
        let name_at = self.fields().len() + extensions.len();
        let name = match &self.backing {
            Some(backing) => backing.name.clone(),
            None => String::new(),
        };
        let room = (self.geometry.cluster() as usize)
            .checked_sub(name_at)
            .ok_or("the header's extensions do not fit into a cluster")?;
        let most = room.min(MAX_BACKING_NAME as usize);
        if name.len() > most {
            let len = name.len();
            return Err(format!(
                "the backing file's name has {len} bytes, it can have {most}"
            ));
        }
        self.name_offset = if name.is_empty() { 0 } else { name_at as u64 };
        let mut bytes = self.fields();
        bytes.extend(extensions);
        bytes.extend(name.as_bytes());
        Ok(bytes)
    }

    /// Replaces `self` in the file by `next`, and makes that durable. A crash leaves one of them: the
    /// first sector, which is written at once, says which. What lies past that sector is written
    /// first, in a place that `self` does not use, if the cluster has room for such a detour.
    pub(crate) fn replace(&self, next: &mut Header, host: &Host) -> Result<()> {
        let mut bytes = next.fields();
        let moved = self.fields().len() != bytes.len();
        if moved || self.extensions != next.extensions || self.backing != next.backing {
            next.extensions.set(FILLER, None);
            bytes = next.encode().map_err(|reason| Error::Change {
                file: host.path.clone(),
                reason,
            })?;
            let mut old = vec![0; bytes.len().saturating_sub(SECTOR)];
            host.read(SECTOR as u64, &mut old)?;
            if bytes.get(SECTOR..).is_none_or(|rest| rest == old) {
                bytes.truncate(SECTOR);
            } else if let Some((detour, far)) = next.detour(self.used().max(bytes.len())) {
                write(host, &detour, far)?;
            }
        }
        write(host, &bytes, SECTOR)
    }

    /// Bytes of the first cluster that are in use.
    fn used(&self) -> usize {
        let name = self
            .backing
            .as_ref()
            .map_or(0, |backing| backing.name.len());
        let extensions = self.fields().len() + self.extensions.encode().len();
        extensions.max(self.name_offset as usize + name)
    }

    /// The same header with nothing between its first sector and the returned place past `used`.
    fn detour(&self, used: usize) -> Option<(Vec<u8>, usize)> {
        let far = used.max(SECTOR).next_multiple_of(8);
        let mut detour = self.clone();
        detour.extensions = self.extensions.detour(self.fields().len(), SECTOR, far)?;
        Some((detour.encode().ok()?, far))
    }
}

/// Writes what a header has from `rest` on, then its first sector, each durable before what follows.
fn write(host: &Host, bytes: &[u8], rest: usize) -> Result<()> {
    if let Some(bytes) = bytes.get(rest..).filter(|bytes| !bytes.is_empty()) {
        host.write(rest as u64, bytes)?;
        host.sync()?;
    }
    host.write(0, bytes.get(..SECTOR).unwrap_or(bytes))?;
    host.sync()
}
