//! Atomics, fences and locks: the one door through which the library synchronises.
//!
//! Everything here is either `core`'s own or a thin layer over it, so that the instrumentation of test builds
//! (counts of full fences and locked operations, lock order) sees each use. Invariants: a full fence is
//! [`full_fence`] and nothing else; a [`Mutex`] knows its [`Rank`], and no thread takes one out of order
//! (checked in debug builds with the `std` feature; PROTOCOLS 6).

use core::cell::UnsafeCell;
use core::fmt;
use core::ops::{Deref, DerefMut};

#[cfg(not(test))]
pub(crate) use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
pub(crate) use core::sync::atomic::{AtomicPtr, Ordering};
#[cfg(test)]
pub(crate) use counted::{AtomicBool, AtomicU32, AtomicU64};

use Ordering::{Acquire, Relaxed, Release};

/// A full (sequentially consistent) fence: what separates an announcement from the first load (PROTOCOLS 1).
#[inline(always)]
pub(crate) fn full_fence() {
    #[cfg(test)]
    cost::add_fence();
    core::sync::atomic::fence(Ordering::SeqCst);
}

/// Lets another processor or thread get on while this one waits in a loop.
#[inline]
pub(crate) fn relax() {
    #[cfg(feature = "std")]
    std::thread::yield_now();
    #[cfg(not(feature = "std"))]
    core::hint::spin_loop();
}

/// The place of a lock in the order of PROTOCOLS 6: a thread takes only locks of a higher rank than those it
/// holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Rank {
    /// The slots mutex: serialises slot requests.
    Slots,
    /// The writers' mutex: Exclusive, and the end of an invalidation.
    Writers,
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
    pub(crate) const fn new(rank: Rank, value: T) -> Self {
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

/// The lock-order checker: a thread's held ranks, in debug builds with `std`; nothing elsewhere.
#[cfg(all(debug_assertions, feature = "std"))]
pub(crate) mod order {
    use super::Rank;
    use core::cell::{Cell, RefCell};
    use std::vec::Vec;

    std::thread_local! {
        static HELD: RefCell<Vec<Rank>> = const { RefCell::new(Vec::new()) };
        static INVALIDATIONS: Cell<usize> = const { Cell::new(0) };
        static IN_GUEST: Cell<usize> = const { Cell::new(0) };
    }

    /// Notes that a lock of `rank` is being taken; panics where that breaks the order.
    pub(crate) fn enter(rank: Rank) {
        HELD.with_borrow_mut(|held| {
            if let Some(inner) = held.iter().find(|h| **h >= rank) {
                panic!("lock order: {rank:?} taken while {inner:?} is held");
            }
            held.push(rank);
        });
        if rank == Rank::Slots {
            let open = INVALIDATIONS.get();
            assert!(open == 0, "the slots mutex was asked for under {open} invalidation guards");
        }
    }
    /// Notes that a lock of `rank` was released.
    pub(crate) fn leave(rank: Rank) {
        HELD.with_borrow_mut(|held| {
            if let Some(at) = held.iter().rposition(|h| *h == rank) {
                held.remove(at);
            }
        });
    }
    fn count(cell: &'static std::thread::LocalKey<Cell<usize>>, up: bool) {
        cell.set(if up { cell.get() + 1 } else { cell.get().saturating_sub(1) });
    }
    /// Notes that this thread opened (`true`) or closed an invalidation guard.
    pub(crate) fn invalidation(open: bool) {
        count(&INVALIDATIONS, open);
    }
    /// Panics where this thread is about to wait for an invalidation guard that it holds itself.
    pub(crate) fn waits_for_invalidations() {
        let open = INVALIDATIONS.get();
        assert!(open == 0, "memory was asked for under {open} invalidation guards of the same thread");
    }
    /// Notes that this thread entered (`true`) or left a guest.
    pub(crate) fn guest(entered: bool) {
        count(&IN_GUEST, entered);
    }
    /// Panics where this thread is about to wait for guests to leave, and is in one.
    pub(crate) fn waits_for_guests() {
        assert!(IN_GUEST.get() == 0, "an operation on the VM between an entry and its end");
    }
}

/// The lock-order checker, absent: see the debug build with `std`.
#[cfg(not(all(debug_assertions, feature = "std")))]
pub(crate) mod order {
    use super::Rank;
    #[inline(always)]
    pub(crate) fn enter(_: Rank) {}
    #[inline(always)]
    pub(crate) fn leave(_: Rank) {}
    #[inline(always)]
    pub(crate) fn invalidation(_: bool) {}
    #[inline(always)]
    pub(crate) fn waits_for_invalidations() {}
    #[inline(always)]
    pub(crate) fn guest(_: bool) {}
    #[inline(always)]
    pub(crate) fn waits_for_guests() {}
}

/// What the current thread spent on synchronisation, counted in the library's own tests.
#[cfg(test)]
pub(crate) mod cost {
    use core::cell::Cell;

    std::thread_local! {
        static FENCES: Cell<u64> = const { Cell::new(0) };
        static LOCKED: Cell<u64> = const { Cell::new(0) };
    }

    pub(crate) fn add_fence() {
        FENCES.set(FENCES.get() + 1);
    }
    pub(crate) fn add_locked() {
        LOCKED.set(LOCKED.get() + 1);
    }
    /// Runs `work` and returns (full fences, locked operations) that this thread spent in it.
    pub(crate) fn of<R>(work: impl FnOnce() -> R) -> (R, u64, u64) {
        let (fences, locked) = (FENCES.get(), LOCKED.get());
        let result = work();
        (result, FENCES.get() - fences, LOCKED.get() - locked)
    }
}

/// `core`'s atomics with every read-modify-write counted.
#[cfg(test)]
mod counted {
    use super::{Ordering, cost};

    macro_rules! counted {
        ($name:ident, $value:ty, [$($rmw:ident),*]) => {
            #[derive(Debug)]
            #[repr(transparent)]
            pub(crate) struct $name(core::sync::atomic::$name);

            #[allow(dead_code)] // one surface for all widths; not every width uses all of it
            impl $name {
                pub(crate) const fn new(v: $value) -> Self {
                    Self(core::sync::atomic::$name::new(v))
                }
                pub(crate) fn load(&self, order: Ordering) -> $value {
                    self.0.load(order)
                }
                pub(crate) fn store(&self, v: $value, order: Ordering) {
                    self.0.store(v, order);
                }
                pub(crate) fn compare_exchange(
                    &self, old: $value, new: $value, ok: Ordering, fail: Ordering,
                ) -> Result<$value, $value> {
                    cost::add_locked();
                    self.0.compare_exchange(old, new, ok, fail)
                }
                $(pub(crate) fn $rmw(&self, v: $value, order: Ordering) -> $value {
                    cost::add_locked();
                    self.0.$rmw(v, order)
                })*
            }
        };
    }
    counted!(AtomicBool, bool, [swap]);
    counted!(AtomicU32, u32, [swap, fetch_add, fetch_sub, fetch_or, fetch_and]);
    counted!(AtomicU64, u64, [swap, fetch_add, fetch_sub, fetch_or, fetch_and]);
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
