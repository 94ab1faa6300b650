//! What an operation changes in the refcounts, many at a time: summed up in memory for a window of
//! the file's clusters, then written block by block.

use std::collections::BTreeSet;
use std::ops::Range;

use super::tree::Tree;
use crate::error::{Error, Result, Violation};
use crate::holes::Data;
use crate::qcow2::Qcow2;
use crate::refcount;

/// Clusters that are summed up at a time, in 16 MiB of memory: 256 GiB of 64 KiB clusters. The
/// trees are read again for each window. A multiple of what a slice of refcounts counts.
const WINDOW: u64 = 1 << 22;

/// References that come and go, as a sum for each cluster.
pub(crate) struct Recount<'a> {
    qcow2: &'a Qcow2,
    trees: Vec<(&'a Tree, i32)>,
    dropped: Vec<Range<u64>>,
    /// Clusters in the file.
    clusters: u64,
    /// Where windows begin: those with a cluster that a refcount block counts.
    windows: Vec<u64>,
    window: Option<Window>,
}

/// The sums for the clusters from `first` on.
struct Window {
    first: u64,
    sums: Vec<i32>,
    /// References that come or go in it, and in all.
    references: (u64, u64),
}

/// A cluster whose sum is not zero.
struct Visit {
    cluster: u64,
    /// Its refcount, and where in the file that is.
    count: u64,
    at: u64,
    sum: i64,
}

impl<'a> Recount<'a> {
    /// Nothing changes yet in an image whose file ends at `file_len`.
    pub(crate) fn new(qcow2: &'a Qcow2, file_len: u64) -> Self {
        Recount {
            qcow2,
            trees: Vec::new(),
            dropped: Vec::new(),
            clusters: qcow2.geometry.clusters(file_len),
            windows: Vec::new(),
            window: None,
        }
    }

    /// What a tree refers to, its L2 tables among them, gets (1) or loses (-1) a reference.
    pub(crate) fn tree(&mut self, tree: &'a Tree, change: i32) {
        self.trees.push((tree, change));
    }

    /// The clusters of a table that has an end lose their reference.
    pub(crate) fn drop_table(&mut self, clusters: Range<u64>) {
        self.dropped.push(clusters);
    }

    /// The tables that have an end.
    pub(crate) fn dropped(&self) -> impl Iterator<Item = u64> {
        self.dropped.iter().cloned().flatten()
    }

    /// Whether each refcount has the references that are there, and room for those that come, and
    /// none of metadata that stays becomes zero.
    pub(crate) fn check(&mut self) -> Result<()> {
        let order = self.qcow2.state().tables.header.refcount_order;
        let most = u64::MAX >> (64 - (1 << order));
        self.windows = self.find_windows()?;
        let (mut counted, mut all) = (0, 0);
        for first in self.windows.clone() {
            let window = self.sum_up(first)?;
            counted += window.references.0;
            all = window.references.1;
            let mut freed = Vec::new();
            self.visit(&window, |sum| sum != 0, &mut |visit| {
                let &Visit { count, sum, .. } = visit;
                let new = count.checked_add_signed(sum).filter(|&new| new <= most);
                if count < sum.unsigned_abs() {
                    return Err(self.too_low(visit));
                }
                match new {
                    None => return Err(self.too_high(visit, 1 << order)),
                    Some(0) => freed.push(visit.cluster),
                    Some(_) => {}
                }
                Ok(count)
            })?;
            self.may_free(&freed)?;
            self.window = Some(window);
        }
        if counted == all {
            Ok(())
        } else {
            Err(self.uncounted(counted, all))
        }
    }

    /// Raises what has to be raised, and makes that durable.
    pub(crate) fn raise(&mut self) -> Result<()> {
        let mut raised = false;
        for first in self.windows.clone() {
            let window = self.sum_up(first)?;
            raised |= self.visit(&window, |sum| sum > 0, &mut |visit| {
                Ok(visit.count.saturating_add_signed(visit.sum))
            })?;
            self.window = Some(window);
        }
        if raised {
            self.qcow2.host.sync()
        } else {
            Ok(())
        }
    }

