//! Slices of tables in memory, a bounded number of bytes of them.
//!
//! A slice that was changed is *dirty* until a flush takes its bytes, then *in transit* until the
//! flush has written them; only then can it be evicted, so that a slice that is read back is never
//! older than what was last seen. The order in which slices reach the file is the flush's.

use std::collections::HashMap;

/// Slices by their offset in the file.
#[derive(Debug)]
pub(crate) struct Cache {
    slice_bytes: usize,
    capacity: usize,
    slots: Vec<Slot>,
    index: HashMap<u64, usize>,
    /// The clock's hand: where the search for a slot to reuse goes on.
    hand: usize,
    /// Slots that are dirty or in transit.
    unclean: usize,
    /// Slices that are being read without the lock, each until something else becomes of it.
    loading: Vec<Loading>,
    loads: u64,
}

/// A slice that is being read: by its number, because another may be of the same place.
#[derive(Debug)]
struct Loading {
    number: u64,
    offset: u64,
}

#[derive(Debug)]
struct Slot {
    offset: u64,
    bytes: Vec<u8>,
    used: bool,
    dirty: bool,
    in_transit: bool,
}

impl Slot {
    fn clean(&self) -> bool {
        !self.dirty && !self.in_transit
    }
}

impl Cache {
    /// Keeps at most `bytes`, but at least a few slices.
    pub(crate) fn new(slice_bytes: u64, bytes: usize) -> Self {
        let slice_bytes = slice_bytes as usize;
        Cache {
            slice_bytes,
            capacity: (bytes / slice_bytes).max(4),
            slots: Vec::new(),
            index: HashMap::new(),
            hand: 0,
            unclean: 0,
            loading: Vec::new(),
            loads: 0,
        }
    }

    pub(crate) fn slice_bytes(&self) -> usize {
        self.slice_bytes
    }

    pub(crate) fn contains(&self, offset: u64) -> bool {
        self.index.contains_key(&offset)
    }

    /// Someone is going to read a slice from the file, while others use the cache. The number is for
    /// [`end_load`](Self::end_load).
    pub(crate) fn begin_load(&mut self, offset: u64) -> u64 {
        self.loads += 1;
        let number = self.loads;
        self.loading.push(Loading { number, offset });
        number
    }

    /// Adds what was read since [`begin_load`](Self::begin_load), unless the slice was added or
    /// forgotten meanwhile: then it may be older than the file.
    pub(crate) fn end_load(&mut self, number: u64, bytes: Option<Vec<u8>>) {
        let mut loading = self.loading.iter();
        let Some(at) = loading.position(|load| load.number == number) else {
            return;
        };
        let Loading { offset, .. } = self.loading.swap_remove(at);
        if let Some(bytes) = bytes {
            self.insert(offset, bytes);
        }
    }

    /// The slice at `offset`, if it is here.
    pub(crate) fn get(&mut self, offset: u64) -> Option<&[u8]> {
        let slot = self.slots.get_mut(*self.index.get(&offset)?)?;
        slot.used = true;
        Some(&slot.bytes)
    }

    /// The same to change it: it is dirty from now on.
    pub(crate) fn get_mut(&mut self, offset: u64) -> Option<&mut [u8]> {
        let slot = self.slots.get_mut(*self.index.get(&offset)?)?;
        slot.used = true;
        self.unclean += usize::from(slot.clean());
        slot.dirty = true;
        Some(&mut slot.bytes)
    }

    /// Adds a clean slice, as it was read from the file. Where every slot is dirty the cache
    /// grows past its bound: its user flushes before that is much.
    pub(crate) fn insert(&mut self, offset: u64, bytes: Vec<u8>) {
        self.loading.retain(|load| load.offset != offset);
        let slot = Slot {
            offset,
            bytes,
            used: true,
            dirty: false,
            in_transit: false,
        };
        let at = match self.evictable() {
            Some(at) if self.slots.len() >= self.capacity => {
                self.index.remove(&self.slots[at].offset);
                self.slots[at] = slot;
                at
            }
            _ => {
                self.slots.push(slot);
                self.slots.len() - 1
            }
        };
        self.index.insert(offset, at);
    }

    /// A clean slot that was not used since the hand last passed.
    fn evictable(&mut self) -> Option<usize> {
        if self.slots.len() < self.capacity {
            return None;
        }
        for _ in 0..2 * self.slots.len() {
            let at = self.hand % self.slots.len();
            self.hand = at + 1;
            let slot = &mut self.slots[at];
            if slot.clean() && !std::mem::take(&mut slot.used) {
                return Some(at);
            }
        }
        None
    }

