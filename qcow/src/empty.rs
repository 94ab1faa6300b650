//! Emptying an image: its backing file shows through everywhere.

use crate::error::{Error, Result};
use crate::image::Image;
use crate::qcow2::Qcow2;

impl Image {
    /// Forgets what the disk's clusters have: the backing file shows through, or zeros do.
    /// Internal snapshots stay, and so does what lies beyond the disk.
    ///
    /// # Errors
    /// The image is a raw file, cannot be written, or a table is wrong.
    pub fn make_empty(&self) -> Result<()> {
        if let Some(qcow2) = self.writable_top()? {
            return qcow2.make_empty();
        }
        let file = self.layers.first().map(|layer| layer.host().path.clone());
        Err(Error::Unsupported {
            file: file.unwrap_or_default(),
            feature: "the raw format".into(),
            advice: "only a qcow2 image can be empty",
        })
    }
}

impl Qcow2 {
    fn make_empty(&self) -> Result<()> {
        let _alone = self.alone()?;
        let (geometry, cluster) = (self.geometry, self.geometry.cluster());
        let covers = geometry.l2_entries() * cluster;
        for index in 0..geometry.l1_entries(self.size()) {
            let mut state = self.state();
            let (tables, writing) = self.split(&mut state)?;
            let Some((table, _)) = self.l2_table(tables, index as usize)? else {
                continue;
            };
            let start = index * covers;
            self.mappings(tables, start, covers, &mut |_, _, mapping| {
                writing.drop_mapping(mapping, self);
                true
            })?;
            writing.drop_clusters(geometry.span(table, 1));
            writing.metadata.remove(&geometry.index(table));
            self.set_l1(tables, writing, index as usize, 0);
            let strained = writing.is_strained();
            drop(state);
            if strained {
                self.flush_alone()?;
            }
        }
        self.flush_alone()
    }
}
