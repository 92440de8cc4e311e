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
use crate::coverage::{Point, hit};
use crate::error::Bug;
use crate::host::Host;
use crate::mutants::Mutant::MmioOverLeaf;
use crate::mutants::mutant;
use crate::table::cache::{Cache, PreparedPage};
use crate::table::page::{EntryCell, Section, TablePage};
use crate::table::transition::{Flush, changed, judge};
use crate::tlb::lock::Shared;

/// An entry and what it held when it was read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Position<'s> {
    pub(crate) cell: &'s EntryCell,
    pub(crate) level: Level,
    pub(crate) raw: Raw,
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
#[must_use]
#[derive(Debug)]
pub(crate) enum Mapped<'t> {
    /// A leaf of this size was installed or upgraded.
    Fixed(PageSize),
    /// The access was allowed already.
    Spurious,
    /// Somebody else changed something on the way: the guest tries again.
    Retry,
    /// A table is needed, and the cache has none.
    NoTable,
    /// A leaf of this size took the place of a table, which is to be paid for and retired before Shared ends.
    Collapsed(PageSize, Removed<'t>),
    /// An invariant is broken.
    Broken(Bug),
}

/// How an attempt to cache "no slot" ended.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum MmioMapped {
    /// The entry was made.
    Created,
    /// There is no table for it: the access is a device's all the same.
    NotCached,
    /// Something is there by now: the guest tries again.
    Retry,
}

/// What stopped a descent.
enum Stopped {
    Retry,
    /// A table is needed, and the cache has none.
    NoTable,
    /// A large leaf that allows the access, or that must not be split.
    AtLeaf,
}

/// What a descent has at hand.
struct Descent<'a, 's, H> {
    env: Env<'s, H>,
    shared: &'s Shared<'s>,
    gfn: Gfn,
    goal: Level,
    /// Split a large leaf on the way where it does not allow this.
    split_for: Option<NestedAccess>,
    cache: &'a mut Cache,
}

