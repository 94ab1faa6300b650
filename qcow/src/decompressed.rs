//! The last few compressed clusters that were read, decompressed.

use std::collections::VecDeque;
use std::sync::PoisonError;

use crate::compress;
use crate::entry::Compressed;
use crate::error::{Error, Result, Violation};
use crate::qcow2::Qcow2;
use crate::sync::Mutex;

/// Bytes that are kept: two clusters of the largest size, many of the usual ones.
const KEPT_BYTES: usize = 4 << 20;

/// The last few compressed clusters of a chain, the latest first. A place in the file is reused only
/// when no request can have its old descriptor any more, and is forgotten here then.
#[derive(Default)]
pub(crate) struct Decompressed {
    clusters: Mutex<VecDeque<(usize, Compressed, Vec<u8>)>>,
}

impl Decompressed {
    /// The top image is about to have something else in a range of its file.
    pub(crate) fn forget(&self, at: Compressed) {
        let mut clusters = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        clusters.retain(|(layer, of, _)| {
            *layer > 0 || of.offset >= at.offset + at.len || at.offset >= of.offset + of.len
        });
    }

    /// Copies bytes of a compressed cluster's content, from `within` on. One cluster is
    /// decompressed at a time, which bounds the memory that streams can ask for.
    pub(crate) fn read(
        &self,
        layer: usize,
        qcow2: &Qcow2,
        at: Compressed,
        within: u64,
        buf: &mut [u8],
    ) -> Result<()> {
        let mut clusters = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        let found = clusters
            .iter()
            .position(|(of, place, _)| (*of, *place) == (layer, at));
        let entry = match found.and_then(|i| clusters.remove(i)) {
            Some(entry) => entry,
            None => (layer, at, decompress(qcow2, at)?),
        };
        let from = within as usize;
        if let Some(bytes) = entry.2.get(from..from + buf.len()) {
            buf.copy_from_slice(bytes);
        }
        let most = (KEPT_BYTES / entry.2.len().max(1)).max(1);
        clusters.push_front(entry);
        clusters.truncate(most);
        Ok(())
    }
}

fn decompress(qcow2: &Qcow2, at: Compressed) -> Result<Vec<u8>> {
    let mut stream = vec![0; at.len as usize];
    qcow2.host.read(at.offset, &mut stream)?;
    let mut cluster = vec![0; qcow2.geometry.cluster() as usize];
    compress::decompress(qcow2.compression, &stream, &mut cluster).map_err(|error| {
        let (file, len) = (qcow2.host.path.clone(), at.len);
        let expected = format!("{} bytes when decompressed", qcow2.geometry.cluster());
        let value = format!("{len} bytes that fail ({error})");
        Error::Invalid {
            file,
            source: Violation::new("compressed cluster", at.offset, value, expected),
        }
    })?;
    Ok(cluster)
}
