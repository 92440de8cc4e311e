//! The cursor: the one walk over a range of guest frames, for removal, views and every verb to come (T53–T62).
//!
//! Order is pre-order: an entry is met before those below it, and decided upon with a value read just then
//! (T55). A piece of work ends when its budget of entries is spent; what is left is a [`Resume`], so nothing
//! that was borrowed in one section survives into the next (T58). Invariants: every entry at or above the
//! lowest level that overlaps the range is met once, those that merely overlap it included (T56); each piece
//! makes progress (T57).

use super::arena::Tables;
use super::page::{EntryCell, Section, TablePage};
use crate::addr::{Gfn, GfnRange, Hpa, Level};
use crate::arch::entry::{Entry, Format, Raw};
use crate::host::Host;

/// Entries that one piece of work may meet: it stalls others by no more than some ten thousand instructions.
pub(crate) const PIECE: u64 = 4096;

/// An entry as the cursor meets it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step<'s> {
    pub(crate) cell: &'s EntryCell,
    pub(crate) level: Level,
    /// The first guest frame that the entry covers; may lie before the range.
    pub(crate) gfn: Gfn,
    pub(crate) raw: Raw,
    pub(crate) entry: Entry,
}

impl Step<'_> {
    /// The guest frames that the entry covers.
    pub(crate) fn block(&self) -> GfnRange {
        GfnRange::block(self.gfn, self.level)
    }
}

/// What a piece of work left undone.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Resume(pub(crate) Gfn);

/// A walk in progress.
pub(crate) struct Cursor<'s, H, F, S> {
    tables: Tables<'s, H>,
    format: &'s F,
    section: &'s S,
    /// The page at each level, by level number − 1, for the levels from the root down to the current one.
    path: [Option<TablePage<'s>>; 5],
    root_level: Level,
    lowest: Level,
    range: GfnRange,
    at: Option<(Gfn, Level)>,
    budget: u64,
}

impl<'s, H: Host, F: Format, S: Section> Cursor<'s, H, F, S> {
    /// A walk over `range` in the tables of `root`, down to entries of level `lowest`, meeting at most `budget`
    /// entries.
    pub(crate) fn new(
        tables: Tables<'s, H>,
        format: &'s F,
        section: &'s S,
        root: Hpa,
        range: GfnRange,
        lowest: Level,
        budget: u64,
    ) -> Self {
        let root_level = format.root_level();
        let mut path = [None; 5];
        path[usize::from(root_level.number()) - 1] = Some(tables.page(root, section));
        let limit = GfnRange::new(Gfn::new(0), format.max_gfn().offset(1)).unwrap_or(GfnRange::ALL);
        // From the root to the first entry of the lowest level is progress too: never less than that.
        let budget = budget.max(16);
        Self {
            tables,
            format,
            section,
            path,
            root_level,
            lowest,
            range: range.intersect(limit),
            at: None,
            budget,
        }
    }

