//! Disks to measure: files of every kind, and one whose mapping is as bad as can be.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{
    Compression, CreateOptions, FileStorage, Format, Image, KeyCost, NewEncryption, OpenOptions,
    Preallocation, Secret, Storage, create,
};

/// Size of the disks that are read and written.
pub(crate) const SIZE: u64 = 64 << 20;

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Preallocated,
    /// Empty over a full base: reads are the base's, writes allocate and copy.
    Overlay,
    /// Three files, each with a third of the data.
    Chain,
    Compressed(Compression),
    Luks,
}

/// An unlinked file, which is never synced: the crate is measured, not the host's disk.
fn file() -> Arc<dyn Storage> {
    Arc::new(FileStorage::without_sync(tempfile::tempfile().unwrap()))
}

fn secret() -> Secret {
    Secret::new(b"moo".to_vec())
}

fn new(options: &CreateOptions, base: Option<Image>) -> Image {
    let path = Path::new("bench");
    let storage = file();
    create(path, storage.clone(), options).unwrap();
    let open = OpenOptions {
        secrets: options.encryption.iter().map(|_| secret()).collect(),
        ..OpenOptions::new(Format::Qcow2)
    };
    Image::open_over(path, storage, &open, base).unwrap()
}

fn fill(image: &Image, offset: u64, len: u64) {
    let part: Vec<u8> = (0..1_u32 << 20).map(|i| (i / 777) as u8 | 1).collect();
    for at in (offset..offset + len).step_by(part.len()) {
        image
            .write(at, &part[..part.len().min((offset + len - at) as usize)])
            .unwrap();
    }
    image.flush().unwrap();
}

/// A disk of that kind.
pub(crate) fn disk(kind: Kind) -> Image {
    let empty = CreateOptions::new(SIZE);
    let over = CreateOptions {
        backing: Some(("base".into(), Format::Qcow2)),
        ..empty.clone()
    };
    let full = || {
        let image = new(
            &CreateOptions {
                preallocation: Preallocation::Metadata,
                ..empty.clone()
            },
            None,
        );
        fill(&image, 0, SIZE);
        image
    };
    match kind {
        Kind::Preallocated => full(),
        Kind::Overlay => new(&over, Some(full())),
        Kind::Chain => {
            let mut image = full();
            for third in 1..3 {
                image = new(&over, Some(image));
                let mebibytes = SIZE >> 20;
                for at in (0..mebibytes).filter(|at| at % 3 == third) {
                    fill(&image, at << 20, 1 << 20);
                }
            }
            image
        }
        Kind::Compressed(compression) => {
            let image = new(
                &CreateOptions {
                    compression,
                    ..empty
                },
                None,
            );
            let part: Vec<u8> = (0..1_u32 << 20).map(|i| (i / 37) as u8).collect();
            for at in (0..SIZE).step_by(part.len()) {
                image.write_compressed(at, &part).unwrap();
            }
            image.flush().unwrap();
            image
        }
        Kind::Luks => {
            let cost = KeyCost::Iterations(1000);
            let encryption = Some(NewEncryption::Luks {
                secret: secret(),
                cost,
            });
            let image = new(
                &CreateOptions {
                    encryption,
                    ..empty
                },
                None,
            );
            fill(&image, 0, SIZE);
            image
        }
    }
}

/// 50 GiB in clusters of 64 KiB, all allocated, in an order without any order. Its data is a hole:
/// only tables are written, and directly.
pub(crate) fn fragmented(path: &Path) {
    const CLUSTER: u64 = 65536;
    const CLUSTERS: u64 = (50 << 30) / CLUSTER;
    let storage = FileStorage::without_sync(
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .unwrap(),
    );
    let options = CreateOptions {
        preallocation: Preallocation::Metadata,
        ..CreateOptions::new(50 << 30)
    };
    let storage = Arc::new(storage);
    create(Path::new("fragmented"), storage.clone(), &options).unwrap();
    let number = |at: u64| {
        let mut bytes = [0; 8];
        storage.read_at(at, &mut bytes).unwrap();
        u64::from_be_bytes(bytes) & 0x00ff_ffff_ffff_fe00
    };
    let l1 = number(40);
    let tables: Vec<u64> = (0..CLUSTERS / 8192).map(|i| number(l1 + i * 8)).collect();
    // All entries of all tables, exchanged with each other.
    let mut entries = Vec::new();
    for table in &tables {
        let mut bytes = vec![0; CLUSTER as usize];
        storage.read_at(*table, &mut bytes).unwrap();
        entries.extend(bytes.chunks_exact(8).map(|entry| entry.to_vec()));
    }
    let mut state = 1_u64;
    for i in (1..entries.len()).rev() {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        entries.swap(i, (state >> 33) as usize % (i + 1));
    }
    for (table, entries) in tables.iter().zip(entries.chunks(8192)) {
        storage.write_at(*table, &entries.concat()).unwrap();
    }
}
