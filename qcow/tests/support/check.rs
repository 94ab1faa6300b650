//! A small checker: counts references by walking the tables, and compares with the refcounts.
//! Written apart from the crate's code, and held against `qemu-img check` by the suite `model`.

use std::collections::{BTreeSet, HashMap};

/// What was found wrong.
#[derive(Debug, Default)]
pub struct Report {
    pub corruptions: Vec<String>,
    pub leaks: Vec<u64>,
    /// All that is live: what each cluster holds, and which one of those it is.
    pub live: HashMap<u64, BTreeSet<(&'static str, u64)>>,
}

impl Report {
    /// Nothing is lost or in danger.
    #[track_caller]
    pub fn assert_sound(&self, what: &str) {
        let found = &self.corruptions;
        assert!(found.is_empty(), "{what}: {found:?}");
    }

    /// Nor is room.
    #[track_caller]
    pub fn assert_clean(&self, what: &str) {
        self.assert_sound(what);
        assert!(self.leaks.is_empty(), "{what}: leaks {:?}", self.leaks);
    }
}

struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn number(&self, at: u64, len: usize) -> u64 {
        let at = at as usize;
        (at..at + len).fold(0, |n, i| {
            n << 8 | u64::from(self.0.get(i).copied().unwrap_or(0))
        })
    }
    fn u16(&self, at: u64) -> u64 {
        self.number(at, 2)
    }
    fn u32(&self, at: u64) -> u64 {
        self.number(at, 4)
    }
    fn u64(&self, at: u64) -> u64 {
        self.number(at, 8)
    }
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

pub fn check(image: &[u8]) -> Report {
    let bytes = Bytes(image);
    let mut report = Report::default();
    let bits = bytes.u32(20);
    let cluster = 1_u64 << bits;
    let v3 = bytes.u32(4) == 3;
    // Clusters in a data file have no refcounts.
    let external = v3 && bytes.u64(72) & 4 != 0;
    let order = if v3 { bytes.u32(96) } else { 4 };
    let extended = v3 && bytes.u64(72) & 1 << 4 != 0;
    let width = if extended { 16 } else { 8 };
    let mut references: HashMap<u64, u64> = HashMap::new();
    let live = &mut report.live;
    let mut count = |offset: u64, len: u64, what: &'static str, which: u64| {
        for c in offset / cluster..(offset + len).div_ceil(cluster) {
            *references.entry(c).or_default() += 1;
            live.entry(c).or_default().insert((what, which));
        }
    };
    let corruptions = &mut report.corruptions;

    count(0, cluster, "header", 0);
    let (l1, l1_entries) = (bytes.u64(40), bytes.u32(36));
    let (table, table_clusters) = (bytes.u64(48), bytes.u32(56));
    count(l1, l1_entries * 8, "L1 table", 0);
    // Where LUKS has its header, an extension says.
    let mut extension = if v3 { bytes.u32(100) } else { 72 };
    while bytes.u32(extension) != 0 && extension < cluster {
        if bytes.u32(extension) == 0x0537_be77 {
            count(
                bytes.u64(extension + 8),
                bytes.u64(extension + 16),
                "LUKS header",
                0,
            );
        }
        extension += 8 + bytes.u32(extension + 4).next_multiple_of(8);
    }
    count(table, table_clusters * cluster, "refcount table", 0);
    let blocks: Vec<u64> = (0..table_clusters * cluster / 8)
        .map(|i| bytes.u64(table + i * 8))
        .collect();
    for block in blocks.iter().filter(|&&block| block != 0) {
        if !block.is_multiple_of(cluster) || *block >= image.len() as u64 {
            corruptions.push(format!("refcount block at {block:#x}"));
        }
        count(*block, cluster, "refcount block", *block);
    }

    for (offset, len) in bitmaps(&bytes, cluster) {
        count(offset, len, "bitmap", 0);
    }

    // The active tree first, then those of the snapshots.
    let mut trees = vec![(l1, l1_entries)];
    let (snapshots, start) = (bytes.u32(60), bytes.u64(64));
    let mut at = start;
    for _ in 0..snapshots {
        trees.push((bytes.u64(at), bytes.u32(at + 8)));
        count(bytes.u64(at), bytes.u32(at + 8) * 8, "L1 table", 0);
        let len = 40 + bytes.u16(at + 12) + bytes.u16(at + 14) + bytes.u32(at + 36);
        at += len.next_multiple_of(8);
    }
    count(start, at - start, "snapshot table", 0);

