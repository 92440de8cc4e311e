//! Every entry of every root, in order: what the audit and the users' views are made of; and the end of a VM,
//! when every table page goes back.
//!
//! Read-only but for `free_all`. Invariant: runs under Exclusive (or with the engine to itself), so tables
//! stay as they are but for accessed and dirty bits.

use super::root::Root;
use super::{Env, Tdp};
use crate::addr::{Gfn, GfnRange, Level};
use crate::arch::entry::{Entry, Format, Raw};
use crate::host::Host;
use crate::names::AddressSpace;
use crate::table::cursor::{Cursor, Step};
use crate::tlb::lock::Exclusive;
use crate::tlb::reader::Line;
use crate::tlb::reclaim::PageList;
use core::ops::ControlFlow;

/// One entry as the visit meets it; a link comes before the entries below it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Visit {
    pub(crate) space: AddressSpace,
    pub(crate) root_is_valid: bool,
    pub(crate) level: Level,
    pub(crate) gfn: Gfn,
    pub(crate) raw: Raw,
    pub(crate) entry: Entry,
}

impl<F: Format> Tdp<F> {
    /// Shows every entry that is not empty, until `show` says to stop.
    pub(crate) fn for_each_entry<H: Host>(
        &self,
        env: Env<'_, H>,
        exclusive: &Exclusive<'_>,
        show: impl FnMut(Visit) -> ControlFlow<()>,
    ) {
        self.for_each_entry_of(env, exclusive, GfnRange::ALL, Level::L1, show);
    }

    /// Shows every entry that is not empty, covers any of `range` and lies at `lowest` or above it, until `show` says
    /// to stop.
    pub(crate) fn for_each_entry_of<H: Host>(
        &self,
        env: Env<'_, H>,
        exclusive: &Exclusive<'_>,
        range: GfnRange,
        lowest: Level,
        mut show: impl FnMut(Visit) -> ControlFlow<()>,
    ) {
        for root in self.roots.all().iter() {
            let (tables, format) = (env.tables(), &self.format);
            let mut cursor = Cursor::new(tables, format, exclusive, root.page, range, lowest, u64::MAX);
            while let Some(step) = cursor.next() {
                let Step { level, gfn, raw, entry, .. } = step;
                let (space, root_is_valid) = (root.space, root.is_valid());
                if entry != Entry::Empty
                    && show(Visit { space, root_is_valid, level, gfn, raw, entry }).is_break()
                {
                    return;
                }
            }
        }
    }

    /// Frees every table of a root, and the root's page, when no reader and no processor is left.
    pub(crate) fn free_all<H: Host>(&self, env: Env<'_, H>, line: &Line, root: &Root) {
        let tables = env.tables();
        let section = line.walk(env.tlb);
        let mut pending = PageList::new();
        let mut done = PageList::new();
        tables.describe(root.page, Gfn::new(0), self.format.root_level());
        pending.push(&tables, root.page);
        while let Some(page) = pending.pop(&tables) {
            let (_, level) = tables.description(page);
            if let Some(level) = level.filter(|level| *level > Level::L1) {
                for cell in tables.page(page, &section).entries() {
                    if let Entry::Link(child) = self.format.decode(cell.load(), level) {
                        pending.push(&tables, child);
                    }
                }
            }
            done.push(&tables, page);
        }
        tables.free_list(done);
    }
}
