//! The lock-order checker: what a thread holds and is in, in debug builds with `std`; nothing elsewhere
//! (PROTOCOLS 6).
//!
//! Invariant: every check is about the calling thread, or, under `instrument`, the calling task.

#[cfg(all(debug_assertions, feature = "std"))]
pub(crate) use checked::*;
#[cfg(not(all(debug_assertions, feature = "std")))]
pub(crate) use unchecked::*;

#[cfg(all(debug_assertions, feature = "std"))]
mod checked {
    use crate::sync::Rank;
    use core::cell::RefCell;
    use std::vec::Vec;

    /// What one thread or task holds.
    #[derive(Debug, Default)]
    struct Held {
        locks: Vec<Rank>,
        invalidations: usize,
        guests: usize,
    }

    std::thread_local! {
        static HELD: RefCell<Vec<Held>> = const { RefCell::new(Vec::new()) };
    }

    fn with<R>(look: impl FnOnce(&mut Held) -> R) -> R {
        #[cfg(feature = "instrument")]
        let task = crate::instrument::task();
        #[cfg(not(feature = "instrument"))]
        let task = 0;
        HELD.with_borrow_mut(|held| {
            if held.len() <= task {
                held.resize_with(task + 1, Held::default);
            }
            look(&mut held[task])
        })
    }

    /// Notes that a lock of `rank` is being taken; panics where that breaks the order.
    pub(crate) fn enter(rank: Rank) {
        with(|held| {
            if let Some(inner) = held.locks.iter().find(|h| **h >= rank) {
                panic!("lock order: {rank:?} taken while {inner:?} is held");
            }
            let open = held.invalidations;
            assert!(
                rank != Rank::Slots || open == 0,
                "the slots mutex was asked for under {open} invalidation guards"
            );
            held.locks.push(rank);
        });
    }
    /// Notes that a lock of `rank` was released.
    pub(crate) fn leave(rank: Rank) {
        with(|held| {
            if let Some(at) = held.locks.iter().rposition(|h| *h == rank) {
                held.locks.remove(at);
            }
        });
    }
    fn count(counter: &mut usize, up: bool) {
        *counter = if up { *counter + 1 } else { counter.saturating_sub(1) };
    }
    /// Notes that this thread opened (`true`) or closed an invalidation guard.
    pub(crate) fn invalidation(open: bool) {
        with(|held| count(&mut held.invalidations, open));
    }
    /// Panics where this thread is about to wait for an invalidation guard that it holds itself.
    pub(crate) fn waits_for_invalidations() {
        let open = with(|held| held.invalidations);
        assert!(open == 0, "memory was asked for under {open} invalidation guards of the same thread");
    }
    /// Notes that this thread entered (`true`) or left a guest.
    pub(crate) fn guest(entered: bool) {
        with(|held| count(&mut held.guests, entered));
    }
    /// Panics where this thread is about to wait for guests to leave, and is in one.
    pub(crate) fn waits_for_guests() {
        let guests = with(|held| held.guests);
        assert!(guests == 0, "an operation on the VM between an entry and its end");
    }
}

#[cfg(not(all(debug_assertions, feature = "std")))]
mod unchecked {
    use crate::sync::Rank;

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