    /// The next entry; `None` at the end of the range or of the budget.
    pub(crate) fn next(&mut self) -> Option<Step<'s>> {
        if self.budget == 0 {
            return None;
        }
        let (gfn, level) = match self.at {
            None if self.range.is_empty() => return None,
            None => (self.range.start(), self.root_level),
            Some((gfn, level)) => self.down(gfn, level).or_else(|| self.sideways(gfn, level))?,
        };
        self.budget -= 1;
        self.at = Some((gfn, level));
        let page = self.path[usize::from(level.number()) - 1]?;
        let cell = page.entry(level.index(gfn));
        let raw = cell.load();
        let entry = self.format.decode(raw, level);
        Some(Step { cell, level, gfn: gfn.align_down(level), raw, entry })
    }

    /// To the first entry below, where the current one is a link now.
    fn down(&mut self, gfn: Gfn, level: Level) -> Option<(Gfn, Level)> {
        if level <= self.lowest {
            return None;
        }
        let below = level.below()?;
        let cell = self.path[usize::from(level.number()) - 1]?.entry(level.index(gfn));
        let Entry::Link(table) = self.format.decode(cell.load(), level) else { return None };
        self.path[usize::from(below.number()) - 1] = Some(self.tables.page(table, self.section));
        Some((gfn, below))
    }

    /// To the next entry of the same table, or of the nearest one above that has a next.
    fn sideways(&mut self, gfn: Gfn, level: Level) -> Option<(Gfn, Level)> {
        let next = gfn.align_down(level).offset(level.pages());
        if next >= self.range.end() {
            self.at = Some((self.range.end(), self.root_level));
            self.range = GfnRange::EMPTY;
            return None;
        }
        let mut level = level;
        while level < self.root_level && level.index(next) == 0 {
            level = level.above()?;
        }
        Some((next, level))
    }

    /// Ends the walk: what is left of the range, if the budget ended it.
    pub(crate) fn finish(mut self) -> Option<Resume> {
        let (gfn, level) = self.at?;
        if self.range.is_empty() {
            return None;
        }
        // The entry met last was dealt with, but not what lies below it.
        self.down(gfn, level).or_else(|| self.sideways(gfn, level)).map(|(next, _)| Resume(next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{PageSize, Pfn};
    use crate::arch::Npt;
    use crate::arch::entry::{NestedAccess, Writable};
    use crate::names::AddressSpace;
    use crate::table::arena::Arena;
    use crate::table::cache::Cache;
    use crate::tdp::map::{Mapped, Wanted};
    use crate::tdp::{Env, Tdp};
    use crate::testing::QuietHost;
    use crate::tlb::Tlb;
    use proptest::prelude::*;
    use std::vec::Vec;

    /// Leaves: first frame and level.
    type Leaves = Vec<(u64, u8)>;

    /// Maps `leaves`, walks `range` down to `lowest` in pieces of `budget`; returns what was met and what should be.
    fn walk(leaves: &[(u64, u8)], range: (u64, u64), budget: u64, lowest: Level) -> (Leaves, Leaves) {
        let (tlb, host) = (Tlb::new(), QuietHost::new());
        let arena = Arena::new(1 << 30, 1, false);
        let env = Env { host: &host, tlb: &tlb, arena: &arena };
        let tdp = Tdp::new(Npt::new(false, 48).expect("legal"));
        let line = tlb.readers.take(None);
        let mut cache = Cache::default();
        cache.top_up(&env.tables(), &tdp.format).expect("memory");
        let page = cache.take().expect("filled");
        let (root, _) = tdp.roots.insert(AddressSpace::NORMAL, page);
        let mut expected = Vec::new();
        for (gfn, level) in leaves {
            cache.top_up(&env.tables(), &tdp.format).expect("memory");
            let shared = tlb.lock.shared(&tlb, line, &host);
            let (gfn, level) = (Gfn::new(*gfn), Level::new(*level).expect("1 to 3"));
            let at = tdp.walk(env, &root, gfn, level, &shared);
            if at.raw != tdp.format.empty() {
                continue;
            }
            let want = Wanted {
                gfn,
                pfn: Pfn::new(gfn.raw()),
                level,
                writable: Writable::Yes,
                access: NestedAccess::READ,
            };
            let mapped = tdp.map(env, &shared, &root, at, want, &mut cache);
            assert!(matches!(mapped, Mapped::Fixed(_)), "{mapped:?}");
            expected.push((gfn.align_down(level).raw(), level.number()));
        }
        let range = GfnRange::new(Gfn::new(range.0), Gfn::new(range.1)).expect("ordered");
        expected.sort_unstable();
        expected.retain(|(gfn, level)| {
            let level = Level::new(*level).expect("1 to 3");
            level >= lowest && GfnRange::block(Gfn::new(*gfn), level).overlaps(range)
        });
        let mut met = Vec::new();
        let section = line.walk(&tlb);
        let mut left = Some(range);
        while let Some(piece) = left {
            let mut cursor =
                Cursor::new(env.tables(), &tdp.format, &section, root.page, piece, lowest, budget);
            while let Some(step) = cursor.next() {
                if let Entry::Leaf(_) = step.entry {
                    assert!(PageSize::at(step.level).is_some());
                    met.push((step.gfn.raw(), step.level.number()));
                }
            }
            left = cursor.finish().and_then(|Resume(at)| {
                assert!(at > piece.start() || budget > 16, "a piece from {piece:?} made no progress");
                GfnRange::new(at, range.end())
            });
        }
        drop(section);
        met.dedup();
        cache.release(&env.tables());
        tdp.free_all(env, line, &root);
        assert_eq!(env.tables().release_all(), 0);
        (met, expected)
    }

    proptest! {
        /// T54, T56, T57: every leaf that overlaps the range is met, in order, whatever the budget of a piece.
        #[test]
        fn every_leaf_is_met_in_order(
            leaves in proptest::collection::vec((0u64..1 << 21, 1u8..=3), 0..24),
            start in 0u64..1 << 21,
            len in 0u64..1 << 20,
            budget in 16u64..600,
            lowest in 1u8..=3,
        ) {
            let lowest = Level::new(lowest).expect("1 to 3");
            let (met, expected) = walk(&leaves, (start, start + len), budget, lowest);
            prop_assert_eq!(met, expected);
        }
    }

    /// T61: a walk over an empty root meets at most its 512 entries.
    #[test]
    fn an_empty_root_is_cheap() {
        let (met, _) = walk(&[], (0, 1 << 36), 600, Level::L1);
        assert!(met.is_empty());
    }
}