    /// Lowers what has to be lowered, makes that durable, and frees what nothing refers to.
    pub(crate) fn lower(&mut self) -> Result<()> {
        for first in self.windows.clone() {
            let window = self.sum_up(first)?;
            let mut freed = Vec::new();
            let lowered = self.visit(&window, |sum| sum < 0, &mut |visit| {
                let new = visit.count.saturating_add_signed(visit.sum);
                if new == 0 {
                    freed.push(visit.cluster);
                }
                Ok(new)
            })?;
            if lowered {
                self.qcow2.host.sync()?;
                self.qcow2.give_back(freed);
            }
            self.window = Some(window);
        }
        Ok(())
    }

    /// Windows beyond those would be looked at for nothing: a file can be mostly hole.
    fn find_windows(&self) -> Result<Vec<u64>> {
        let (host, cluster) = (&self.qcow2.host, self.qcow2.geometry.cluster());
        let mut state = self.qcow2.state();
        let (_, writing) = self.qcow2.split(&mut state)?;
        let per_block = writing.refcounts.per_block();
        let firsts = (0..).step_by(per_block as usize);
        let blocks = firsts.zip(&writing.refcounts.table);
        let blocks: Vec<(u64, u64)> = blocks
            .filter(|(first, block)| **block != 0 && *first < self.clusters)
            .map(|(first, block)| (first, *block))
            .collect();
        let mut data = Data::new(host, blocks.len() as u64 * cluster)?;
        // One is looked at in any case, for what nothing counts.
        let mut windows = BTreeSet::from([0]);
        for (first, block) in blocks {
            if data.is_in(block, cluster)? {
                windows.extend(first / WINDOW..=(first + per_block - 1) / WINDOW);
            }
        }
        let firsts = windows.into_iter().map(|window| window * WINDOW);
        Ok(firsts.filter(|first| *first < self.clusters).collect())
    }

    /// The window that begins at `first`, which is often the one that is there.
    fn sum_up(&mut self, first: u64) -> Result<Window> {
        if let Some(window) = self.window.take_if(|window| window.first == first) {
            return Ok(window);
        }
        let len = WINDOW.min(self.clusters - first);
        let mut sums = vec![0_i32; len as usize];
        // The loop is tight, because almost every step waits for memory.
        let mut references = (0, 0);
        let mut add = |clusters: &[u64], change: i32| {
            references.1 += clusters.len() as u64;
            for cluster in clusters {
                if let Some(sum) = sums.get_mut(cluster.wrapping_sub(first) as usize) {
                    *sum = sum.saturating_add(change);
                    references.0 += 1;
                }
            }
        };
        self.dropped().for_each(|cluster| add(&[cluster], -1));
        for (tree, change) in &self.trees {
            for table in tree.tables() {
                add(&[self.qcow2.geometry.index(*table)], *change);
            }
            tree.references(self.qcow2, &mut |clusters| add(clusters, *change))?;
        }
        Ok(Window {
            first,
            sums,
            references,
        })
    }

