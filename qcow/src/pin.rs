//! Epochs: a freed cluster waits for every request that began before it was freed.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use crate::sync::{Mutex, MutexGuard, Signal};

/// Counts the requests that run, by the epoch in which they began.
#[derive(Debug, Default)]
pub(crate) struct Pins {
    state: Mutex<State>,
    /// Signalled when the last request of an epoch has ended.
    ended: Signal,
}

#[derive(Debug, Default)]
struct State {
    epoch: u64,
    running: BTreeMap<u64, usize>,
}

/// Keeps the clusters that a plan names from being reused. Drop it after the plan's last I/O.
#[derive(Debug)]
pub struct Pin {
    held: Option<(Arc<Pins>, u64)>,
}

impl State {
    fn drained(&self, epoch: u64) -> bool {
        self.running
            .keys()
            .next()
            .is_none_or(|&oldest| oldest >= epoch)
    }
}

impl Pins {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request begins.
    pub(crate) fn pin(self: &Arc<Self>) -> Pin {
        let mut state = self.state();
        let epoch = state.epoch;
        *state.running.entry(epoch).or_default() += 1;
        Pin {
            held: Some((Arc::clone(self), epoch)),
        }
    }

    /// Starts an epoch and returns it: requests pinned from now on know nothing of what was
    /// freed before.
    pub(crate) fn advance(&self) -> u64 {
        let mut state = self.state();
        state.epoch += 1;
        state.epoch
    }

    /// Whether every request that began before `epoch` has ended.
    pub(crate) fn drained(&self, epoch: u64) -> bool {
        self.state().drained(epoch)
    }

    /// Waits until every request that has begun has ended.
    pub(crate) fn drain(&self) {
        let epoch = self.advance();
        let mut state = self.state();
        while !state.drained(epoch) {
            state = self.ended.wait(state);
        }
    }
}

impl Pin {
    /// For storage in which nothing is ever moved.
    pub(crate) fn none() -> Self {
        Pin { held: None }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let Some((pins, epoch)) = self.held.take() else {
            return;
        };
        let mut state = pins.state();
        if let Some(count) = state.running.get_mut(&epoch) {
            *count -= 1;
            if *count == 0 {
                state.running.remove(&epoch);
                pins.ended.notify_all();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_drains_when_its_last_pin_drops() {
        let pins = Arc::new(Pins::default());
        let (first, second) = (pins.pin(), pins.pin());
        let epoch = pins.advance();
        let later = pins.pin();
        assert!(!pins.drained(epoch));
        drop(first);
        assert!(!pins.drained(epoch));
        drop(second);
        assert!(pins.drained(epoch));
        drop(later);
    }
}
