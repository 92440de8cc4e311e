//! Statistics: one set of counters beside each reader's line, written by its owner alone and summed when
//! read, under the names that users of KVM know (T156, T157).
//!
//! Invariant: no counter costs a locked operation; a sum taken while readers run is a moment's approximation.

use crate::addr::PageSize;
use crate::sync::{Ordering::Relaxed, Tally};

/// A counter that only its owner writes and anybody reads.
#[derive(Debug)]
pub(crate) struct Counter(Tally);

impl Counter {
    const fn new() -> Self {
        Self(Tally::new(0))
    }
    /// Adds, by the owner.
    #[inline(always)]
    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }
    /// Subtracts, by the owner; the sum over all readers stays right where one alone goes below zero.
    #[inline(always)]
    pub(crate) fn sub(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_sub(n), Relaxed);
    }
    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

macro_rules! statistics {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A reader's counters.
        #[derive(Debug)]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)*
        }

        impl Counters {
            pub(crate) const fn new() -> Self {
                Self { $($name: Counter::new(),)* }
            }
        }

        /// What a VM did and has, at one moment.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        #[non_exhaustive]
        pub struct Stats {
            $($(#[$doc])* pub $name: u64,)*
            /// Faults that installed or upgraded a leaf, of whatever size.
            pub pf_fixed: u64,
            /// Bytes of table memory that the host has handed out, now.
            pub table_bytes: u64,
            /// Table pages that were unlinked and wait for their grace, now.
            pub table_pages_retired: u64,
            /// Valid and invalid roots, now.
            pub roots: u64,
            /// Invalidation guards that are open, now.
            pub invalidations_open: u64,
            /// Generations since the oldest open invalidation began; a number that grows tells of a leaked guard.
            pub invalidation_age: u64,
            /// Generations since the oldest entry that is still in the guest; one that grows tells of a vCPU that
            /// never reports its exit.
            pub entry_age: u64,
        }

        impl Stats {
            /// Adds one reader's counters.
            pub(crate) fn add(&mut self, counters: &Counters) {
                $(self.$name = self.$name.wrapping_add(counters.$name.get());)*
            }
            /// Every counter with its name, in order, for printing.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [
                    $((stringify!($name), self.$name),)*
                    ("pf_fixed", self.pf_fixed),
                    ("table_bytes", self.table_bytes),
                    ("table_pages_retired", self.table_pages_retired),
                    ("roots", self.roots),
                    ("invalidations_open", self.invalidations_open),
                    ("invalidation_age", self.invalidation_age),
                    ("entry_age", self.entry_age),
                ]
                .into_iter()
            }
        }
    };
}

statistics! {
    /// Faults handled, but for those answered by an MMIO entry or a retry (T87).
    pf_taken,
    /// Faults answered with emulation.
    pf_emulate,
    /// Faults that found the access already allowed.
    pf_spurious,
    /// MMIO entries installed.
    pf_mmio_spte_created,
    /// Faults answered by an MMIO entry of the current generation.
    pf_mmio_hit,
    /// Faults that are to be tried again: something changed on the way.
    pf_retry,
    /// Faults that installed or upgraded a leaf of 4 KiB.
    pf_fixed_4k,
    /// Faults that installed or upgraded a leaf of 2 MiB.
    pf_fixed_2m,
    /// Faults that installed or upgraded a leaf of 1 GiB.
    pf_fixed_1g,
    /// Table pages linked below roots, now.
    table_pages,
    /// Table pages that vCPUs keep prepared, now.
    table_pages_cached,
    /// Leaves of 4 KiB, now.
    pages_4k,
    /// Leaves of 2 MiB, now.
    pages_2m,
    /// Leaves of 1 GiB, now.
    pages_1g,
    /// Large leaves split in place.
    pages_split,
    /// Tables replaced by a large leaf.
    pages_collapsed,
    /// Shootdowns asked for.
    remote_tlb_flush_requests,
    /// Shootdowns that found a processor to interrupt.
    remote_tlb_flush,
    /// Entries that flushed their own tag.
    tlb_flush,
    /// Entries that took a fresh tag.
    tlb_fresh_tag,
    /// Table pages zapped.
    mmu_shadow_zapped,
}

impl Counters {
    /// The gauge of leaves of `size`.
    #[inline(always)]
    pub(crate) fn pages(&self, size: PageSize) -> &Counter {
        match size {
            PageSize::Size4K => &self.pages_4k,
            PageSize::Size2M => &self.pages_2m,
            PageSize::Size1G => &self.pages_1g,
        }
    }
    /// The count of faults that installed a leaf of `size`.
    #[inline(always)]
    pub(crate) fn fixed(&self, size: PageSize) -> &Counter {
        match size {
            PageSize::Size4K => &self.pf_fixed_4k,
            PageSize::Size2M => &self.pf_fixed_2m,
            PageSize::Size1G => &self.pf_fixed_1g,
        }
    }
}

impl Stats {
    /// Makes gauges that were summed while readers ran, one reader's decrement before another's increment, what
    /// they can be.
    pub(crate) fn settle_gauges(&mut self) {
        for gauge in [
            &mut self.table_pages,
            &mut self.table_pages_cached,
            &mut self.pages_4k,
            &mut self.pages_2m,
            &mut self.pages_1g,
        ] {
            *gauge = gauge.cast_signed().max(0).cast_unsigned();
        }
    }

    /// Leaves of `size`, now.
    pub const fn pages(&self, size: PageSize) -> u64 {
        match size {
            PageSize::Size4K => self.pages_4k,
            PageSize::Size2M => self.pages_2m,
            PageSize::Size1G => self.pages_1g,
        }
    }
}
