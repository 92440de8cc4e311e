//! The audit of what changed: cheap enough for a simulation to ask for wherever no operation is open.
//!
//! Only with the `instrument` feature. It looks at the entries that tasks said they changed
//! ([`crate::instrument::take_changed`]) and at ranges that the caller changed otherwise (a slot, a backing), with
//! the checks of the whole audit; slots, roots and books it looks at whole, for they are few. Invariant: where the
//! structures were in order before, it finds what [`Vm::audit`] would find.

use super::{Audit, AuditError, AuditReport, slots};
use crate::addr::{GfnRange, Level, PageSize};
use crate::arch::entry::{Entry, Writable};
use crate::host::Host;
use crate::instrument::Changed;
use crate::table::arena::{BLOCK_BYTES, BLOCK_TABLES};
use crate::tdp::visit::Visit;
use crate::vm::{Mapping, Vm};
use alloc::collections::BTreeSet;

impl<H: Host> Vm<H> {
    /// Checks the entries of `changed`, those on the way to them, and all of `ranges`; shows the leaves of valid roots
    /// among them. The report holds what was counted by others: its leaves, MMIO entries and tables are as the books
    /// have them, or 0.
    ///
    /// # Errors
    /// The first broken invariant.
    pub fn audit_changed(
        &self,
        changed: &[Changed],
        ranges: &[GfnRange],
        mut show: impl FnMut(Mapping),
    ) -> Result<AuditReport, AuditError> {
        let inner = &*self.inner;
        inner.alive().map_err(AuditError::Refused)?;
        let own = self.own_line();
        let writer = inner.slots.write();
        let slots = slots(inner, &writer)?;
        let exclusive = inner.tlb.lock.exclusive(&inner.tlb, own.line(), &inner.host);
        let mut blocks = BTreeSet::new();
        let free = inner.tables().blocks(|block| {
            blocks.insert(block.raw());
        });
        let mut report = AuditReport::default();
        let mut audit =
            Audit { inner, writer: &writer, report: &mut report, seen: BTreeSet::new(), blocks, error: None };
        let entries = changed.iter().map(|&Changed { gfn, level, with_table }| {
            let below = level.below().filter(|_| with_table);
            (GfnRange::block(gfn, if below.is_some() { level } else { Level::L1 }), below.unwrap_or(level))
        });
        for (range, lowest) in entries.chain(ranges.iter().map(|range| (*range, Level::L1))) {
            // The ways to two entries may share tables.
            audit.seen.clear();
            inner.tdp.for_each_entry_of(inner.env(), &exclusive, range, lowest, |visit| {
                show_leaf(&visit, &mut show);
                audit.check(visit)
            });
            if let Some(error) = audit.error.take() {
                return Err(error);
            }
        }
        audit.roots()?;
        let stats = self.stats();
        drop(exclusive);
        Ok(AuditReport {
            roots: stats.roots,
            tables: stats.table_pages,
            leaves: PageSize::ALL.map(|size| stats.pages(size)),
            mmio: 0,
            slots,
            free,
            cached: stats.table_pages_cached,
            retired: stats.table_pages_retired,
            pages: stats.table_bytes / BLOCK_BYTES * BLOCK_TABLES,
        })
    }
}

fn show_leaf(visit: &Visit, show: &mut impl FnMut(Mapping)) {
    if let (Entry::Leaf(leaf), Some(size)) = (visit.entry, PageSize::at(visit.level))
        && visit.root_is_valid
    {
        let writable = leaf.writable == Writable::Yes;
        show(Mapping { space: visit.space, gfn: visit.gfn, pfn: leaf.pfn, size, writable });
    }
}
