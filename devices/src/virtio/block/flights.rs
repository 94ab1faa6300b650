//! Requests that were begun and are not answered yet.

use super::disk::{Commit, Pin};
use super::request::Operation;
use crate::virtio::buffers::Buffers;
use crate::virtio::queue::Chain;

/// A request that was begun.
pub(super) struct Flight {
    pub(super) chain: Chain,
    /// Where the status byte goes.
    pub(super) status: Buffers,
    /// What to do; not here while the pool does it.
    pub(super) operation: Option<Operation>,
    /// Keeps what the ring reads or writes from being freed.
    pub(super) pin: Option<Pin>,
    /// Names what the ring writes.
    pub(super) commit: Option<Commit>,
    /// Parts that the ring has to move yet.
    pub(super) parts: usize,
    /// The ring has failed at a part.
    pub(super) failed: bool,
}

/// Requests by the numbers that they have in the ring and in the pool.
#[derive(Default)]
pub(super) struct Flights {
    slots: Vec<Option<Flight>>,
    free: Vec<usize>,
}

impl Flights {
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Gives a request its number.
    pub(super) fn insert(&mut self, flight: Flight) -> usize {
        match self.free.pop() {
            Some(at) => {
                self.slots[at] = Some(flight);
                at
            }
            None => {
                self.slots.push(Some(flight));
                self.slots.len() - 1
            }
        }
    }

    pub(super) fn get_mut(&mut self, at: usize) -> Option<&mut Flight> {
        self.slots.get_mut(at)?.as_mut()
    }

    pub(super) fn remove(&mut self, at: usize) -> Option<Flight> {
        let flight = self.slots.get_mut(at)?.take()?;
        self.free.push(at);
        Some(flight)
    }
}
