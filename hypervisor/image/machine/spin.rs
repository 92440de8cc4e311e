//! A value behind a lock that spins.
//!
//! With one processor, interrupts off and GIF clear it is never contended; it is what makes sharing sound,
//! and what more processors will need.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

/// A value that one caller at a time may use.
pub(crate) struct Spin<T> {
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: `with` lets one caller at a time reach the value, and moves it nowhere.
unsafe impl<T: Send> Sync for Spin<T> {}

impl<T> Spin<T> {
    /// A free lock around `value`.
    pub(crate) const fn new(value: T) -> Self {
        Self { taken: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    /// Runs `using` on the value. Not to be nested on one lock: it would wait for itself.
    #[inline]
    pub(crate) fn with<R>(&self, using: impl FnOnce(&mut T) -> R) -> R {
        while self.taken.swap(true, Ordering::Acquire) {
            core::hint::spin_loop();
        }
        // SAFETY: the swap above makes this the only reference until the store below.
        let result = using(unsafe { &mut *self.value.get() });
        self.taken.store(false, Ordering::Release);
        result
    }
}
