//! Every call of the storage fails once: an error, no panic, no corruption, nothing flushed lost.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod support;

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{
    CreateOptions, DataFile, Format, Image, MemoryStorage, OpenOptions, Storage, create,
};
use support::check::check;
use support::model::{Op, Ops, SECTOR, content, perform};
use support::storages::FaultStorage;
use support::{cached, striped_base};

const NAME: &str = "fault.qcow2";

/// Where the guest's data is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Home {
    Image,
    DataFile,
    RawDataFile,
}

/// Runs the requests with the n-th call failing, of whichever file; whether any call failed.
fn with_fault(n: i64, kind: ErrorKind, home: Home) -> bool {
    let storage = FaultStorage::new(Vec::new(), kind);
    let data = (home != Home::Image).then(|| storage.beside());
    let raw = home == Home::RawDataFile;
    let options = CreateOptions {
        cluster_size: 512,
        backing: (!raw).then(|| ("base".into(), Format::Raw)),
        data_file: data.clone().map(|storage| DataFile {
            name: "data".into(),
            raw,
            storage,
        }),
        ..CreateOptions::new(96 << 10)
    };
    create(Path::new(NAME), storage.clone(), &options).unwrap();
    let open = || {
        let base = (!raw).then(|| striped_base(50_000));
        let options = OpenOptions {
            data_file: data.clone().map(|data| data as Arc<dyn Storage>),
            ..cached(4 << 10)
        };
        Image::open_over(Path::new(NAME), storage.clone(), &options, base).unwrap()
    };
    let image = open();
    let mut possible: Vec<Vec<Vec<u8>>> = content(&image)
        .chunks(SECTOR)
        .map(|sector| vec![sector.to_vec()])
        .collect();
    let mut ops = Ops::new(3, image.size(), 512);
    ops.compressed = data.is_none();
    storage.fail_after(n);
    let mut failed = 0;
    for _ in 0..200 {
        let op = ops.next();
        let (start, values): (u64, Vec<Vec<u8>>) = match &op {
            Op::Write { offset, data } | Op::Compress { offset, data } => {
                (*offset, data.chunks(SECTOR).map(Vec::from).collect())
            }
            Op::Zero { offset, len, .. } | Op::Discard { offset, len } => {
                (*offset, vec![vec![0; SECTOR]; *len as usize / SECTOR])
            }
            Op::Flush => (0, Vec::new()),
        };
        let result = perform(&image, &op);
        failed += usize::from(result.is_err());
        for (i, value) in values.into_iter().enumerate() {
            let possible = &mut possible[start as usize / SECTOR + i];
            // What succeeded is the only value there is; what failed may have been done in part.
            if result.is_ok() && !matches!(op, Op::Discard { .. }) {
                possible.clear();
            }
            possible.push(value);
        }
    }
    let untouched = !storage.recover();
    let flushed = image.flush();
    if flushed.is_ok() {
        for (i, sector) in content(&image).chunks(SECTOR).enumerate() {
            assert!(
                possible[i].iter().any(|v| v == sector),
                "call {n}: sector {i}"
            );
        }
    }
    drop(image);
    check(&storage.inner.to_vec()).assert_sound(&format!("call {n}"));
    let image = open();
    if flushed.is_ok() {
        for (i, sector) in content(&image).chunks(SECTOR).enumerate() {
            assert!(
                possible[i].iter().any(|v| v == sector),
                "call {n}: sector {i} after reopening"
            );
        }
    }
    if let Some(data) = data.filter(|_| raw) {
        let another = "the data file is another disk";
        assert!(
            data.inner.to_vec() == content(&image),
            "call {n}: {another}"
        );
    }
    assert!(
        untouched || failed <= 1,
        "call {n}: one fault, {failed} failures"
    );
    !untouched
}

#[test]
fn every_call_fails_once() {
    for home in [Home::Image, Home::DataFile, Home::RawDataFile] {
        for kind in [ErrorKind::Other, ErrorKind::StorageFull] {
            let mut n = 0;
            while with_fault(n, kind, home) {
                n += 1;
            }
            assert!(n > 200, "only {n} calls");
        }
    }
}

#[test]
fn opening_and_creating_with_faults() {
    for n in 0..30 {
        let storage = FaultStorage::new(Vec::new(), ErrorKind::Other);
        storage.fail_after(n);
        let options = CreateOptions {
            cluster_size: 512,
            ..CreateOptions::new(64 << 10)
        };
        let created = create(Path::new(NAME), storage.clone(), &options);
        let open = OpenOptions::new(Format::Qcow2);
        let opened = Image::open_over(Path::new(NAME), storage.clone(), &open, None);
        if created.is_err() {
            continue;
        }
        let failed = storage.recover();
        assert!(opened.is_ok() || failed, "{:?}", opened.err());
    }
}

/// The bound of the file's size: an error, and everything written before is kept.
#[test]
fn bounded() {
    let storage = Arc::new(MemoryStorage::default());
    let create_options = CreateOptions {
        cluster_size: 4096,
        ..CreateOptions::new(1 << 20)
    };
    create(Path::new(NAME), storage.clone(), &create_options).unwrap();
    let limit = 400 << 10;
    let options = OpenOptions {
        max_file_size: Some(limit),
        ..OpenOptions::new(Format::Qcow2)
    };
    let image = Image::open_over(Path::new(NAME), storage.clone(), &options, None).unwrap();
    let mut written = 0;
    let error = loop {
        match image.write(written, &[9; 4096]) {
            Ok(()) => written += 4096,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::StorageFull);
    assert!(image.file_len().unwrap() <= limit);
    assert!(written > limit - 64 * 1024);
    // What is in place can still be written, and what is given back can be used again.
    image.write(0, &[8; 4096]).unwrap();
    image.discard(8192, 4 * 4096).unwrap();
    for i in 0..4 {
        image.write(written + i * 4096, &[7; 4096]).unwrap();
    }
    assert!(image.write(written + 4 * 4096, &[7; 4096]).is_err());
    image.flush().unwrap();
    let mut now = vec![0; 4096];
    image.read(written, &mut now).unwrap();
    assert_eq!(now, [7; 4096]);
    drop(image);
    check(&storage.to_vec()).assert_clean("filled");
}
