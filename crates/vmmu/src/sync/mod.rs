//! Atomics, fences and locks: the one door through which the library synchronises.
//!
//! Everything here is either `core`'s own or a thin layer over it, so that test builds see each use.
//!
//! | room | holds |
//! |---|---|
//! | `atomic` | `core`'s atomics, or the same watched: counted in unit tests, scheduled under `instrument` |
//! | `modelled` | loom's, for `--cfg loom` |
//! | `order` | the lock-order checker of debug builds |
//! | `cost` | what a path spent in fences and locked operations, in unit tests |
//!
//! Invariants: a full fence is [`full_fence`] and nothing else; a [`Mutex`] knows its [`Rank`], and no thread
//! takes one out of order (checked in debug builds with the `std` feature; PROTOCOLS 6).

use core::cell::UnsafeCell;
use core::fmt;
use core::ops::{Deref, DerefMut};

mod atomic;
#[cfg(test)]
pub(crate) mod cost;
#[cfg(loom)]
pub(crate) mod modelled;
pub(crate) mod order;

pub(crate) use atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Tally};
pub(crate) use core::sync::atomic::Ordering;

use Ordering::{Acquire, Relaxed, Release};

/// A full (sequentially consistent) fence: what separates an announcement from the first load (PROTOCOLS 1).
#[inline(always)]
pub(crate) fn full_fence() {
    #[cfg(test)]
    cost::add_fence();
    #[cfg(feature = "instrument")]
    crate::instrument::fence();
    #[cfg(not(loom))]
    core::sync::atomic::fence(Ordering::SeqCst);
    #[cfg(loom)]
    modelled::fence();
}

/// Lets another processor or thread get on while this one waits in a loop.
#[inline]
pub(crate) fn relax() {
    #[cfg(feature = "instrument")]
    if crate::instrument::relax() {
        return;
    }
    #[cfg(loom)]
    loom::thread::yield_now();
    #[cfg(all(feature = "std", not(loom)))]
    std::thread::yield_now();
    #[cfg(not(any(feature = "std", loom)))]
    core::hint::spin_loop();
}

/// How many places an array has: as many as it is shipped with, or, for loom, which looks at each of them in every
/// schedule, as many as a model uses.
pub(crate) const fn places(shipped: usize, modelled: usize) -> usize {
    if cfg!(loom) { modelled } else { shipped }
}

/// The place of a lock in the order of PROTOCOLS 6: a thread takes only locks of a higher rank than those it
/// holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Rank {
    /// The slots mutex: serialises slot requests.
    Slots,
    /// The writers' mutex: Exclusive, and the end of an invalidation.
    Writers,
    /// Growth of the arena: the host is asked for memory under it.
    Growth,
    /// Lists and pools: nothing nests inside.
    Leaf,
}

/// A spin lock with a rank. Held for short stretches only; nothing sleeps under it.
pub(crate) struct Mutex<T> {
    locked: AtomicBool,
    rank: Rank,
    value: UnsafeCell<T>,
}

// SAFETY: the lock hands `&mut T` to one thread at a time, so sending the value between threads is all that
// sharing the lock needs.
unsafe impl<T: Send> Sync for Mutex<T> {}

impl<T> Mutex<T> {
    /// An unlocked mutex around `value`.
    pub(crate) fn new(rank: Rank, value: T) -> Self {
        Self { locked: AtomicBool::new(false), rank, value: UnsafeCell::new(value) }
    }

    /// Waits for the lock and takes it.
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        order::enter(self.rank);
        while self.locked.swap(true, Acquire) {
            while self.locked.load(Relaxed) {
                relax();
            }
        }
        MutexGuard { mutex: self }
    }

    /// The value, where the borrow itself proves that nobody else has the lock.
    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }
}

impl<T: fmt::Debug> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mutex").field("rank", &self.rank).finish_non_exhaustive()
    }
}

/// Proof that its mutex is held; releases it when dropped.
#[must_use]
pub(crate) struct MutexGuard<'a, T> {
    mutex: &'a Mutex<T>,
}

impl<T> fmt::Debug for MutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MutexGuard").field("rank", &self.mutex.rank).finish_non_exhaustive()
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the guard exists only while the lock is held, so nobody else has a mutable reference.
        unsafe { &*self.mutex.value.get() }
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as for `deref`; the guard itself is borrowed mutably.
        unsafe { &mut *self.mutex.value.get() }
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        self.mutex.locked.store(false, Release);
        order::leave(self.mutex.rank);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mutex_excludes() {
        let m = Mutex::new(Rank::Leaf, 0u64);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..10_000 {
                        *m.lock() += 1;
                    }
                });
            }
        });
        assert_eq!(*m.lock(), 40_000);
    }

    #[test]
    #[cfg(all(debug_assertions, feature = "std"))]
    #[should_panic(expected = "lock order")]
    fn order_is_checked() {
        let leaf = Mutex::new(Rank::Leaf, ());
        let slots = Mutex::new(Rank::Slots, ());
        let _inner = leaf.lock();
        let _outer = slots.lock();
    }

    #[test]
    fn cost_counts_fences_and_locked_operations() {
        let word = AtomicU64::new(0);
        let ((), fences, locked) = cost::of(|| {
            full_fence();
            word.fetch_add(1, Relaxed);
            word.store(3, Relaxed);
        });
        assert_eq!((fences, locked), (1, 1));
    }
}
