//! Requests to a valid image, damaged or not.

use std::collections::VecDeque;

use arbitrary::{Arbitrary, Unstructured};
use cowshed_qcow::{
    Error, Extent, Image, NewSnapshot, Pin, Plan, ResizeOptions, Selector, Storage,
};

use crate::image::Mutated;
use crate::storage::{Bounded, open, open_at};
use crate::support::check::check;
use crate::support::model::{self, SECTOR, content, mirror, perform};

/// Disks up to this size are asked for requests: a damaged header may claim any size.
const MOST: u64 = 8 << 20;
/// Requests of one run.
const REQUESTS: usize = 64;

#[derive(Arbitrary, Debug)]
struct Input {
    mutated: Mutated,
    requests: Vec<Request>,
}

#[derive(Arbitrary, Debug)]
struct Request {
    kind: Kind,
    sector: u16,
    sectors: u8,
}

#[derive(Arbitrary, Debug)]
enum Kind {
    Write(u8),
    /// Where the plan is fast, the bytes go past the image; the pin is kept a while.
    Planned(u8),
    Zero {
        unmap: bool,
    },
    Discard,
    Read,
    Flush,
    Reopen,
    Resize,
    Compressed(u8),
    Snapshot,
    /// The n-th of those that were taken.
    Apply(u8),
    Delete(u8),
}

/// Performs the requests. A valid image agrees with the model and is clean at the end; a damaged
/// one may refuse anything.
pub fn run(data: &[u8]) {
    let Ok(input) = Input::arbitrary(&mut Unstructured::new(data)) else {
        return;
    };
    let valid = input.mutated.is_valid();
    let storage = Bounded::new(input.mutated.bytes());
    let mut image = match open(&storage, false) {
        Ok(image) if image.size() <= MOST => image,
        Err(error) if valid && !matches!(error, Error::Unsupported { .. }) => {
            panic!("{input:?}: {error:?}")
        }
        _ => return,
    };
    let mut expected = valid.then(|| content(&image));
    let mut snapshots = Vec::new();
    let mut pins = VecDeque::new();
    for request in input.requests.iter().take(REQUESTS) {
        let done = match request.kind {
            Kind::Reopen => {
                pins.clear();
                drop(image);
                match open(&storage, false) {
                    Ok(again) => image = again,
                    Err(error) if valid => panic!("{input:?}: {error:?}"),
                    Err(_) => return,
                }
                Ok(())
            }
            _ => request.perform(&image, &storage, &mut expected, &mut pins, &mut snapshots),
        };
        if let Err(error) = done {
            assert!(!valid, "{input:?}: {error:?}");
        }
        if pins.len() > 3 {
            pins.pop_front();
        }
    }
    if let Some(expected) = &expected {
        assert!(content(&image) == *expected, "{input:?}");
    }
    drop(image);
    if let Some(expected) = expected {
        let report = check(&storage.to_vec());
        assert!(report.corruptions.is_empty(), "{input:?}: {report:?}");
        let again = open(&storage, true).unwrap();
        assert!(content(&again) == expected, "{input:?}");
        for taken in &snapshots {
            let then = open_at(&storage, &taken.id);
            assert!(
                Some(content(&then)) == taken.content,
                "{input:?}: {}",
                taken.id
            );
        }
    }
}

