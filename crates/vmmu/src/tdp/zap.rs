//! Removal: leaves of a range under Exclusive, whole subtrees, and the entries of invalid roots under Shared
//! (T95–T108).
//!
//! Invariants: a table is unlinked first, then all its entries are exchanged for frozen ones, then it is
//! collected; what was collected is retired only with a generation advanced afterwards; one piece of work is
//! bounded by the cursor's budget.

use super::root::Root;
use super::{Env, Tdp};
use crate::addr::{ENTRIES, Gfn, GfnRange, Hpa, Level, PageSize};
use crate::arch::entry::{Entry, Format};
use crate::coverage::transition;
use crate::host::Host;
use crate::mutants::Mutant::EmptiedNotFrozen;
use crate::mutants::mutant;
use crate::table::cursor::{Cursor, PIECE, Resume};
use crate::table::page::Section;
use crate::table::transition::{Flush, changed, judge};
use crate::tlb::Tlb;
use crate::tlb::lock::{Exclusive, Shared};
use crate::tlb::reader::Line;
use crate::tlb::reclaim::PageList;
use crate::tlb::shootdown::FlushDebt;

/// What a removal took out: tables to be retired, and the flush that must come first.
#[must_use = "tables are to be retired, and a flush may be owed"]
#[derive(Debug)]
pub(crate) struct Removed<'t> {
    pages: PageList,
    debt: FlushDebt<'t>,
}

impl<'t> Removed<'t> {
    pub(crate) fn new(tlb: &'t Tlb) -> Self {
        Self { pages: PageList::new(), debt: FlushDebt::none(tlb) }
    }
    pub(super) fn owe(&mut self, range: GfnRange) {
        self.debt.owe(range);
    }
    /// Whether a flush is owed.
    pub(crate) fn is_owed(&self) -> bool {
        self.debt.is_owed()
    }
    /// The parts, for whoever pays and retires.
    pub(crate) fn into_parts(self) -> (PageList, FlushDebt<'t>) {
        (self.pages, self.debt)
    }
}

/// Where the removal of an invalid root's entries has got to: levels from the lowest up, each over all frames
/// (T101), so that no piece takes out more than one table of leaves beyond its budget.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ZapProgress {
    level: Level,
    from: Gfn,
}

impl ZapProgress {
    pub(crate) const START: Self = Self { level: Level::L2, from: Gfn::new(0) };

    /// Whether a budget ended the piece, not its level.
    pub(crate) fn is_within_a_level(self) -> bool {
        self.from > Gfn::new(0)
    }
}

impl<F: Format> Tdp<F> {
    /// Removes the leaves of all roots that map any of `range`, valid roots or not, those that merely overlap
    /// it included; links stay (T100). Returns where to go on when the budget ended the piece.
    pub(crate) fn unmap<H: Host>(
        &self,
        env: Env<'_, H>,
        exclusive: &Exclusive<'_>,
        mut range: GfnRange,
        removed: &mut Removed<'_>,
    ) -> Option<Resume> {
        let mut left = None;
        for root in self.roots.all().iter() {
            let mut cursor =
                Cursor::new(env.tables(), &self.format, exclusive, root.page, range, Level::L1, PIECE);
            while let Some(step) = cursor.next() {
                if let (Entry::Leaf(_), Some(size)) = (step.entry, PageSize::at(step.level)) {
                    let old = self.format.decode(step.cell.swap(self.format.empty()), step.level);
                    changed(step.gfn, step.level, old, Entry::Empty);
                    exclusive.line().counters.pages(size).sub(1);
                    // Removal is never illegal.
                    if judge(step.entry, Entry::Empty, root.is_valid()) != Ok(Flush::None) {
                        removed.owe(step.block());
                    }
                }
            }
            if let Some(resume) = cursor.finish() {
                // The next piece starts here with every root, so the other roots need go no further now.
                range = GfnRange::new(range.start(), resume.0).unwrap_or(GfnRange::EMPTY);
                left = Some(resume);
            }
        }
        left
    }

    /// Takes everything out of a table that was just unlinked from an entry of `level`, and collects it (T95).
    /// Hardware may still set accessed and dirty bits in it (T96), faults may still try to install.
    pub(super) fn remove_table<H: Host>(
        &self,
        env: Env<'_, H>,
        section: &impl LineSection,
        table: Hpa,
        level: Level,
        removed: &mut Removed<'_>,
    ) {
        let Some(below) = level.below() else { return };
        let tables = env.tables();
        let counters = &section.line().counters;
        let frozen = if mutant(EmptiedNotFrozen) { Entry::Empty } else { Entry::Frozen };
        let frozen = self.format.encode(frozen, below);
        for cell in tables.page(table, section).entries() {
            let old = self.format.decode(cell.swap(frozen), below);
            // Nobody can reach the table any more.
            transition(below, old, Entry::Frozen);
            match old {
                Entry::Leaf(_) => {
                    if let Some(size) = PageSize::at(below) {
                        counters.pages(size).sub(1);
                    }
                }
                Entry::Link(child) => self.remove_table(env, section, child, below, removed),
                Entry::Empty | Entry::Mmio(_) | Entry::Frozen => {}
            }
        }
        counters.table_pages.sub(1);
        counters.mmu_shadow_zapped.add(1);
        removed.pages.push(&tables, table);
    }

    /// Removes entries of an invalid root until the budget ends; returns where to go on. The shootdown of whoever
    /// invalidated it is what was owed for all of them (T104, T148j); it may still be under way, and so may not
    /// serve as the retirement of what is unlinked here.
    pub(crate) fn zap_invalid<H: Host>(
        &self,
        env: Env<'_, H>,
        shared: &Shared<'_>,
        root: &Root,
        progress: ZapProgress,
        removed: &mut Removed<'_>,
    ) -> Option<ZapProgress> {
        debug_assert!(!root.is_valid());
        let ZapProgress { level, from } = progress;
        let range = GfnRange::new(from, GfnRange::ALL.end()).unwrap_or(GfnRange::EMPTY);
        // A link takes a table of 512 entries with it.
        let budget = PIECE / ENTRIES as u64;
        let mut cursor = Cursor::new(env.tables(), &self.format, shared, root.page, range, level, budget);
        while let Some(step) = cursor.next() {
            if step.level != level || step.entry == Entry::Empty {
                continue;
            }
            let old = self.format.decode(step.cell.swap(self.format.empty()), level);
            changed(step.gfn, level, old, Entry::Empty);
            match step.entry {
                Entry::Link(table) => self.remove_table(env, shared, table, level, removed),
                Entry::Leaf(_) => {
                    if let Some(size) = PageSize::at(level) {
                        shared.line().counters.pages(size).sub(1);
                    }
                }
                Entry::Empty | Entry::Mmio(_) | Entry::Frozen => {}
            }
        }
        match cursor.finish() {
            Some(Resume(from)) => Some(ZapProgress { level, from }),
            None if level < self.format.root_level() => {
                level.above().map(|level| ZapProgress { level, from: Gfn::new(0) })
            }
            None => None,
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
