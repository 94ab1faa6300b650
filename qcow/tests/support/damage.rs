//! Images of all kinds by QEMU's tools, and damage to their metadata.

use std::path::Path;
use std::process::Command;

use super::encryption::{self, Qemu};
use super::{Random, qemu_create};

/// An image of QEMU's, made in a folder of its own.
pub struct Kind {
    pub name: &'static str,
    pub options: &'static str,
    pub compressed: bool,
    pub snapshots: bool,
    pub bitmaps: bool,
    /// In the order of a chain.
    pub passwords: &'static [&'static str],
}

pub const KINDS: &[Kind] = &[
    kind("plain", "cluster_size=64k"),
    kind("small clusters", "cluster_size=512"),
    kind("version 2", "cluster_size=4k,compat=0.10"),
    kind("refcounts of 64 bits", "cluster_size=512,refcount_bits=64"),
    Kind {
        snapshots: false,
        ..kind("refcounts of 1 bit", "cluster_size=1k,refcount_bits=1")
    },
    // Compressed clusters that share a cluster would need more than 15 references.
    Kind {
        compressed: false,
        ..kind("refcounts of 4 bits", "cluster_size=4k,refcount_bits=4")
    },
    kind("large clusters", "cluster_size=2M"),
    Kind {
        compressed: false,
        ..kind("preallocated", "cluster_size=4k,preallocation=metadata")
    },
    kind("subclusters", "cluster_size=16k,extended_l2=on"),
    kind("zstd", "cluster_size=4k,compression_type=zstd"),
    Kind {
        compressed: false,
        snapshots: false,
        ..kind(
            "data file",
            "cluster_size=4k,data_file=data,data_file_raw=on",
        )
    },
    Kind {
        bitmaps: true,
        ..kind("bitmaps", "cluster_size=4k")
    },
    encrypted(
        "LUKS",
        "cluster_size=4k,encrypt.format=luks,encrypt.iter-time=10",
    ),
    encrypted("legacy AES", "cluster_size=1k,encrypt.format=aes"),
];

const fn encrypted(name: &'static str, options: &'static str) -> Kind {
    Kind {
        passwords: &["moo"],
        ..kind(name, options)
    }
}

const fn kind(name: &'static str, options: &'static str) -> Kind {
    Kind {
        name,
        options,
        compressed: true,
        snapshots: true,
        bitmaps: false,
        passwords: &[],
    }
}

impl Kind {
    /// The image of this name, as QEMU's tools are told of it.
    pub fn qemu<'a>(&'a self, folder: &'a Path, name: &'a str) -> Qemu<'a> {
        let passwords = self.passwords;
        Qemu {
            folder,
            name,
            passwords,
        }
    }
}

/// Makes an image of 1 MiB with a bit of everything.
pub fn make(folder: &Path, kind: &Kind) -> Vec<u8> {
    match kind.passwords {
        [] => qemu_create(folder, kind.options, "disk", "1M"),
        _ => encryption::qemu_create(folder, "disk", kind.options),
    }
    let qemu = kind.qemu(folder, "disk");
    let img = |words: &[&str], after: &[&str]| qemu.run("qemu-img", words, after);
    let commands = |list: &[&str]| {
        let list: Vec<String> = list.iter().map(|&command| command.into()).collect();
        qemu.io(&list);
    };
    commands(&[
        "write -P 1 0 100k",
        "write -P 2 300k 64k",
        "write -P 5 700k 9k",
    ]);
    if !kind.options.contains("0.10") {
        commands(&["write -z 20k 8k", "write -z -u 304k 4k"]);
    }
    if kind.compressed && !kind.options.contains("2M") {
        for (at, pattern) in [(192, 11), (448, 12), (512, 13)] {
            commands(&[&format!("write -c -P {pattern} {at}k 64k")]);
        }
    }
    if kind.snapshots {
        img(&["snapshot", "-c", "one"], &[]);
        commands(&["write -P 6 4k 9k", "write -P 7 450k 4k"]);
        img(&["snapshot", "-c", "two"], &[]);
        commands(&["write -P 8 8k 19k"]);
        img(&["snapshot", "-c", "three"], &[]);
        img(&["snapshot", "-d", "two"], &[]);
    }
    if kind.bitmaps {
        // Granularities that take less than a cluster, and more: small ones for long tables.
        for (name, granularity) in [("first", "64k"), ("second", "512")] {
            img(&["bitmap", "--add", "-g", granularity], &[name]);
        }
        commands(&["write -P 9 600k 200k"]);
    }
    commands(&["discard 320k 16k"]);
    std::fs::read(folder.join("disk")).unwrap()
}