impl<F: Format> Tdp<F> {
    /// Walks from `root` down to the entry for `gfn` at `lowest`, or to the last entry above it that is no
    /// link. `gfn` is within [`Format::max_gfn`].
    #[inline(always)]
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
            let cell = page.entry(level.index(gfn));
            let raw = cell.load();
            if level > lowest
                && let (Some(table), Some(below)) = (self.format.link(raw, level), level.below())
            {
                page = tables.page(table, section);
                level = below;
                continue;
            }
            return Position { cell, level, raw };
        }
    }

    #[inline(always)]
    fn position(page: TablePage<'_>, gfn: Gfn, level: Level) -> Position<'_> {
        let cell = page.entry(level.index(gfn));
        Position { cell, level, raw: cell.load() }
    }

    /// Maps `want`, starting from `at`, a position for its frame that was read in the section that lasts. The
    /// root, the invalidation sequence and the slots were rechecked under `shared`.
    #[inline(always)]
    pub(crate) fn map<'s, H: Host>(
        &self,
        env: Env<'s, H>,
        shared: &'s Shared<'_>,
        root: &Root,
        at: Position<'s>,
        want: Wanted,
        cache: &mut Cache,
    ) -> Mapped<'s> {
        if want.level > Level::L1 && (want.gfn.raw() ^ want.pfn.raw()) & (want.level.pages() - 1) != 0 {
            return Mapped::Broken(Bug::Misaligned { gfn: want.gfn, pfn: want.pfn, level: want.level });
        }
        if at.level == want.level {
            return self.install(env, shared, at, want);
        }
        self.map_elsewhere(env, shared, root, at, want, cache)
    }

    /// The rest of [`Tdp::map`]: the position is not at the wanted level, so a table is to be linked, a large
    /// leaf split, or a table stands where a large leaf is wanted.
    #[inline(never)]
    fn map_elsewhere<'s, H: Host>(
        &self,
        env: Env<'s, H>,
        shared: &'s Shared<'_>,
        root: &Root,
        at: Position<'s>,
        want: Wanted,
        cache: &mut Cache,
    ) -> Mapped<'s> {
        let at = if at.level < want.level { self.walk(env, root, want.gfn, want.level, shared) } else { at };
        let (gfn, goal, split_for) = (want.gfn, want.level, Some(want.access));
        match self.descend(at, &mut Descent { env, shared, gfn, goal, split_for, cache }) {
            Ok(at) => self.install(env, shared, at, want),
            Err(Stopped::Retry) => Mapped::Retry,
            Err(Stopped::NoTable) => Mapped::NoTable,
            Err(Stopped::AtLeaf) => Mapped::Spurious,
        }
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
    ) -> MmioMapped {
        let (gfn, goal, split_for) = (mmio.gfn, Level::L1, None);
        let at = match self.descend(at, &mut Descent { env, shared, gfn, goal, split_for, cache }) {
            Ok(at) => at,
            Err(Stopped::NoTable) => return MmioMapped::NotCached,
            Err(Stopped::AtLeaf) => {
                hit(Point::RetryDeviceTaken);
                return MmioMapped::Retry;
            }
            Err(Stopped::Retry) => return MmioMapped::Retry,
        };
        let (old, new) = (self.format.decode(at.raw, at.level), Entry::Mmio(mmio));
        let replaceable = judge(old, new, true) == Ok(Flush::None) && old != Entry::Frozen;
        if !replaceable && !mutant(MmioOverLeaf) {
            hit(Point::RetryDeviceTaken);
            return MmioMapped::Retry;
        }
        if at.cell.compare_exchange(at.raw, self.format.encode(new, Level::L1)).is_err() {
            hit(Point::RetryLostDevice);
            return MmioMapped::Retry;
        }
        changed(mmio.gfn, Level::L1, old, new);
        shared.line().counters.pf_mmio_spte_created.add(1);
        MmioMapped::Created
    }

    /// Goes down to the goal, linking tables from the cache where there are none.
    fn descend<'s, H: Host>(
        &self,
        mut at: Position<'s>,
        to: &mut Descent<'_, 's, H>,
    ) -> Result<Position<'s>, Stopped> {
        let tables = to.env.tables();
        while at.level > to.goal {
            let below = at.level.below().ok_or(Stopped::Retry)?;
            let table = match self.format.decode(at.raw, at.level) {
                Entry::Frozen => {
                    hit(Point::RetryFrozen);
                    return Err(Stopped::Retry);
                }
                Entry::Link(table) => table,
                old @ (Entry::Empty | Entry::Mmio(_)) => {
                    let page = to.cache.take().ok_or(Stopped::NoTable)?;
                    let table = page.page().at();
                    tables.describe(table, to.gfn.align_down(at.level), below);
                    let link = self.format.encode(Entry::Link(table), at.level);
                    if at.cell.compare_exchange(at.raw, link).is_err() {
                        to.cache.put_back(page);
                        hit(Point::RetryLostLink);
                        return Err(Stopped::Retry);
                    }
                    changed(to.gfn, at.level, old, Entry::Link(table));
                    page.into_inner().hand_over();
                    let counters = &to.shared.line().counters;
                    counters.table_pages.add(1);
                    counters.table_pages_cached.sub(1);
                    table
                }
                Entry::Leaf(leaf) => {
                    if to.split_for.is_none_or(|access| leaf.allows(access)) {
                        return Err(Stopped::AtLeaf);
                    }
                    self.split(at, leaf, below, to)?
                }
            };
            at = Self::position(tables.page(table, to.shared), to.gfn, below);
        }
        Ok(at)
    }

    /// Replaces a large leaf by a table of 512 leaves that say the same (T121). No flush is owed (T148i).
    #[cold]
    fn split<H: Host>(
        &self,
        at: Position<'_>,
        leaf: Leaf,
        below: Level,
        to: &mut Descent<'_, '_, H>,
    ) -> Result<Hpa, Stopped> {
        let tables = to.env.tables();
        let (Some(large), Some(small)) = (PageSize::at(at.level), PageSize::at(below)) else {
            return Err(Stopped::Retry);
        };
        let page = to.cache.take().ok_or(Stopped::NoTable)?.into_inner();
        let table = page.at();
        tables.describe(table, to.gfn.align_down(at.level), below);
        tables.fill_with(&page, |index| {
            let pfn = leaf.pfn.offset(index as u64 * below.pages());
            self.format.encode(Entry::Leaf(Leaf { pfn, ..leaf }), below)
        });
        let link = Entry::Link(table);
        debug_assert_eq!(judge(Entry::Leaf(leaf), link, true), Ok(Flush::None));
        if at.cell.compare_exchange(at.raw, self.format.encode(link, at.level)).is_err() {
            to.cache.put_back(PreparedPage::new(&tables, &self.format, page));
            hit(Point::RetryLostSplit);
            return Err(Stopped::Retry);
        }
        changed(to.gfn, at.level, Entry::Leaf(leaf), link);
        page.hand_over();
        let counters = &to.shared.line().counters;
        counters.table_pages.add(1);
        counters.table_pages_cached.sub(1);
        counters.pages(large).sub(1);
        counters.pages(small).add(ENTRIES as u64);
        counters.pages_split.add(1);
        Ok(table)
    }

    /// Installs the leaf at its own level: where nothing was, by this short way (T148a: nothing is owed).
    #[inline(always)]
    fn install<'s, H: Host>(
        &self,
        env: Env<'s, H>,
        shared: &'s Shared<'_>,
        at: Position<'s>,
        want: Wanted,
    ) -> Mapped<'s> {
        let Some(size) = PageSize::at(at.level) else { return Mapped::Retry };
        let leaf = Leaf {
            pfn: want.pfn.align_down(at.level),
            writable: want.writable,
            executable: true,
            accessed: true,
            dirty: want.writable == Writable::Yes,
        };
        if at.raw != self.format.empty() {
            return self.replace(env, shared, at, want, leaf, size);
        }
        let new = Entry::Leaf(leaf);
        debug_assert_eq!(judge(Entry::Empty, new, true), Ok(Flush::None));
        if at.cell.compare_exchange(at.raw, self.format.encode(new, at.level)).is_err() {
            hit(Point::RetryLostInstall);
            return Mapped::Retry;
        }
        changed(want.gfn, at.level, Entry::Empty, new);
        let counters = &shared.line().counters;
        counters.fixed(size).add(1);
        counters.pages(size).add(1);
        Mapped::Fixed(size)
    }

    /// Installs the leaf in place of what stands there: a leaf with fewer permissions, an MMIO entry, or a table
    /// of smaller pages.
    fn replace<'s, H: Host>(
        &self,
        env: Env<'s, H>,
        shared: &'s Shared<'_>,
        at: Position<'s>,
        want: Wanted,
        mut leaf: Leaf,
        size: PageSize,
    ) -> Mapped<'s> {
        let (gfn, level) = (want.gfn, at.level);
        let old = self.format.decode(at.raw, level);
        match old {
            Entry::Empty | Entry::Mmio(_) | Entry::Link(_) => {}
            Entry::Frozen => {
                hit(Point::RetryFrozen);
                return Mapped::Retry;
            }
            Entry::Leaf(old) => {
                if old.allows(want.access) {
                    return Mapped::Spurious;
                }
                if old.pfn != leaf.pfn {
                    return Mapped::Broken(Bug::LeafRetargeted {
                        gfn,
                        level,
                        mapped: old.pfn,
                        wanted: leaf.pfn,
                    });
                }
                leaf.writable = leaf.writable.max(old.writable);
                leaf.dirty |= old.dirty;
                if leaf == old {
                    return Mapped::Spurious;
                }
            }
        }
        let new = Entry::Leaf(leaf);
        let raw = self.format.encode(new, level);
        let Ok(flush) = judge(old, new, true) else {
            return Mapped::Broken(Bug::IllegalTransition { gfn, level, old: at.raw.0, new: raw.0 });
        };
        if at.cell.compare_exchange(at.raw, raw).is_err() {
            hit(Point::RetryLostReplace);
            return Mapped::Retry;
        }
        changed(gfn, level, old, new);
        let counters = &shared.line().counters;
        counters.fixed(size).add(1);
        if !matches!(old, Entry::Leaf(_)) {
            counters.pages(size).add(1);
        }
        let Entry::Link(table) = old else { return Mapped::Fixed(size) };
        counters.pages_collapsed.add(1);
        let mut removed = Removed::new(env.tlb);
        if flush != Flush::None {
            removed.owe(GfnRange::block(gfn, level));
        }
        self.remove_table(env, shared, table, level, &mut removed);
        Mapped::Collapsed(size, removed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Npt;
    use crate::names::AddressSpace;
    use crate::table::arena::Arena;
    use crate::testing::QuietHost;
    use crate::tlb::Tlb;

    /// PROTOCOLS 5: an MMIO entry replaces only what is not present: a leaf met there, at any level, stays, and so does
    /// what somebody has frozen.
    #[test]
    fn an_mmio_entry_replaces_no_leaf() {
        let (tlb, host) = (Tlb::new(), QuietHost::new());
        let arena = Arena::new(1 << 30, 1, false);
        let env = Env { host: &host, tlb: &tlb, arena: &arena };
        let tdp = Tdp::new(Npt::new(false, 48).expect("legal"));
        let line = tlb.readers.take(None);
        let mut cache = Cache::default();
        cache.top_up(&env.tables(), &tdp.format).expect("memory");
        let (root, _) = tdp.roots.insert(AddressSpace::NORMAL, cache.take().expect("filled"));
        let gfn = Gfn::new(3);
        let mmio = |generation| Mmio { gfn, write: true, generation };
        for level in [Level::L1, Level::L2, Level::L3] {
            cache.top_up(&env.tables(), &tdp.format).expect("memory");
            let shared = tlb.lock.shared(&tlb, line, &host);
            let walk = || tdp.walk(env, &root, gfn, Level::L1, &shared);
            let (access, writable) = (NestedAccess::READ, Writable::No);
            let want = Wanted { gfn, pfn: Pfn::new(3), level, writable, access };
            let (here, above) = (walk(), level > Level::L1);
            let mapped = tdp.map(env, &shared, &root, here, want, &mut cache);
            match mapped {
                Mapped::Collapsed(_, removed) if above => {
                    // No processor and no other reader is there.
                    let (pages, debt) = removed.into_parts();
                    debt.paid_by_what_follows();
                    env.tables().free_list(pages);
                }
                Mapped::Fixed(_) if !above => {}
                other => panic!("{other:?} at {level:?}"),
            }
            let leaf = walk();
            assert_eq!(leaf.level, level);
            assert_eq!(tdp.map_mmio(env, &shared, leaf, mmio(1), &mut cache), MmioMapped::Retry);
            assert_eq!(walk().raw, leaf.raw, "memory became a device's");
        }
        let shared = tlb.lock.shared(&tlb, line, &host);
        let other = Gfn::new(1 << 20);
        let walk = || tdp.walk(env, &root, other, Level::L1, &shared);
        let mmio = |generation| Mmio { gfn: other, write: true, generation };
        for generation in 1..3 {
            assert_eq!(tdp.map_mmio(env, &shared, walk(), mmio(generation), &mut cache), MmioMapped::Created);
        }
        let frozen = tdp.format.encode(Entry::Frozen, Level::L1);
        let before = walk().cell.swap(frozen);
        assert_eq!(tdp.format.decode(before, Level::L1), Entry::Mmio(mmio(2)));
        assert_eq!(tdp.map_mmio(env, &shared, walk(), mmio(3), &mut cache), MmioMapped::Retry);
        assert_eq!(walk().raw, frozen);
        drop(shared);
        cache.release(&env.tables());
        tdp.free_all(env, line, &root);
        assert_eq!(env.tables().release_all(), 0);
    }
}