    let mut copied: Vec<(u64, bool, &str)> = Vec::new();
    for (tree, (l1, entries)) in trees.into_iter().enumerate() {
        for i in 0..entries {
            let entry = bytes.u64(l1 + i * 8);
            let l2 = entry & OFFSET;
            if l2 == 0 {
                continue;
            }
            if !l2.is_multiple_of(cluster) || l2 >= image.len() as u64 {
                corruptions.push(format!("L1 entry {i}: {entry:#x}"));
                continue;
            }
            count(l2, cluster, "L2 table", i);
            if tree == 0 {
                copied.push((l2 / cluster, entry >> 63 == 1, "L2 table"));
            }
            for j in 0..cluster / width {
                let entry = bytes.u64(l2 + j * width);
                let guest = (i * (cluster / width) + j) * cluster;
                if external {
                    if entry & !1 != 0 && entry & !1 != guest | 1 << 63 {
                        let of = format!("L2 entry for {guest:#x}: {entry:#x}");
                        corruptions.push(of);
                    }
                    continue;
                }
                if entry >> 62 & 1 == 1 {
                    let split = 62 - (bits - 8);
                    let offset = entry & ((1 << split) - 1);
                    let sectors = (entry & !(3 << 62)) >> split;
                    let first = offset & !511;
                    let start = first / cluster * cluster;
                    let end = (first + (sectors + 1) * 512).next_multiple_of(cluster);
                    count(start, end - start, "compressed", guest);
                    continue;
                }
                let host = entry & OFFSET;
                if extended {
                    let (zero, alloc) = (
                        bytes.u32(l2 + j * width + 8),
                        bytes.u32(l2 + j * width + 12),
                    );
                    if zero & alloc != 0 || host == 0 && alloc != 0 {
                        let bits = format!("zero {zero:#x}, allocated {alloc:#x}");
                        corruptions.push(format!("L2 entry {j} of {l2:#x}: {entry:#x}, {bits}"));
                    }
                }
                if host == 0 {
                    continue;
                }
                if !host.is_multiple_of(cluster) || host >= image.len() as u64 {
                    corruptions.push(format!("L2 entry {j} of {l2:#x}: {entry:#x}"));
                    continue;
                }
                count(host, cluster, "data", guest);
                if tree == 0 {
                    copied.push((host / cluster, entry >> 63 == 1, "data"));
                }
            }
        }
    }

    let per_block = (cluster * 8) >> order;
    let refcount = |c: u64| {
        let block = blocks.get((c / per_block) as usize).copied().unwrap_or(0);
        if block == 0 {
            return 0;
        }
        let (index, width) = (c % per_block, 1_u64 << order);
        if width >= 8 {
            return bytes.number(block + index * width / 8, width as usize / 8);
        }
        bytes.number(block + index * width / 8, 1) >> (index * width % 8) & ((1 << width) - 1)
    };
    for (&c, &references) in &references {
        if refcount(c) < references {
            let counted = refcount(c);
            report
                .corruptions
                .push(format!("cluster {c}: {references} references, {counted}"));
        }
    }
    for (i, _) in blocks.iter().enumerate().filter(|(_, block)| **block != 0) {
        let first = i as u64 * per_block;
        let referenced = |c| references.get(&c).copied().unwrap_or(0);
        // What is counted past the file's end takes no room: no leak, as QEMU has it.
        let end = (first + per_block).min((image.len() as u64).div_ceil(cluster));
        let leaked = (first..end).filter(|&c| refcount(c) > referenced(c));
        report.leaks.extend(leaked);
    }
    for (c, flag, what) in copied {
        let counted = refcount(c);
        if flag != (counted == 1) {
            let flag = u8::from(flag);
            report.corruptions.push(format!(
                "{what} in cluster {c}: COPIED is {flag} at {counted}"
            ));
        }
    }
    report
}

/// Places of the bitmaps' directory, tables and bits, if the autoclear bit says that they count.
fn bitmaps(bytes: &Bytes<'_>, cluster: u64) -> Vec<(u64, u64)> {
    let mut places = Vec::new();
    if bytes.u32(4) < 3 || bytes.u64(88) & 1 == 0 {
        return places;
    }
    let mut at = bytes.u32(100);
    while bytes.u32(at) != 0x2385_2875 {
        if bytes.u32(at) == 0 {
            return places;
        }
        at += 8 + bytes.u32(at + 4).next_multiple_of(8);
    }
    let (count, len, directory) = (bytes.u32(at + 8), bytes.u64(at + 16), bytes.u64(at + 24));
    places.push((directory, len));
    let mut at = directory;
    for _ in 0..count {
        let (table, entries) = (bytes.u64(at), bytes.u32(at + 8));
        places.push((table, entries * 8));
        let clusters = (0..entries).map(|i| bytes.u64(table + i * 8) & OFFSET);
        places.extend(clusters.filter(|at| *at != 0).map(|at| (at, cluster)));
        at += (24 + bytes.u32(at + 20) + bytes.u16(at + 18)).next_multiple_of(8);
    }
    assert_eq!(at, directory + len, "the directory's length");
    places
}
