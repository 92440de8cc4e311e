//! The atomics of the library under loom, which explores every schedule of a model and every value that the
//! language's memory model lets a load return.
//!
//! Only with `--cfg loom`. A word here is the address of loom's own, so that it is as large as the shipped one and
//! lies as well in a table page or a record, where it is written over without ever being dropped. Invariants: what
//! one execution of a model made is freed when the next begins, and nothing outlives it; all threads of a model run
//! on the thread of the system that explores it.

use core::any::Any;
use core::cell::{Cell, RefCell};
use core::ptr::NonNull;
use core::sync::atomic::Ordering;
use std::rc::Rc;
use std::vec::Vec;

std::thread_local! {
    /// Loom's atomics of the execution that runs on this thread.
    static MADE: RefCell<Vec<Rc<dyn Any>>> = const { RefCell::new(Vec::new()) };
    /// Changed by every fence of that execution.
    static FENCES: RefCell<Option<Rc<AtomicU64>>> = const { RefCell::new(None) };
}

/// Runs one execution, after freeing what the one before has made.
#[cfg(test)]
pub(crate) fn execution(run: impl FnOnce()) {
    FENCES.take();
    MADE.take();
    FENCES.set(Some(Rc::new(AtomicU64::new(0))));
    run();
}

/// A full fence. Alone it is no step to loom, which would stop no thread between a store and the fence behind it; so
/// it comes with an access on which every other fence depends, and by which nothing else is ordered.
pub(crate) fn fence() {
    let fences = FENCES.with_borrow(Option::clone);
    fences.expect("a model runs").fetch_add(1, Ordering::Relaxed);
    loom::sync::atomic::fence(Ordering::SeqCst);
}

/// Puts one of loom's atomics where it stays until the next execution begins.
fn keep<T: 'static>(atomic: T) -> NonNull<T> {
    let atomic = Rc::new(atomic);
    let at = NonNull::from(&*atomic);
    MADE.with_borrow_mut(|made| made.push(atomic));
    at
}

/// Where the atomic of loom's is that a word stands for. Whoever prepares a page writes it over, without atomics.
#[derive(Debug)]
#[repr(transparent)]
struct Place<T>(Cell<NonNull<T>>);

impl<T: 'static> Place<T> {
    fn new(atomic: T) -> Self {
        Self(Cell::new(keep(atomic)))
    }
    /// Accesses the word. Loom may run another thread before it makes the access; one that writes the word over
    /// meanwhile races with it.
    fn access<R>(&self, access: impl FnOnce(&T) -> R) -> R {
        let at = self.0.get();
        // SAFETY: kept until the execution is over.
        let result = access(unsafe { at.as_ref() });
        assert_eq!(self.0.get(), at, "Causality violation: a word was written over during an access");
        result
    }
}

macro_rules! modelled {
    ($name:ident, $value:ty, [$($rmw:ident),*]) => {
        #[derive(Debug)]
        #[repr(transparent)]
        pub(crate) struct $name(Place<loom::sync::atomic::$name>);

        // SAFETY: the word behind the address is atomic, and lives as long as the execution.
        unsafe impl Send for $name {}
        // SAFETY: as above.
        unsafe impl Sync for $name {}

        #[allow(dead_code)] // one surface for all widths; not every width uses all of it
        impl $name {
            pub(crate) fn new(v: $value) -> Self {
                Self(Place::new(loom::sync::atomic::$name::new(v)))
            }
            pub(crate) fn load(&self, order: Ordering) -> $value {
                self.0.access(|word| word.load(order))
            }
            pub(crate) fn store(&self, v: $value, order: Ordering) {
                self.0.access(|word| word.store(v, order));
            }
            pub(crate) fn compare_exchange(
                &self, old: $value, new: $value, ok: Ordering, fail: Ordering,
            ) -> Result<$value, $value> {
                self.0.access(|word| word.compare_exchange(old, new, ok, fail))
            }
            $(pub(crate) fn $rmw(&self, v: $value, order: Ordering) -> $value {
                self.0.access(|word| word.$rmw(v, order))
            })*
        }
    };
}
modelled!(AtomicBool, bool, []);
modelled!(AtomicU32, u32, [swap, fetch_add, fetch_sub, fetch_or, fetch_and]);
modelled!(AtomicU64, u64, [swap, fetch_add, fetch_sub, fetch_or, fetch_and]);

impl AtomicBool {
    /// Writes only where that changes the flag. Loom does not know that an exchange stands right behind what it has
    /// read: it would let a waiter's exchange hide the owner's later store from the waiter for ever.
    pub(crate) fn swap(&self, v: bool, order: Ordering) -> bool {
        let read = match order {
            Ordering::AcqRel | Ordering::Acquire => Ordering::Acquire,
            _ => Ordering::Relaxed,
        };
        self.compare_exchange(!v, v, order, read).unwrap_or_else(|now| now)
    }
}

/// A pointer.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct AtomicPtr<T>(Place<loom::sync::atomic::AtomicPtr<T>>);

// SAFETY: as for the words; what the pointer leads to is its user's matter, as with `core`'s.
unsafe impl<T> Send for AtomicPtr<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for AtomicPtr<T> {}

impl<T: 'static> AtomicPtr<T> {
    pub(crate) fn new(v: *mut T) -> Self {
        Self(Place::new(loom::sync::atomic::AtomicPtr::new(v)))
    }
    pub(crate) fn load(&self, order: Ordering) -> *mut T {
        self.0.access(|word| word.load(order))
    }
    pub(crate) fn store(&self, v: *mut T, order: Ordering) {
        self.0.access(|word| word.store(v, order));
    }
    pub(crate) fn swap(&self, v: *mut T, order: Ordering) -> *mut T {
        self.0.access(|word| word.swap(v, order))
    }
    pub(crate) fn compare_exchange(
        &self,
        old: *mut T,
        new: *mut T,
        ok: Ordering,
        fail: Ordering,
    ) -> Result<*mut T, *mut T> {
        self.0.access(|word| word.compare_exchange(old, new, ok, fail))
    }
}
