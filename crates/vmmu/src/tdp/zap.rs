//! Removal: leaves of a range under Exclusive, whole subtrees, and the entries of invalid roots under Shared
//! (T95–T108).
//!
//! Invariants: a table is unlinked first, then all its entries are exchanged for frozen ones, then it is
//! collected; what was collected is retired only with a generation advanced afterwards; work between two
//! looks at the clock is bounded by a budget of entries.

use super::root::Root;
use super::{Env, Tdp};
use crate::addr::{ENTRIES, Gfn, GfnRange, Hpa, Level, PageSize};
use crate::arch::entry::{Entry, Format};
use crate::host::Host;
use crate::table::page::{Section, TablePage};
use crate::table::transition::{Flush, judge};
use crate::tlb::Tlb;
use crate::tlb::lock::{Exclusive, Shared};
use crate::tlb::reader::Line;
use crate::tlb::reclaim::PageList;
use crate::tlb::shootdown::FlushDebt;

/// What a removal took out: tables to be retired, and the flush that must come first.
#[must_use = "tables are to be retired, and a flush may be owed"]
#[derive(Debug)]
pub(crate) struct Removed<'t> {
    pub(super) pages: PageList,
    pub(super) debt: FlushDebt<'t>,
}

impl<'t> Removed<'t> {
    pub(crate) fn new(tlb: &'t Tlb) -> Self {
        Self { pages: PageList::new(), debt: FlushDebt::none(tlb) }
    }
    pub(super) fn owe(&mut self, range: GfnRange) {
        self.debt.owe(range);
    }
    /// Whether nothing was removed and nothing is owed.
    #[inline(always)]
    pub(crate) fn is_empty(&self) -> bool {
        self.pages.count() == 0 && !self.debt.is_owed()
    }
    /// The parts, for whoever pays and retires.
    pub(crate) fn into_parts(self) -> (PageList, FlushDebt<'t>) {
        (self.pages, self.debt)
    }
}

/// Entries that may still be visited before the piece of work ends.
#[derive(Debug)]
pub(crate) struct Budget(u32);

impl Budget {
    /// A piece that stalls others by no more than some ten thousand instructions.
    pub(crate) const fn piece() -> Self {
        Self(4096)
    }
    fn spend(&mut self, n: u32) -> bool {
        self.0 = self.0.saturating_sub(n);
        self.0 > 0
    }
}

/// What becomes of tables that lie wholly in a range that is unmapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum EmptyTables {
    /// They stay: the range is likely to be mapped again (T100).
    Keep,
    /// They go.
    Free,
}

/// A walk's constants, to keep the recursion's arguments few.
struct Unmap<'a, 'e, 't, F, H> {
    engine: &'a Tdp<F>,
    env: Env<'e, H>,
    exclusive: &'e Exclusive<'e>,
    range: GfnRange,
    tables: EmptyTables,
    root_is_valid: bool,
    removed: &'a mut Removed<'t>,
    budget: &'a mut Budget,
}

