//! A valid image with damage, opened and read.

use arbitrary::{Arbitrary, Unstructured};
use cowshed_qcow::{Error, Extent, Plan};

use crate::image::Mutated;
use crate::storage::{Bounded, open};

/// What is read of a disk, from its start and to its end.
const MOST: u64 = 1 << 20;
const PART: usize = 64 << 10;

/// Reads the whole disk, or as much as the bound allows; plans agree with what is read.
pub fn run(data: &[u8]) {
    let Ok(mutated) = Mutated::arbitrary(&mut Unstructured::new(data)) else {
        return;
    };
    let bytes = mutated.bytes();
    let storage = Bounded::new(bytes.clone());
    let image = match open(&storage, true) {
        Ok(image) => image,
        Err(Error::Unsupported { .. }) => return,
        Err(error) if mutated.is_valid() => panic!("{mutated:?}: {error:?}"),
        Err(_) => return,
    };
    let size = image.size();
    for start in [0, size.saturating_sub(MOST) / 512 * 512] {
        for offset in (start..size.min(start + MOST)).step_by(PART) {
            let mut part = vec![0xee; PART.min((size - offset) as usize)];
            let read = image.read(offset, &mut part);
            if let Err(error) = read {
                assert!(!mutated.is_valid(), "{mutated:?}: {error:?}");
                continue;
            }
            let plan = image.plan_read(offset, part.len() as u64).unwrap();
            let Plan::Fast { extents, .. } = plan else {
                continue;
            };
            follow(&extents, &bytes, image.depth(), &part);
        }
    }
    drop(image);
    assert!(storage.to_vec() == bytes, "a read-only image was written");
}

/// The extents cover the bytes that were read, and lead to them.
fn follow(extents: &[Extent], file: &[u8], depth: usize, expected: &[u8]) {
    let mut rest = expected;
    for &extent in extents {
        let (Extent::File { len, .. } | Extent::Zero { len }) = extent;
        let (part, after) = rest.split_at(len as usize);
        rest = after;
        match extent {
            Extent::Zero { .. } => assert!(part.iter().all(|&byte| byte == 0)),
            Extent::File {
                file: 0, offset, ..
            } => {
                let have = file.get(offset as usize..).unwrap_or_default();
                let beyond = part.len().saturating_sub(have.len());
                let have = &have[..part.len() - beyond];
                assert!(part[..have.len()] == *have);
                assert!(part[have.len()..].iter().all(|&byte| byte == 0));
            }
            Extent::File { file, .. } => assert!(file < depth),
        }
    }
    assert!(rest.is_empty(), "the plan is short by {}", rest.len());
}
