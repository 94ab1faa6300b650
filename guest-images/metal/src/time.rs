//! Time by the CPU's timestamp counter.

use core::arch::x86_64::_rdtsc;
use core::hint;

/// Cycles to wait for a device that owes an answer, some ten seconds.
const PATIENCE: u64 = 30_000_000_000;

/// The timestamp counter.
pub fn cycles() -> u64 {
    // SAFETY: reads a register; CR4.TSD is clear.
    unsafe { _rdtsc() }
}

/// Polls until the condition holds; false if it does not within `patience` cycles.
pub fn poll(patience: u64, mut condition: impl FnMut() -> bool) -> bool {
    let start = cycles();
    while !condition() {
        if cycles().wrapping_sub(start) > patience {
            return false;
        }
        hint::spin_loop();
    }
    true
}

/// Polls until the condition holds; false if the device seems to have forgotten.
pub fn wait(condition: impl FnMut() -> bool) -> bool {
    poll(PATIENCE, condition)
}
