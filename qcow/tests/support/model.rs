//! A disk as a plain vector, and random requests to both.

use cowshed_qcow::{Error, Image};

use super::Random;

pub const SECTOR: usize = 512;

/// One request.
#[derive(Clone, Debug)]
pub enum Op {
    Write { offset: u64, data: Vec<u8> },
    Compress { offset: u64, data: Vec<u8> },
    Zero { offset: u64, len: u64, unmap: bool },
    Discard { offset: u64, len: u64 },
    Flush,
}

/// Makes requests: most of them writes, some unaligned to clusters, some long, some compressed.
pub struct Ops {
    pub random: Random,
    pub size: u64,
    pub cluster: u64,
    /// Whether the image can have compressed clusters.
    pub compressed: bool,
    stamp: u64,
}

impl Ops {
    pub fn new(seed: u64, size: u64, cluster: u64) -> Self {
        Ops {
            random: Random(seed),
            size,
            cluster,
            compressed: true,
            stamp: seed << 32,
        }
    }

    fn range(&mut self) -> (u64, u64) {
        let sectors = self.size / SECTOR as u64;
        let mut offset = self.random.below(sectors);
        let per_cluster = (self.cluster / SECTOR as u64).max(1);
        if self.random.below(3) == 0 {
            offset -= offset % per_cluster;
        }
        let most = match self.random.below(4) {
            0 => 1,
            1 => per_cluster,
            _ => per_cluster * 6,
        };
        let len = 1 + self.random.below(most.min(sectors - offset));
        (offset * SECTOR as u64, len * SECTOR as u64)
    }

    fn data(&mut self, len: u64) -> Vec<u8> {
        let mut data = Vec::new();
        for _ in 0..len / SECTOR as u64 {
            // Each sector is like no other.
            self.stamp += 1;
            (0..SECTOR / 8).for_each(|_| data.extend(self.stamp.to_le_bytes()));
        }
        data
    }

    pub fn next(&mut self) -> Op {
        let (offset, len) = self.range();
        match self.random.below(20) {
            0..=3 if self.compressed => {
                let end = (offset + len).next_multiple_of(self.cluster).min(self.size);
                let offset = offset - offset % self.cluster;
                let data = self.data(end - offset);
                Op::Compress { offset, data }
            }
            0..=11 => {
                let data = self.data(len);
                Op::Write { offset, data }
            }
            12..=14 => Op::Zero {
                offset,
                len,
                unmap: self.random.below(2) == 0,
            },
            15..=17 => Op::Discard { offset, len },
            _ => Op::Flush,
        }
    }
}

pub fn perform(image: &Image, op: &Op) -> Result<(), Error> {
    match op {
        Op::Write { offset, data } => image.write(*offset, data),
        // Encrypted images have no compressed clusters.
        Op::Compress { offset, data } if image.compressor(None).is_err() => {
            image.write(*offset, data)
        }
        Op::Compress { offset, data } => image.write_compressed(*offset, data),
        Op::Zero { offset, len, unmap } => image.write_zeroes(*offset, *len, *unmap),
        Op::Discard { offset, len } => image.discard(*offset, *len),
        // As a device does it, which syncs the file itself where that is all.
        Op::Flush if image.needs_sync_only() => image.synced(Ok(())),
        Op::Flush => image.flush(),
    }
}

/// Does the same to the model. A discarded sector may read as zeros or as before: the image says
/// which.
pub fn mirror(model: &mut [u8], image: &Image, op: &Op) {
    match op {
        Op::Write { offset, data } | Op::Compress { offset, data } => {
            model[*offset as usize..][..data.len()].copy_from_slice(data);
        }
        Op::Zero { offset, len, .. } => model[*offset as usize..][..*len as usize].fill(0),
        Op::Discard { offset, len } => {
            let range = &mut model[*offset as usize..][..*len as usize];
            let mut now = vec![0xee; range.len()];
            image.read(*offset, &mut now).unwrap();
            for (before, now) in range.chunks_mut(SECTOR).zip(now.chunks(SECTOR)) {
                assert!(
                    now == before || now == [0; SECTOR],
                    "a discard made up data"
                );
                before.copy_from_slice(now);
            }
        }
        Op::Flush => {}
    }
}

pub fn content(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; image.size() as usize];
    image.read(0, &mut bytes).unwrap();
    bytes
}
