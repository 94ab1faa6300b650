use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::*;

/// An unpacked kernel that differs from another by its code alone.
fn elf(code: &[u8; 4]) -> Vec<u8> {
    elf_file(MIB, &[segment(MIB, code, 0x2000)])
}

/// Loads the bzImage at `path` and gives the code that is in guest memory then.
fn boot(path: &Path, folder: &Path) -> Vec<u8> {
    let memory = memory(4);
    let kernel = Kernel {
        image: Source::File(&File::open(path).unwrap()),
        initrd: &[],
        cmdline: "",
        rsdp: None,
        unpacked: Some(&UnpackedKernels::new(folder.to_path_buf())),
    };
    load(&memory, &kernel).unwrap();
    read(&memory, MIB, 4)
}

fn kept(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn a_kernel_is_unpacked_once_and_again_when_it_has_changed() {
    let work = tempfile::tempdir().unwrap();
    let (path, folder) = (work.path().join("bzImage"), work.path().join("a/b"));
    fs::write(&path, bzimage_file(&gzip(&elf(b"old.")))).unwrap();
    assert_eq!(boot(&path, &folder), b"old.");
    let [first] = &kept(&folder)[..] else {
        panic!("one is kept")
    };
    assert_eq!(fs::read(first).unwrap(), elf(b"old."));

    // What is kept is what boots.
    fs::write(first, elf(b"kept")).unwrap();
    assert_eq!(boot(&path, &folder), b"kept");
    // Of another size than the bzImage says, it is not, and is made anew.
    fs::write(first, &elf(b"kept")[1..]).unwrap();
    assert_eq!(boot(&path, &folder), b"old.");
    assert_eq!(fs::read(first).unwrap(), elf(b"old."));

    fs::write(&path, bzimage_file(&gzip(&elf(b"new.")))).unwrap();
    assert_eq!(boot(&path, &folder), b"new.");
    assert_eq!(kept(&folder).len(), 2);
}

#[test]
fn a_few_are_kept() {
    let work = tempfile::tempdir().unwrap();
    let folder = work.path().join("unpacked");
    for number in *b"0123456789" {
        let path = work.path().join(char::from(number).to_string());
        fs::write(&path, bzimage_file(&gzip(&elf(&[number; 4])))).unwrap();
        assert_eq!(boot(&path, &folder), [number; 4]);
    }
    assert_eq!(kept(&folder).len(), 4);
}

#[test]
fn a_kernel_that_cannot_be_kept_boots_all_the_same() {
    let work = tempfile::tempdir().unwrap();
    let (path, no_folder) = (work.path().join("bzImage"), work.path().join("file"));
    fs::write(&path, bzimage_file(&gzip(&elf(b"code")))).unwrap();
    fs::write(&no_folder, "").unwrap();
    assert_eq!(boot(&path, &no_folder), b"code");
}
