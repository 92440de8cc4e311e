//! The lock-order checker: what a thread holds and is in, in debug builds with `std`; nothing elsewhere
//! (PROTOCOLS 6). Nothing under loom either, all of whose threads are one to the system.
//!
//! Invariant: every check is about the calling thread, or, under `instrument`, the calling task.

#[cfg(all(debug_assertions, feature = "std", not(loom)))]
pub(crate) use checked::*;
#[cfg(not(all(debug_assertions, feature = "std", not(loom))))]
pub(crate) use unchecked::*;

#[cfg(all(debug_assertions, feature = "std", not(loom)))]
mod checked {
    use crate::sync::Rank;
    use alloc::sync::{Arc, Weak};
    use alloc::vec::Vec;
    use core::cell::RefCell;
    use core::sync::atomic::{AtomicBool, Ordering};

    /// What one thread or task holds.
    #[derive(Debug, Default)]
    struct Held {
        locks: Vec<Rank>,
        invalidations: usize,
        /// Entries made here, whoever ends them: each mark is true while its vCPU is in the guest.
        guests: Vec<Weak<AtomicBool>>,
    }

    /// Whether a vCPU is in the guest.
    #[derive(Clone, Debug, Default)]
    pub(crate) struct GuestMark(Arc<AtomicBool>);

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
    /// Notes that this thread entered a guest.
    pub(crate) fn entered(mark: &GuestMark) {
        mark.0.store(true, Ordering::Relaxed);
        with(|held| {
            held.guests.retain(|guest| guest.upgrade().is_some_and(|g| g.load(Ordering::Relaxed)));
            held.guests.push(Arc::downgrade(&mark.0));
        });
    }
    /// Notes that the vCPU of `mark` has left it, on whatever thread.
    pub(crate) fn left(mark: &GuestMark) {
        mark.0.store(false, Ordering::Relaxed);
    }
    /// Panics where this thread is about to wait for guests to leave, and is in one.
    pub(crate) fn waits_for_guests() {
        let inside = |guest: &Weak<AtomicBool>| guest.upgrade().is_some_and(|g| g.load(Ordering::Relaxed));
        assert!(
            !with(|held| held.guests.iter().any(inside)),
            "an operation on the VM between an entry and its end"
        );
    }
}

#[cfg(not(all(debug_assertions, feature = "std", not(loom))))]
mod unchecked {
    use crate::sync::Rank;

    /// Nothing is kept.
    #[derive(Clone, Debug, Default)]
    pub(crate) struct GuestMark(());

    #[inline(always)]
    pub(crate) fn enter(_: Rank) {}
    #[inline(always)]
    pub(crate) fn leave(_: Rank) {}
    #[inline(always)]
    pub(crate) fn invalidation(_: bool) {}
    #[inline(always)]
    pub(crate) fn waits_for_invalidations() {}
    #[inline(always)]
    pub(crate) fn entered(_: &GuestMark) {}
    #[inline(always)]
    pub(crate) fn left(_: &GuestMark) {}
    #[inline(always)]
    pub(crate) fn waits_for_guests() {}
}