impl<F: Format> Tdp<F> {
    /// Removes the leaves of all roots that map any of `range`, valid roots or not, those that merely overlap
    /// it included (T100). Returns where to go on when the budget ended the piece.
    pub(crate) fn unmap<'e, H: Host>(
        &self,
        env: Env<'e, H>,
        exclusive: &'e Exclusive<'e>,
        range: GfnRange,
        tables: EmptyTables,
        removed: &mut Removed<'_>,
    ) -> Option<Gfn> {
        let limit = GfnRange::new(Gfn::new(0), self.format.max_gfn().offset(1)).unwrap_or(GfnRange::ALL);
        let mut range = range.intersect(limit);
        let mut resume = None;
        for root in self.roots.all().iter() {
            if range.is_empty() {
                break;
            }
            let page = env.tables().page(root.page, exclusive);
            let mut unmap = Unmap {
                engine: self,
                env,
                exclusive,
                range,
                tables,
                root_is_valid: root.is_valid(),
                removed,
                budget: &mut Budget::piece(),
            };
            if let Some(at) = unmap.table(page, Gfn::new(0), self.format.root_level()) {
                // The next piece starts here with every root, so the other roots need go no further now.
                range = GfnRange::new(range.start(), at).unwrap_or(GfnRange::EMPTY);
                resume = Some(at);
            }
        }
        resume
    }

    /// Takes everything out of a table that was just unlinked from an entry of `level` at `gfn`, and collects
    /// it (T95). Hardware may still set accessed and dirty bits in it (T96), faults may still try to install.
    pub(super) fn remove_table<'e, H: Host>(
        &self,
        env: Env<'e, H>,
        section: &'e impl LineSection,
        table: Hpa,
        gfn: Gfn,
        level: Level,
        removed: &mut Removed<'_>,
    ) {
        let Some(below) = level.below() else { return };
        let tables = env.tables();
        let counters = &section.line().counters;
        let frozen = self.format.encode(Entry::Frozen, below);
        let page = tables.page(table, section);
        for (index, cell) in page.entries().enumerate() {
            match self.format.decode(cell.swap(frozen), below) {
                Entry::Leaf(_) => {
                    if let Some(size) = PageSize::at(below) {
                        counters.pages(size).sub(1);
                    }
                }
                Entry::Link(child) => {
                    let child_gfn = gfn.offset(index as u64 * below.pages());
                    self.remove_table(env, section, child, child_gfn, below, removed);
                }
                Entry::Empty | Entry::Mmio(_) | Entry::Frozen => {}
            }
        }
        tables.unlinked();
        counters.mmu_shadow_zapped.add(1);
        removed.pages.push(&tables, table);
    }

    /// Removes entries of an invalid root, lowest tables first, until the budget ends; returns whether the
    /// root is empty. The root's shootdown has ended, so nothing is owed (T104, T148j).
    pub(crate) fn zap_invalid<'e, H: Host>(
        &self,
        env: Env<'e, H>,
        shared: &'e Shared<'e>,
        root: &Root,
        removed: &mut Removed<'_>,
    ) -> bool {
        debug_assert!(!root.is_valid());
        let page = env.tables().page(root.page, shared);
        self.clear(env, shared, page, self.format.root_level(), &mut Budget::piece(), removed)
    }

    /// Empties a table below which nobody maps any more, children first. Returns whether it got to the end.
    fn clear<'e, H: Host>(
        &self,
        env: Env<'e, H>,
        shared: &'e Shared<'e>,
        page: TablePage<'e>,
        level: Level,
        budget: &mut Budget,
        removed: &mut Removed<'_>,
    ) -> bool {
        let empty = self.format.empty();
        for cell in page.entries() {
            let raw = cell.load();
            match (self.format.decode(raw, level), level.below()) {
                (Entry::Empty, _) => {}
                (Entry::Link(child), Some(below)) => {
                    let child_page = env.tables().page(child, shared);
                    if below > Level::L1 && !self.clear(env, shared, child_page, below, budget, removed) {
                        return false;
                    }
                    cell.swap(empty);
                    // A table of leaves is taken out whole: 512 entries are the unit of the budget.
                    self.remove_table(env, shared, child, Gfn::new(0), level, removed);
                    if !budget.spend(ENTRIES as u32) {
                        return false;
                    }
                }
                (Entry::Leaf(_), _) => {
                    cell.swap(empty);
                    if let Some(size) = PageSize::at(level) {
                        shared.line().counters.pages(size).sub(1);
                    }
                }
                (Entry::Mmio(_) | Entry::Frozen | Entry::Link(_), _) => {
                    cell.swap(empty);
                }
            }
        }
        true
    }
}

impl<'e, F: Format, H: Host> Unmap<'_, 'e, '_, F, H> {
    /// Visits the entries of one table that the range touches; returns where the budget ended it.
    fn table(&mut self, page: TablePage<'e>, base: Gfn, level: Level) -> Option<Gfn> {
        let covered = match level.above() {
            Some(above) => GfnRange::block(base, above),
            None => GfnRange::ALL,
        };
        let inside = self.range.intersect(covered);
        if inside.is_empty() {
            return None;
        }
        let format = &self.engine.format;
        let last = Gfn::new(inside.end().raw() - 1);
        for index in level.index(inside.start())..=level.index(last) {
            let gfn = base.offset(index as u64 * level.pages());
            if !self.budget.spend(1) {
                return Some(gfn.max(self.range.start()));
            }
            let cell = page.entry(index);
            match format.decode(cell.load(), level) {
                Entry::Empty | Entry::Mmio(_) | Entry::Frozen => {}
                old @ Entry::Leaf(_) => {
                    cell.swap(format.empty());
                    self.owe(old, gfn, level);
                    if let Some(size) = PageSize::at(level) {
                        self.exclusive.line().counters.pages(size).sub(1);
                    }
                }
                old @ Entry::Link(table) => {
                    let block = GfnRange::block(gfn, level);
                    if self.tables == EmptyTables::Free && self.range.covers(block) {
                        cell.swap(format.empty());
                        self.owe(old, gfn, level);
                        self.engine.remove_table(self.env, self.exclusive, table, gfn, level, self.removed);
                        self.budget.spend(ENTRIES as u32);
                    } else if let Some(below) = level.below() {
                        let child = self.env.tables().page(table, self.exclusive);
                        let stopped = self.table(child, gfn, below);
                        if stopped.is_some() {
                            return stopped;
                        }
                    }
                }
            }
        }
        None
    }

    fn owe(&mut self, old: Entry, gfn: Gfn, level: Level) {
        // Removal is never illegal.
        if judge(old, Entry::Empty, self.root_is_valid) != Ok(Flush::None) {
            self.removed.owe(GfnRange::block(gfn, level));
        }
    }
}

/// A section whose line counts what happens in it.
pub(super) trait LineSection: Section {
    fn line(&self) -> &Line;
}
impl LineSection for Shared<'_> {
    fn line(&self) -> &Line {
        Shared::line(self)
    }
}
impl LineSection for Exclusive<'_> {
    fn line(&self) -> &Line {
        Exclusive::line(self)
    }
}
