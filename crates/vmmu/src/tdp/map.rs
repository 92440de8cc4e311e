//! The fault's side of the engine: from a guest frame to its entry, and from nothing to a leaf (T79–T86).
//!
//! Everything happens under Shared by compare-exchange; losing a race means that the guest tries again.
//! Invariants: what another thread made is never undone by a fault but for a table that a large leaf replaces
//! (T85); a working leaf never loses a permission or an accessed or dirty bit (T84); no allocation.

use super::root::Root;
use super::zap::Removed;
use super::{Env, Tdp};
use crate::addr::{ENTRIES, Gfn, GfnRange, Hpa, Level, PageSize, Pfn};
use crate::arch::entry::{Entry, Format, Leaf, Mmio, NestedAccess, Raw, Writable};
use crate::error::Bug;
use crate::host::Host;
use crate::table::cache::{Cache, PreparedPage};
use crate::table::page::{EntryCell, Section, TablePage};
use crate::table::transition::{Flush, judge};
use crate::tlb::lock::Shared;

/// An entry and what it held when it was read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Position<'s> {
    pub(crate) cell: &'s EntryCell,
    pub(crate) level: Level,
    pub(crate) raw: Raw,
    pub(crate) entry: Entry,
}

/// The leaf that a fault wants.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// The frame that faulted.
    pub(crate) gfn: Gfn,
    /// The host frame behind it.
    pub(crate) pfn: Pfn,
    /// The level at which to map.
    pub(crate) level: Level,
    pub(crate) writable: Writable,
    pub(crate) access: NestedAccess,
}

/// How an attempt to map ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mapped {
    /// A leaf of this size was installed or upgraded.
    Fixed(PageSize),
    /// The access was allowed already.
    Spurious,
    /// Somebody else changed something on the way: the guest tries again.
    Retry,
}

/// What stopped a descent.
enum Stopped {
    Retry,
    /// A large leaf that allows the access, or that must not be split.
    AtLeaf,
}