impl Request {
    fn perform(
        &self,
        image: &Image,
        storage: &Bounded,
        expected: &mut Option<Vec<u8>>,
        pins: &mut VecDeque<Pin>,
        snapshots: &mut Vec<Taken>,
    ) -> Result<(), Error> {
        let sectors = image.size() / SECTOR as u64;
        if sectors == 0 {
            return Ok(());
        }
        let sector = u64::from(self.sector) % sectors;
        let len = u64::from(self.sectors).min(sectors - sector) * SECTOR as u64;
        let offset = sector * SECTOR as u64;
        let op = match self.kind {
            Kind::Write(byte) => model::Op::Write {
                offset,
                data: vec![byte; len as usize],
            },
            Kind::Planned(byte) => {
                let data = vec![byte; len as usize];
                match image.plan_write(offset, len)? {
                    Plan::Fast { extents, pin } => {
                        write_by(&extents, storage, &data);
                        pins.push_back(pin);
                    }
                    Plan::Fill { extents, fill } => {
                        write_by(&extents, storage, &data);
                        image.commit(fill, true)?;
                    }
                    Plan::Slow => image.write(offset, &data)?,
                }
                if let Some(model) = expected {
                    model[offset as usize..][..data.len()].copy_from_slice(&data);
                }
                return Ok(());
            }
            Kind::Zero { unmap } => model::Op::Zero { offset, len, unmap },
            Kind::Discard => model::Op::Discard { offset, len },
            Kind::Flush => model::Op::Flush,
            Kind::Snapshot | Kind::Apply(_) | Kind::Delete(_) => {
                pins.clear(); // Who changes the whole image waits for them.
                return match self.snapshot(image, expected, snapshots) {
                    // Refcounts of one bit cannot count two, bitmaps have the disk's size, and the like.
                    Err(
                        Error::Change { .. } | Error::Bitmap { .. } | Error::Unsupported { .. },
                    ) => Ok(()),
                    done => done,
                };
            }
            Kind::Resize => {
                pins.clear();
                let options = ResizeOptions {
                    shrink: true,
                    ..ResizeOptions::default()
                };
                // Up to twice the size, or down to a sector.
                let size = ((u64::from(self.sector) % (2 * sectors)) + 1) * SECTOR as u64;
                match image.resize(size, &options) {
                    // Version 2 with snapshots cannot.
                    Err(Error::Change { .. } | Error::Unsupported { .. }) => {}
                    done => {
                        done?;
                        if let Some(model) = expected {
                            model.resize(size as usize, 0);
                        }
                    }
                }
                return Ok(());
            }
            Kind::Compressed(byte) => {
                let cluster = u64::from(image.cluster_size());
                let offset = offset / cluster * cluster;
                let data = vec![byte; cluster.min(image.size() - offset) as usize];
                match image.write_compressed(offset, &data) {
                    Err(Error::Unsupported { .. }) => {}
                    done => {
                        done?;
                        if let Some(model) = expected {
                            model[offset as usize..][..data.len()].copy_from_slice(&data);
                        }
                    }
                }
                return Ok(());
            }
            Kind::Read | Kind::Reopen => {
                let mut bytes = vec![0xee; len as usize];
                image.read(offset, &mut bytes)?;
                if let Some(model) = expected {
                    assert!(bytes == model[offset as usize..][..bytes.len()]);
                }
                return Ok(());
            }
        };
        perform(image, &op)?;
        if let Some(model) = expected {
            mirror(model, image, &op);
        }
        Ok(())
    }

    fn snapshot(
        &self,
        image: &Image,
        expected: &mut Option<Vec<u8>>,
        snapshots: &mut Vec<Taken>,
    ) -> Result<(), Error> {
        let which = |n: u8| usize::from(n) % snapshots.len().max(1);
        match self.kind {
            Kind::Apply(n) => {
                if let Some(taken) = snapshots.get(which(n)) {
                    image.apply_snapshot(&Selector::Id(taken.id.clone()))?;
                    expected.clone_from(&taken.content);
                }
            }
            Kind::Delete(n) if !snapshots.is_empty() => {
                let n = which(n);
                image.delete_snapshot(&Selector::Id(snapshots[n].id.clone()))?;
                snapshots.remove(n);
            }
            _ => {
                let new = image.create_snapshot(&NewSnapshot::new("fuzzed"))?;
                snapshots.push(Taken {
                    id: new.id,
                    content: expected.clone(),
                });
            }
        }
        Ok(())
    }
}

/// A snapshot, and what the disk was then if that is known.
struct Taken {
    id: String,
    content: Option<Vec<u8>>,
}

fn write_by(extents: &[Extent], storage: &Bounded, data: &[u8]) {
    let mut rest = data;
    for extent in extents {
        let &Extent::File {
            file: 0,
            offset,
            len,
        } = extent
        else {
            panic!("a write plan leads to {extent:?}");
        };
        let (part, after) = rest.split_at(len as usize);
        storage.write_at(offset, part).unwrap();
        rest = after;
    }
    assert!(rest.is_empty());
}
