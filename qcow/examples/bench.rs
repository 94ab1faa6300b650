//! Requests to an image one after another, as `qemu-img bench -d 1 -c COUNT -s SIZE -S STEP [-w]`
//! makes them: `bench IMAGE COUNT SIZE STEP [write]`. Each begins STEP bytes after the one before,
//! and starts over at the disk's end. `tests/bench/qcow.py` compares the two.

use std::error::Error;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use cowshed_qcow::{FileStorage, Format, Image, OpenOptions, Opener, Storage};

const PAGE: usize = 4096;

struct Files;

impl Opener for Files {
    fn open(&self, path: &Path, writable: bool) -> io::Result<Arc<dyn Storage>> {
        let file = File::options().read(true).write(writable).open(path)?;
        Ok(Arc::new(FileStorage::new(file)))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [image, count, size, step, rest @ ..] = &words[..] else {
        return Err("bench IMAGE COUNT SIZE STEP [write]".into());
    };
    let (count, size, step): (u64, usize, u64) = (count.parse()?, size.parse()?, step.parse()?);
    let write = !rest.is_empty();
    let options = OpenOptions {
        read_only: !write,
        ..OpenOptions::new(Format::Qcow2)
    };
    let image = Image::open(Path::new(image), &options, &Files)?;
    // As aligned as a guest's pages and as qemu-img's buffer are: the host copies those faster.
    let mut buf = vec![0x55; size + PAGE];
    let aligned = buf.as_ptr().align_offset(PAGE);
    let buf = &mut buf[aligned..][..size];
    let places = image
        .size()
        .checked_sub(size as u64)
        .ok_or("the disk is too small")?
        + 1;
    for i in 0..count {
        let offset = i * step % places;
        if write {
            image.write(offset, buf)?;
        } else {
            image.read(offset, buf)?;
        }
    }
    image.flush()?;
    Ok(())
}