impl<F: Format> Tdp<F> {
    /// Walks from `root` down to the entry for `gfn` at `lowest`, or to the last entry above it that is no
    /// link. `gfn` is within [`Format::max_gfn`].
    #[inline]
    pub(crate) fn walk<'s, H: Host>(
        &self,
        env: Env<'s, H>,
        root: &Root,
        gfn: Gfn,
        lowest: Level,
        section: &'s impl Section,
    ) -> Position<'s> {
        let tables = env.tables();
        let mut level = self.format.root_level();
        let mut page = tables.page(root.page, section);
        loop {
            let at = self.position(page, gfn, level);
            match (at.entry, level.below()) {
                (Entry::Link(table), Some(below)) if level > lowest => {
                    page = tables.page(table, section);
                    level = below;
                }
                _ => return at,
            }
        }
    }

    #[inline(always)]
    fn position<'s>(&self, page: TablePage<'s>, gfn: Gfn, level: Level) -> Position<'s> {
        let cell = page.entry(level.index(gfn));
        let raw = cell.load();
        Position { cell, level, raw, entry: self.format.decode(raw, level) }
    }

    /// Maps `want`, starting from `at`, a position for its frame that was read in the section that lasts. The
    /// root, the invalidation sequence and the slots were rechecked under `shared`.
    pub(crate) fn map<'s, H: Host>(
        &self,
        env: Env<'s, H>,
        shared: &'s Shared<'_>,
        root: &Root,
        at: Position<'s>,
        want: Wanted,
        cache: &mut Cache,
    ) -> Result<(Mapped, Removed<'s>), Bug> {
        if (want.gfn.raw() ^ want.pfn.raw()) & (want.level.pages() - 1) != 0 {
            return Err(Bug::Misaligned { gfn: want.gfn, pfn: want.pfn, level: want.level });
        }
        // The position is at the last entry; a table may hang where a larger leaf is wanted.
        let at = if at.level < want.level { self.walk(env, root, want.gfn, want.level, shared) } else { at };
        let mut removed = Removed::new(env.tlb);
        let mapped = match self.descend(env, shared, at, want.gfn, want.level, Some(want.access), cache) {
            Ok(at) => self.install(env, shared, at, want, &mut removed)?,
            Err(Stopped::Retry) => Mapped::Retry,
            Err(Stopped::AtLeaf) => Mapped::Spurious,
        };
        Ok((mapped, removed))
    }

    /// Caches "no slot" for `gfn` (T45, T73). Replaces only what is not present (PROTOCOLS 5): a leaf met on
    /// the way means that the guest tries again.
    pub(crate) fn map_mmio<'s, H: Host>(
        &self,
        env: Env<'s, H>,
        shared: &'s Shared<'_>,
        at: Position<'s>,
        mmio: Mmio,
        cache: &mut Cache,
    ) -> bool {
        let Ok(at) = self.descend(env, shared, at, mmio.gfn, Level::L1, None, cache) else { return false };
        if !matches!(at.entry, Entry::Empty | Entry::Mmio(_)) {
            return false;
        }
        let new = self.format.encode(Entry::Mmio(mmio), Level::L1);
        let created = at.cell.compare_exchange(at.raw, new).is_ok();
        if created {
            shared.line().counters.pf_mmio_spte_created.add(1);
        }
        created
    }

    /// Goes down to `goal`, linking tables from the cache where there are none and splitting a large leaf that
    /// does not allow `split_for`.
    #[inline]
    fn descend<'s, H: Host>(
        &self,
        env: Env<'s, H>,
        shared: &'s Shared<'_>,
        mut at: Position<'s>,
        gfn: Gfn,
        goal: Level,
        split_for: Option<NestedAccess>,
        cache: &mut Cache,
    ) -> Result<Position<'s>, Stopped> {
        let tables = env.tables();
        while at.level > goal {
            let below = at.level.below().ok_or(Stopped::Retry)?;
            let table = match at.entry {
                Entry::Frozen => return Err(Stopped::Retry),
                Entry::Link(table) => table,
                Entry::Empty | Entry::Mmio(_) => {
                    let page = cache.take().ok_or(Stopped::Retry)?;
                    let table = page.page().at();
                    tables.describe(table, gfn.align_down(at.level), below);
                    let link = self.format.encode(Entry::Link(table), at.level);
                    if at.cell.compare_exchange(at.raw, link).is_err() {
                        cache.put_back(page);
                        return Err(Stopped::Retry);
                    }
                    tables.linked(page.into_inner());
                    table
                }
                Entry::Leaf(leaf) => {
                    if split_for.is_none_or(|access| leaf.allows(access)) {
                        return Err(Stopped::AtLeaf);
                    }
                    self.split(env, shared, at, leaf, gfn, below, cache)?
                }
            };
            at = self.position(tables.page(table, shared), gfn, below);
        }
        Ok(at)
    }

    /// Replaces a large leaf by a table of 512 leaves that say the same (T121). No flush is owed (T148i).
    fn split<H: Host>(
        &self,
        env: Env<'_, H>,
        shared: &Shared<'_>,
        at: Position<'_>,
        leaf: Leaf,
        gfn: Gfn,
        below: Level,
        cache: &mut Cache,
    ) -> Result<Hpa, Stopped> {
        let tables = env.tables();
        let (Some(large), Some(small)) = (PageSize::at(at.level), PageSize::at(below)) else {
            return Err(Stopped::Retry);
        };
        let page = cache.take().ok_or(Stopped::Retry)?.into_inner();
        let table = page.at();
        tables.describe(table, gfn.align_down(at.level), below);
        tables.fill_with(&page, |index| {
            let pfn = leaf.pfn.offset(index as u64 * below.pages());
            self.format.encode(Entry::Leaf(Leaf { pfn, ..leaf }), below)
        });
        let link = self.format.encode(Entry::Link(table), at.level);
        debug_assert_eq!(judge(at.entry, Entry::Link(table), true), Ok(Flush::None));
        if at.cell.compare_exchange(at.raw, link).is_err() {
            cache.put_back(PreparedPage::new(&tables, &self.format, page));
            return Err(Stopped::Retry);
        }
        tables.linked(page);
        let counters = &shared.line().counters;
        counters.pages(large).sub(1);
        counters.pages(small).add(ENTRIES as u64);
        counters.pages_split.add(1);
        Ok(table)
    }

    /// Installs the leaf at its own level.
    #[inline]
    fn install<H: Host>(
        &self,
        env: Env<'_, H>,
        shared: &Shared<'_>,
        at: Position<'_>,
        want: Wanted,
        removed: &mut Removed<'_>,
    ) -> Result<Mapped, Bug> {
        let Some(size) = PageSize::at(at.level) else { return Ok(Mapped::Retry) };
        let counters = &shared.line().counters;
        let mut leaf = Leaf {
            pfn: want.pfn.align_down(at.level),
            writable: want.writable,
            executable: true,
            accessed: true,
            dirty: want.writable == Writable::Yes,
        };
        match at.entry {
            Entry::Frozen => return Ok(Mapped::Retry),
            Entry::Empty | Entry::Mmio(_) | Entry::Link(_) => {}
            Entry::Leaf(old) => {
                if old.allows(want.access) {
                    return Ok(Mapped::Spurious);
                }
                if old.pfn != leaf.pfn {
                    return Err(Bug::LeafRetargeted {
                        gfn: want.gfn,
                        level: at.level,
                        mapped: old.pfn,
                        wanted: leaf.pfn,
                    });
                }
                leaf.writable = leaf.writable.max(old.writable);
                leaf.dirty |= old.dirty;
                if leaf == old {
                    return Ok(Mapped::Spurious);
                }
            }
        }
        let new = Entry::Leaf(leaf);
        let raw = self.format.encode(new, at.level);
        let Ok(flush) = judge(at.entry, new, true) else {
            let (gfn, level) = (want.gfn, at.level);
            return Err(Bug::IllegalTransition { gfn, level, old: at.raw.0, new: raw.0 });
        };
        if at.cell.compare_exchange(at.raw, raw).is_err() {
            return Ok(Mapped::Retry);
        }
        if flush != Flush::None {
            removed.owe(GfnRange::block(want.gfn, at.level));
        }
        match at.entry {
            Entry::Leaf(_) => {}
            Entry::Link(table) => {
                counters.pages(size).add(1);
                counters.pages_collapsed.add(1);
                self.remove_table(env, shared, table, at.level, removed);
            }
            _ => counters.pages(size).add(1),
        }
        counters.fixed(size).add(1);
        Ok(Mapped::Fixed(size))
    }
}
