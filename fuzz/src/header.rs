//! Any bytes, opened as an image.

use cowshed_qcow::Plan;

use crate::storage::{Bounded, open};

/// Opens the bytes both ways and asks for a little; that they are no image is fine.
pub fn run(data: &[u8]) {
    for read_only in [true, false] {
        let storage = Bounded::new(data.to_vec());
        let Ok(image) = open(&storage, read_only) else {
            continue;
        };
        let size = image.size();
        assert!(size <= i64::MAX as u64 && size.is_multiple_of(512));
        let len = size.min(512);
        for offset in [0, size / 2 / 512 * 512, size - len] {
            let _ = image.read(offset, &mut vec![0; len as usize]);
            let _ = image.plan_read(offset, len);
            if let Ok(Plan::Fill { fill, .. }) = image.plan_write(offset, len) {
                let _ = image.commit(fill, false);
            }
            let _ = image.write(offset, &vec![1; len as usize]);
            let _ = image.discard(offset, len);
        }
        let _ = image.flush();
        drop(image);
        if read_only {
            assert!(storage.to_vec() == data, "a read-only image was written");
        }
    }
}
