//! What the current thread spent on synchronisation, counted in the library's own tests.
//!
//! Invariant: counts belong to the thread that spent them.

use core::cell::Cell;

std::thread_local! {
    static FENCES: Cell<u64> = const { Cell::new(0) };
    static LOCKED: Cell<u64> = const { Cell::new(0) };
}

pub(crate) fn add_fence() {
    FENCES.set(FENCES.get() + 1);
}
#[cfg_attr(loom, expect(dead_code))] // its atomics are not watched
pub(crate) fn add_locked() {
    LOCKED.set(LOCKED.get() + 1);
}
/// Runs `work` and returns (full fences, locked operations) that this thread spent in it.
pub(crate) fn of<R>(work: impl FnOnce() -> R) -> (R, u64, u64) {
    let (fences, locked) = (FENCES.get(), LOCKED.get());
    let result = work();
    (result, FENCES.get() - fences, LOCKED.get() - locked)
}
