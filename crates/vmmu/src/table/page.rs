//! A borrowed table page and its atomic entries: the one door to table memory.
//!
//! Invariant: a [`TablePage`] exists only while a section is announced ([`Section`]), so the page is not
//! reused under it; entries are accessed atomically only.

use super::arena::{FreePage, Tables};
use crate::addr::{ENTRIES, Hpa};
use crate::arch::entry::Raw;
use crate::host::Host;
use crate::mutants::Mutant::RelaxedEntry;
use crate::mutants::mutant;
use crate::sync::{AtomicU64, Ordering};
use crate::tlb::lock::{Exclusive, Shared};
use crate::tlb::reader::Walking;
use Ordering::{AcqRel, Acquire, Relaxed};

/// Proof that table pages which entries lead to are not reused for now.
pub(crate) trait Section {}
impl Section for Walking<'_> {}
impl Section for Shared<'_> {}
impl Section for Exclusive<'_> {}

/// One entry in memory.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct EntryCell(AtomicU64);

impl EntryCell {
    /// Reads it; what it links to is visible (T154).
    #[inline(always)]
    pub(crate) fn load(&self) -> Raw {
        #[cfg(feature = "instrument")]
        crate::instrument::walk();
        Raw(self.0.load(if mutant(RelaxedEntry) { Relaxed } else { Acquire }))
    }
    /// Replaces `old` by `new`, or says what stands there instead.
    #[inline(always)]
    pub(crate) fn compare_exchange(&self, old: Raw, new: Raw) -> Result<(), Raw> {
        match self.0.compare_exchange(old.0, new.0, AcqRel, Acquire) {
            Ok(_) => Ok(()),
            Err(now) => Err(Raw(now)),
        }
    }
    /// Replaces whatever stands there and returns it: no accessed or dirty bit set by a processor is lost.
    #[inline]
    pub(crate) fn swap(&self, new: Raw) -> Raw {
        Raw(self.0.swap(new.0, AcqRel))
    }
}

/// A table page, for as long as the section `'s` lasts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TablePage<'s> {
    entries: &'s [EntryCell; ENTRIES],
}

impl<'s> TablePage<'s> {
    /// One entry.
    #[inline(always)]
    pub(crate) fn entry(self, index: usize) -> &'s EntryCell {
        &self.entries[index]
    }
    /// All entries, in order.
    pub(crate) fn entries(self) -> impl Iterator<Item = &'s EntryCell> {
        self.entries.iter()
    }
}

impl<'a, H: Host> Tables<'a, H> {
    /// The table at `at`, which a root or a link read inside `_section` names.
    #[inline(always)]
    pub(crate) fn page<'s>(&self, at: Hpa, _section: &'s impl Section) -> TablePage<'s>
    where
        'a: 's,
    {
        self.page_unchecked(at)
    }

    /// The table at `at`, owned by the caller or reachable in a section of the caller's.
    #[inline(always)]
    pub(super) fn page_unchecked<'s>(&self, at: Hpa) -> TablePage<'s> {
        debug_assert!(self.owns(at), "{at} is no table of this VM");
        let entries = self.host.table_ptr(at).cast::<[EntryCell; ENTRIES]>();
        // SAFETY: `at` is a table page of this arena: 4096 aligned bytes that stay mapped while the block is
        // out (contract of `Host`), which it is while the page is owned or, by the section, not yet reused.
        // Software reaches it only through these atomics; processors write it only atomically.
        TablePage { entries: unsafe { entries.as_ref() } }
    }

    /// Writes all entries of a page that the caller owns, in order of their index.
    #[inline]
    pub(crate) fn fill_with(&self, page: &FreePage, mut value: impl FnMut(usize) -> Raw) {
        let entries = self.host.table_ptr(page.at()).cast::<EntryCell>();
        for index in 0..ENTRIES {
            // SAFETY: an owned page is 4096 aligned bytes that nobody else can reach: it has passed its grace, or
            // is new; so plain writes race with nothing.
            unsafe { entries.add(index).write(EntryCell(AtomicU64::new(value(index).0))) };
        }
    }
}
