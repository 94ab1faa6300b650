//! The names of file systems and partitions, as PID 1 reads them, on volumes that the real tools
//! made. PID 1 has no test harness of its own: the modules that do this need nothing of it.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

extern crate alloc;

#[path = "../init/src/filesystem.rs"]
mod filesystem;
#[path = "../init/src/partition_table.rs"]
mod partition_table;
#[path = "../init/src/volume.rs"]
mod volume;

mod tool;

use std::cell::Cell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use partition_table::PartitionTable;
use tempfile::TempDir;
use tool::tool;
use volume::{Name, Names};

const UUID: &str = "0f3c5a7e-1b2d-4c6f-8a90-abcdef012345";

fn volume_of(folder: &TempDir, size: u64) -> PathBuf {
    let path = folder.path().join("volume");
    File::create(&path).unwrap().set_len(size).unwrap();
    path
}

fn read(path: &Path) -> impl Fn(u64, &mut [u8]) -> bool {
    let file = File::open(path).unwrap();
    move |offset, into| file.read_exact_at(into, offset).is_ok()
}

fn names(uuid: &str, label: &str) -> Names {
    Names {
        uuid: Some(uuid.to_owned()),
        label: (!label.is_empty()).then(|| label.to_owned()),
    }
}

#[test]
fn file_systems_are_told_with_their_names() {
    let made = [
        (
            "ext4",
            "e2fsprogs",
            format!("mkfs.ext4 -q -F -U {UUID} -L rust-root FILE"),
        ),
        (
            "ext4",
            "e2fsprogs",
            format!("mkfs.ext2 -q -F -U {UUID} -L sixteen-letters! FILE"),
        ),
        (
            "ext4",
            "e2fsprogs",
            format!("mkfs.ext4 -q -F -U {UUID} FILE"),
        ),
        (
            "xfs",
            "xfsprogs",
            format!("mkfs.xfs -q -m uuid={UUID} -L twelve-long! FILE"),
        ),
        (
            "btrfs",
            "btrfs-progs",
            format!("mkfs.btrfs -q -U {UUID} -L a-label-of-some-length FILE"),
        ),
    ];
    for (kind, package, words) in made {
        let folder = TempDir::new().unwrap();
        let path = volume_of(&folder, 300 << 20);
        tool(package, &words, &path, "");
        let found = filesystem::identify(&read(&path)).unwrap();
        let label = words.split(' ').skip_while(|word| *word != "-L").nth(1);
        assert_eq!(found.kind, kind);
        assert_eq!(
            found.names,
            names(UUID, label.unwrap_or_default()),
            "{words}"
        );
    }
}

#[test]
fn an_empty_volume_has_no_file_system_and_no_table() {
    let folder = TempDir::new().unwrap();
    for size in [0, 512, 1 << 20] {
        let path = volume_of(&folder, size);
        assert_eq!(filesystem::identify(&read(&path)), None);
        assert_eq!(PartitionTable::of(&read(&path)), None);
    }
}

/// A disk with a GUID partition table of two partitions, numbers 1 and 5.
fn gpt(folder: &TempDir, sector_size: u32) -> PathBuf {
    let path = volume_of(folder, 16 << 20);
    // A new table, partitions 1 and 5; among the expert's commands: names, a UUID.
    let script = format!(
        "g\nn\n1\n\n+2M\nn\n5\n\n+4M\n\
         x\nn\n1\nboot\nn\n5\nKuhstall für alle\nu\n5\n{UUID}\nr\nw\n"
    );
    tool(
        "fdisk",
        &format!("fdisk -b {sector_size} FILE"),
        &path,
        &script,
    );
    path
}

#[test]
fn a_gpt_names_its_partitions() {
    for sector_size in [512, 4096] {
        let folder = TempDir::new().unwrap();
        let path = gpt(&folder, sector_size);
        let read = read(&path);
        let table = PartitionTable::of(&read).unwrap();
        let first = table.names(&read, 1).unwrap();
        assert_eq!(first.label.as_deref(), Some("boot"));
        assert_ne!(first.uuid.as_deref(), Some(UUID));
        assert_eq!(
            table.names(&read, 5),
            Some(names(UUID, "Kuhstall für alle"))
        );
        assert_eq!(table.names(&read, 0), None);
        assert_eq!(table.names(&read, 129), None, "there are 128 entries");
    }
}

#[test]
fn an_mbr_names_its_partitions_by_their_numbers() {
    let folder = TempDir::new().unwrap();
    let path = volume_of(&folder, 16 << 20);
    let script = "label: dos\nlabel-id: 0x0badcafe\nsize=1M\nsize=4M, type=extended\n\
                  size=1M, type=linux\n";
    tool("fdisk", "sfdisk --quiet FILE", &path, script);
    let read = read(&path);
    let table = PartitionTable::of(&read).unwrap();
    assert_eq!(table.names(&read, 1), Some(names("0badcafe-01", "")));
    // A partition within the extended one; the number is in hexadecimal digits.
    assert_eq!(table.names(&read, 5), Some(names("0badcafe-05", "")));
    assert_eq!(table.names(&read, 12), Some(names("0badcafe-0c", "")));
}

#[test]
fn a_table_that_lies_costs_a_few_reads_and_finds_nothing() {
    let folder = TempDir::new().unwrap();
    let path = gpt(&folder, 512);
    // First entry's sector, number of entries, size of one.
    let lies: [(u64, &[u8]); 4] = [
        (512 + 72, &[0xff; 8]),
        (512 + 72, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 0]),
        (512 + 80, &[0; 4]),
        (512 + 84, &[127, 0, 0, 0]),
    ];
    for (offset, lie) in lies {
        let reads = Cell::new(0);
        let honest = read(&path);
        let lying = |at: u64, into: &mut [u8]| {
            reads.set(reads.get() + 1);
            if at == offset {
                into.copy_from_slice(&lie[..into.len()]);
                return true;
            }
            honest(at, into)
        };
        let found = PartitionTable::of(&lying).and_then(|table| table.names(&lying, 5));
        assert_eq!(found, None, "{offset:#x} {lie:x?}");
        assert!(reads.get() < 20);
    }
}

#[test]
fn names_are_compared_as_they_are_meant() {
    let names = names(UUID, "root");
    assert!(Name::Uuid(UUID.to_uppercase()).is_in(&names));
    assert!(Name::Label("root".to_owned()).is_in(&names));
    assert!(!Name::Label("Root".to_owned()).is_in(&names));
    assert!(!Name::Uuid("root".to_owned()).is_in(&names));
    assert!(!Name::Label(String::new()).is_in(&Names::default()));
}