    /// Visits the clusters of a window whose sums are `wanted`, and gives them the refcounts that
    /// `visit` returns. Whether any differs.
    fn visit(
        &self,
        window: &Window,
        wanted: impl Fn(i32) -> bool,
        visit: &mut impl FnMut(&Visit) -> Result<u64>,
    ) -> Result<bool> {
        let qcow2 = self.qcow2;
        let (per_block, per_slice, order) = {
            let mut state = qcow2.state();
            let (tables, writing) = qcow2.split(&mut state)?;
            let refcounts = &writing.refcounts;
            let order = tables.header.refcount_order;
            (refcounts.per_block(), refcounts.per_slice(), order)
        };
        let end = window.first + window.sums.len() as u64;
        let mut any = false;
        let mut next = window.first;
        while next < end {
            let block_start = next - next % per_block;
            let of_block = next..end.min(block_start + per_block);
            next = of_block.end;
            let sums = window.of(of_block.clone());
            let is_wanted = |sum: &i32| wanted(*sum);
            let (Some(first), Some(last)) = (
                sums.iter().position(is_wanted),
                sums.iter().rposition(is_wanted),
            ) else {
                continue;
            };
            let (low, high) = (of_block.start + first as u64, of_block.start + last as u64);
            // Whole slices, as the cache has them.
            let from = low - low % per_slice;
            let len = (high + 1 - from).next_multiple_of(per_slice);
            let block = {
                let mut state = qcow2.state();
                let (_, writing) = qcow2.split(&mut state)?;
                writing.refcounts.block(&qcow2.host, low)?
            };
            let at = block.unwrap_or(0) + (((from - block_start) << order) / 8);
            let mut bytes = vec![0; ((len << order) / 8) as usize];
            if block.is_some() {
                qcow2.host.read(at, &mut bytes)?;
            }
            let mut changed = false;
            let sums = (of_block.start..)
                .zip(sums)
                .filter(|(_, sum)| wanted(**sum));
            for (cluster, &sum) in sums {
                let (index, sum) = (cluster - from, i64::from(sum));
                let count = refcount::get(&bytes, index, order);
                let at = at + (index << order) / 8;
                let new = visit(&Visit {
                    cluster,
                    count,
                    at,
                    sum,
                })?;
                if new != count {
                    refcount::set(&mut bytes, index, order, new);
                    changed = true;
                }
            }
            if changed {
                let mut state = qcow2.state();
                let (_, writing) = qcow2.split(&mut state)?;
                writing.refcounts.blocks.forget(at, bytes.len() as u64);
                drop(state);
                qcow2.host.write(at, &bytes)?;
                any = true;
            }
        }
        Ok(any)
    }

    /// Metadata that stays must not be freed.
    fn may_free(&self, freed: &[u64]) -> Result<()> {
        let mut state = self.qcow2.state();
        let (_, writing) = self.qcow2.split(&mut state)?;
        let cluster_bytes = self.qcow2.geometry.cluster();
        for cluster in freed.iter().filter(|&&c| writing.metadata.contains(c)) {
            let offset = cluster * cluster_bytes;
            let is_table = self.trees.iter().any(|(tree, _)| tree.has(offset));
            if !is_table && !self.dropped.iter().any(|range| range.contains(cluster)) {
                let (field, expected) = ("cluster", "no metadata of another kind");
                let value = "what a snapshot refers to as its own";
                let violation = Violation::new(field, offset, value, expected);
                return Err(self.qcow2.host.invalid(violation));
            }
        }
        Ok(())
    }

    fn uncounted(&self, counted: u64, all: u64) -> Error {
        let at = self.qcow2.state().tables.header.refcount_table_offset;
        let value = format!("blocks for {counted} of {all} references");
        let violation = Violation::new("refcount table", at, value, "blocks for all of them");
        self.qcow2.host.invalid(violation)
    }

    fn too_low(&self, visit: &Visit) -> Error {
        let cluster = visit.cluster * self.qcow2.geometry.cluster();
        let field = format!("refcount of the cluster at {cluster:#x}");
        let expected = format!("at least {}", visit.sum.unsigned_abs());
        let violation = Violation::new(field, visit.at, visit.count, expected);
        self.qcow2.host.invalid(violation)
    }

    fn too_high(&self, visit: &Visit, bits: u32) -> Error {
        let (cluster, count) = (visit.cluster * self.qcow2.geometry.cluster(), visit.count);
        Error::Change {
            file: self.qcow2.host.path.clone(),
            reason: format!(
                "the cluster at {cluster:#x} has the refcount {count}, and refcounts of {bits} \
                 bits have no room for more: delete a snapshot, or convert the image to larger ones"
            ),
        }
    }
}

impl Window {
    /// The sums of a range of its clusters.
    fn of(&self, clusters: Range<u64>) -> &[i32] {
        let range = (clusters.start - self.first) as usize..(clusters.end - self.first) as usize;
        self.sums.get(range).unwrap_or_default()
    }
}
