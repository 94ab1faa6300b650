//! Counters for as many clusters as memory is allowed for.

/// What is known of one cluster.
#[derive(Clone, Copy, Default)]
pub(super) struct Counter {
    /// Its refcount in the file; what is larger than fits is the largest.
    pub(super) stored: u32,
    /// References that were counted, and [`METADATA`].
    references: u32,
}

/// Set once a table was counted: nothing else may be there.
const METADATA: u32 = 1 << 31;

impl Counter {
    pub(super) fn references(self) -> u32 {
        self.references & !METADATA
    }

    pub(super) fn is_metadata(self) -> bool {
        self.references & METADATA != 0
    }

    pub(super) fn add(&mut self, references: u32) {
        let sum = self
            .references()
            .saturating_add(references)
            .min(METADATA - 1);
        self.references = self.references & METADATA | sum;
    }

    pub(super) fn mark(&mut self) {
        self.references |= METADATA;
    }
}

/// A unit that no refcount block counts.
const NONE: u32 = u32::MAX;
/// A unit that another window counts.
const ELSEWHERE: u32 = NONE - 1;

/// Counters for some units of clusters. A unit is what a refcount block counts, or a part of that
/// where memory is short; units that no block counts take no room.
pub(super) struct Window {
    unit_bits: u32,
    /// By unit: its place among `counters`.
    slots: Vec<u32>,
    /// Units of this window, ascending.
    units: Vec<u64>,
    counters: Vec<Counter>,
}

/// Where a cluster's counter is.
pub(super) enum Place<'a> {
    Here(&'a mut Counter),
    Elsewhere,
    /// No block counts it: its refcount is zero.
    Nowhere,
}

impl Window {
    /// A window on nothing, for units of `1 << unit_bits` clusters of which `counted` have a block.
    pub(super) fn new(unit_bits: u32, units: u64, counted: &[u64]) -> Self {
        let mut slots = vec![NONE; units as usize];
        for &unit in counted {
            if let Some(slot) = slots.get_mut(unit as usize) {
                *slot = ELSEWHERE;
            }
        }
        Window {
            unit_bits,
            slots,
            units: Vec::new(),
            counters: Vec::new(),
        }
    }

    /// Moves to other units; their counters are zero.
    pub(super) fn move_to(&mut self, units: &[u64]) {
        for (unit, slot) in self.units.iter().map(|&unit| (unit, ELSEWHERE)) {
            if let Some(place) = self.slots.get_mut(unit as usize) {
                *place = slot;
            }
        }
        for (slot, &unit) in units.iter().enumerate() {
            if let Some(place) = self.slots.get_mut(unit as usize) {
                *place = slot as u32;
            }
        }
        self.units = units.to_vec();
        self.counters.clear();
        self.counters
            .resize(units.len() << self.unit_bits, Counter::default());
    }

    /// The counter of a cluster.
    pub(super) fn at(&mut self, cluster: u64) -> Place<'_> {
        let unit = usize::try_from(cluster >> self.unit_bits).unwrap_or(usize::MAX);
        match self.slots.get(unit).copied().unwrap_or(NONE) {
            NONE => Place::Nowhere,
            ELSEWHERE => Place::Elsewhere,
            slot => {
                let within = cluster & ((1 << self.unit_bits) - 1);
                let index = ((slot as usize) << self.unit_bits) + within as usize;
                self.counters
                    .get_mut(index)
                    .map_or(Place::Elsewhere, Place::Here)
            }
        }
    }

    /// Brings clusters' counters into the processor's cache. One after the other, between all that
    /// is done with each, they would be waited for one by one; here the waits overlap.
    pub(super) fn fetch(&mut self, clusters: impl Iterator<Item = u64>) {
        let mut sum = 0_u32;
        for cluster in clusters {
            if let Place::Here(counter) = self.at(cluster) {
                sum ^= counter.stored;
            }
        }
        std::hint::black_box(sum);
    }

    /// Each unit's first cluster, and its counters.
    pub(super) fn units(&mut self) -> impl Iterator<Item = (u64, &mut [Counter])> {
        let bits = self.unit_bits;
        let starts = self.units.iter().map(move |unit| unit << bits);
        starts.zip(self.counters.chunks_exact_mut(1 << bits))
    }
}