/// How many damaged images of a kind a test tries; by hand more: `CHECK_ROUNDS=1000`.
pub fn rounds(kind: &Kind, usual: u64) -> u64 {
    let rounds = std::env::var("CHECK_ROUNDS").map_or(usual, |rounds| rounds.parse().unwrap());
    // Megabytes to write each time.
    if kind.options.contains("2M") {
        rounds / 4 + 1
    } else {
        rounds
    }
}

/// Exit code and JSON of `qemu-img check`, and what it says beside that.
pub fn qemus(image: &Qemu<'_>) -> (i32, String) {
    let output = Command::new("qemu-img")
        .args(["check", "--output=json"])
        .args(image.arguments())
        .current_dir(image.folder)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.code().unwrap(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

fn be64(bytes: &[u8], at: usize) -> usize {
    bytes
        .get(at..at + 8)
        .map_or(0, |b| u64::from_be_bytes(b.try_into().unwrap()) as usize)
}

/// Places of metadata: ranges in which a damaged byte tells.
pub fn hot_spots(image: &[u8]) -> Vec<(usize, usize)> {
    let number = |at: usize| u32::from_be_bytes(image[at..at + 4].try_into().unwrap()) as usize;
    let cluster = 1 << number(20);
    let table = be64(image, 48);
    let (l1, l1_len) = (be64(image, 40), number(36) * 8);
    let mut spots = vec![(l1, l1_len), (table, 32)];
    spots.extend(
        (0..4)
            .map(|i| be64(image, table + i * 8))
            .filter(|&b| b > 0)
            .map(|b| (b, cluster.min(256))),
    );
    for i in 0..l1_len / 8 {
        let l2 = be64(image, l1 + i * 8) & 0x00ff_ffff_ffff_fe00;
        if l2 > 0 && l2 < image.len() {
            spots.push((l2, cluster.min(2048)));
            spots.push((l2, cluster.min(256)));
        }
    }
    if number(60) > 0 {
        spots.push((be64(image, 64), 40));
        spots.push((be64(image, be64(image, 64)), l1_len));
    }
    spots
}

/// Damage that a repair can undo: to refcounts, to the table of their blocks, to COPIED.
pub fn wear(image: &mut [u8], random: &mut Random) {
    let (table, l1) = (be64(image, 48), be64(image, 40));
    let blocks = (0..8)
        .map(|i| be64(image, table + i * 8))
        .take_while(|&block| block > 0);
    let blocks: Vec<usize> = blocks.collect();
    let l2 = be64(image, l1) & 0x00ff_ffff_ffff_fe00;
    match random.below(8) {
        0 => {
            let at = table + random.below(blocks.len() as u64) as usize * 8;
            image[at..at + 8].fill(0);
        }
        1..=4 if !blocks.is_empty() => {
            let block = blocks[random.below(blocks.len() as u64) as usize];
            image[block + random.below(256) as usize] = random.below(3) as u8;
        }
        _ => {
            let at = l2 + random.below(16) as usize * 8;
            if let Some(byte) = image.get_mut(at) {
                *byte ^= 0x80;
            }
        }
    }
}

/// Flips a bit, or replaces an entry by another one, or changes a byte.
pub fn damage(image: &mut [u8], hot: &[(usize, usize)], random: &mut Random) {
    let (start, len) = hot[random.below(hot.len() as u64) as usize];
    let at = start + random.below(len as u64) as usize;
    match random.below(4) {
        0 => image[at] ^= 1 << random.below(8),
        1 => image[at] = random.next() as u8,
        2 => {
            let (from, from_len) = hot[random.below(hot.len() as u64) as usize];
            let from = from + random.below(from_len as u64) as usize / 8 * 8;
            let to = start + (at - start) / 8 * 8;
            let entry: Vec<u8> = image[from..from + 8].to_vec();
            image[to..to + 8].copy_from_slice(&entry);
        }
        _ => {
            let to = start + (at - start) / 8 * 8;
            image[to..to + 8].fill(0);
        }
    }
}
