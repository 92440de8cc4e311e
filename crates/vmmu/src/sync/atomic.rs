//! The atomics of the library: `core`'s own, the same with every access watched, or loom's.
//!
//! Watched are unit tests, which count read-modify-writes, and builds with the `instrument` feature, where a
//! scheduler may switch tasks before each access and holds back stores. With `--cfg loom` they are loom's, which
//! explores every order that the language allows (`modelled`). Invariant: all kinds have one surface, so that the
//! shipped source is the checked source; but for loom's, whose `new` is not `const`.

#[cfg(loom)]
pub(crate) use super::modelled::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64};
#[cfg(not(any(test, feature = "instrument", loom)))]
pub(crate) use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64};
#[cfg(all(any(test, feature = "instrument"), not(loom)))]
pub(crate) use watched::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64};

/// A word by which nobody orders anything: a count for people, or the next of some numbers. Models leave it out.
#[cfg(not(loom))]
pub(crate) type Tally = AtomicU64;
#[cfg(loom)]
pub(crate) type Tally = core::sync::atomic::AtomicU64;

#[cfg(all(any(test, feature = "instrument"), not(loom)))]
mod watched {
    use core::sync::atomic::Ordering;

    /// Before a read-modify-write.
    fn locked() {
        #[cfg(test)]
        crate::sync::cost::add_locked();
        #[cfg(feature = "instrument")]
        crate::instrument::read_modify_write();
    }

    /// Before a compare-exchange.
    fn contended() {
        #[cfg(test)]
        crate::sync::cost::add_locked();
        #[cfg(feature = "instrument")]
        crate::instrument::compare_exchange();
    }

    macro_rules! watched {
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
                    #[cfg(feature = "instrument")]
                    if let Some(v) = crate::instrument::load(core::ptr::from_ref(self).cast(), size_of::<$value>()) {
                        return <$value as Word>::from_word(v);
                    }
                    self.0.load(order)
                }
                pub(crate) fn store(&self, v: $value, order: Ordering) {
                    #[cfg(feature = "instrument")]
                    {
                        let (at, width) = (core::ptr::from_ref(self).cast(), size_of::<$value>());
                        if crate::instrument::store(at, width, <$value as Word>::to_word(v)) {
                            return;
                        }
                    }
                    self.0.store(v, order);
                }
                pub(crate) fn compare_exchange(
                    &self, old: $value, new: $value, ok: Ordering, fail: Ordering,
                ) -> Result<$value, $value> {
                    contended();
                    self.0.compare_exchange(old, new, ok, fail)
                }
                $(pub(crate) fn $rmw(&self, v: $value, order: Ordering) -> $value {
                    locked();
                    self.0.$rmw(v, order)
                })*
            }
        };
    }
    watched!(AtomicBool, bool, [swap]);
    watched!(AtomicU32, u32, [swap, fetch_add, fetch_sub, fetch_or, fetch_and]);
    watched!(AtomicU64, u64, [swap, fetch_add, fetch_sub, fetch_or, fetch_and]);

    /// A pointer.
    #[derive(Debug)]
    #[repr(transparent)]
    pub(crate) struct AtomicPtr<T>(core::sync::atomic::AtomicPtr<T>);

    impl<T> AtomicPtr<T> {
        pub(crate) const fn new(v: *mut T) -> Self {
            Self(core::sync::atomic::AtomicPtr::new(v))
        }
        /// Pointers are published by read-modify-writes and by stores to memory that nobody can reach yet, so no
        /// store of one is ever held back.
        pub(crate) fn load(&self, order: Ordering) -> *mut T {
            #[cfg(feature = "instrument")]
            crate::instrument::step();
            self.0.load(order)
        }
        pub(crate) fn store(&self, v: *mut T, order: Ordering) {
            #[cfg(feature = "instrument")]
            crate::instrument::read_modify_write();
            self.0.store(v, order);
        }
        pub(crate) fn swap(&self, v: *mut T, order: Ordering) -> *mut T {
            locked();
            self.0.swap(v, order)
        }
        pub(crate) fn compare_exchange(
            &self,
            old: *mut T,
            new: *mut T,
            ok: Ordering,
            fail: Ordering,
        ) -> Result<*mut T, *mut T> {
            contended();
            self.0.compare_exchange(old, new, ok, fail)
        }
    }

    /// A value as the scheduler holds it back.
    #[cfg(feature = "instrument")]
    trait Word {
        fn to_word(self) -> u64;
        fn from_word(word: u64) -> Self;
    }
    #[cfg(feature = "instrument")]
    impl Word for bool {
        fn to_word(self) -> u64 {
            u64::from(self)
        }
        fn from_word(word: u64) -> Self {
            word != 0
        }
    }
    #[cfg(feature = "instrument")]
    impl Word for u32 {
        fn to_word(self) -> u64 {
            u64::from(self)
        }
        fn from_word(word: u64) -> Self {
            word as Self
        }
    }
    #[cfg(feature = "instrument")]
    impl Word for u64 {
        fn to_word(self) -> u64 {
            self
        }
        fn from_word(word: u64) -> Self {
            word
        }
    }
}