    /// Forgets what lies in a range of the file, because the range is about to become something
    /// else: nothing there is dirty, or it does not matter any more.
    pub(crate) fn forget(&mut self, offset: u64, len: u64) {
        self.loading
            .retain(|load| !(offset..offset + len).contains(&load.offset));
        for at in (offset..offset + len).step_by(self.slice_bytes) {
            if let Some(slot) = self.index.remove(&at).and_then(|i| self.slots.get_mut(i)) {
                self.unclean -= usize::from(!slot.clean());
                // No slice has this offset: the slot is found by the hand alone.
                *slot = Slot {
                    offset: u64::MAX,
                    bytes: Vec::new(),
                    used: false,
                    dirty: false,
                    in_transit: false,
                };
            }
        }
    }

    /// Whether nothing waits to be written.
    pub(crate) fn is_clean(&self) -> bool {
        self.unclean == 0
    }

    /// Whether half of the bound is not clean, so that it is time to flush.
    pub(crate) fn is_strained(&self) -> bool {
        self.unclean > self.capacity / 2
    }

    /// Copies what is dirty, in the file's order, and marks it as in transit.
    pub(crate) fn take_dirty(&mut self) -> Vec<(u64, Vec<u8>)> {
        let mut taken = Vec::new();
        for slot in self.slots.iter_mut().filter(|slot| slot.dirty) {
            slot.dirty = false;
            slot.in_transit = true;
            taken.push((slot.offset, slot.bytes.clone()));
        }
        taken.sort_unstable_by_key(|(offset, _)| *offset);
        taken
    }

    /// What was in transit has arrived, or else is dirty again.
    pub(crate) fn settle(&mut self, arrived: bool) {
        for slot in self.slots.iter_mut().filter(|slot| slot.in_transit) {
            slot.in_transit = false;
            slot.dirty |= !arrived;
            self.unclean -= usize::from(slot.clean());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounded() {
        let mut cache = Cache::new(512, 512 * 8);
        for i in 0..100 {
            cache.insert(i * 512, vec![i as u8; 512]);
        }
        assert_eq!(cache.slots.len(), 8);
        assert_eq!(cache.get(99 * 512).unwrap()[0], 99);
    }

    #[test]
    fn what_is_loaded_too_late_is_not_kept() {
        let mut cache = Cache::new(512, 512 * 4);
        let old = || Some(vec![1; 512]);
        let load = cache.begin_load(0);
        cache.end_load(load, old());
        assert_eq!(cache.get(0).unwrap()[0], 1);
        let loads = [cache.begin_load(512), cache.begin_load(512)];
        cache.insert(512, vec![2; 512]);
        for load in loads {
            cache.end_load(load, old());
        }
        assert_eq!(cache.get(512).unwrap()[0], 2);
        let load = cache.begin_load(1024);
        cache.forget(512, 1024);
        cache.end_load(load, old());
        assert!(!cache.contains(512) && !cache.contains(1024));
        let load = cache.begin_load(1536);
        cache.end_load(load, None);
        assert!(!cache.contains(1536) && cache.loading.is_empty());
    }

    #[test]
    fn a_later_load_is_not_taken_for_an_earlier_one() {
        let mut cache = Cache::new(512, 512 * 4);
        let early = cache.begin_load(0);
        cache.forget(0, 512);
        let late = cache.begin_load(0);
        cache.end_load(early, Some(vec![1; 512]));
        assert!(!cache.contains(0));
        cache.end_load(late, Some(vec![2; 512]));
        assert_eq!(cache.get(0).unwrap()[0], 2);
    }

    #[test]
    fn what_is_dirty_or_in_transit_is_not_evicted() {
        let mut cache = Cache::new(512, 512 * 4);
        cache.insert(0, vec![0; 512]);
        cache.get_mut(0).unwrap()[0] = 7;
        for round in 0..2 {
            for i in 1..50 {
                cache.insert(i * 512 + round * 65536, vec![0; 512]);
            }
            assert_eq!(cache.get(0).unwrap()[0], 7);
            if round == 0 {
                assert_eq!(cache.take_dirty().len(), 1);
                assert!(cache.take_dirty().is_empty());
            }
        }
        cache.settle(false);
        assert_eq!(
            cache.take_dirty().len(),
            1,
            "a failed flush leaves it dirty"
        );
        cache.settle(true);
        assert!(cache.take_dirty().is_empty());
    }
}
