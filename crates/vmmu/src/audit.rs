//! `audit()`: the invariants of the two specifications over the real structures, checked on demand.
//!
//! It reads everything and changes nothing. It stops faults (Exclusive) and slot changes (the slots mutex)
//! while it looks; processors go on and may set accessed and dirty bits. Invariant: every check names the
//! specification's invariant that it proves (section 24 of the two-dimensional specification: T-inv, section
//! 21 of the memory services': M-inv).

#[cfg(feature = "instrument")]
mod changed;

use crate::addr::{Gfn, GfnRange, Hpa, Level, PageSize, Pfn};
use crate::arch::entry::{Entry, Format, Leaf, Raw, Writable};
use crate::error::Error;
use crate::host::{Host, ResolveRequest};
use crate::memory::slot::Slot;
use crate::memory::slots::{Hint, SlotsWriter};
use crate::names::{AddressSpace, SlotId};
use crate::stats::Stats;
use crate::table::arena::{BLOCK_TABLES, block_of};
use crate::tdp::visit::Visit;
use crate::tlb::reader::State;
use crate::vm::{Inner, Vm};
use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use core::fmt;
use core::ops::ControlFlow;

/// What an audit found in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct AuditReport {
    /// Roots, valid and invalid.
    pub roots: u64,
    /// Table pages below roots.
    pub tables: u64,
    /// Leaves of 4 KiB, 2 MiB and 1 GiB.
    pub leaves: [u64; 3],
    /// MMIO entries.
    pub mmio: u64,
    /// Slots of all address spaces.
    pub slots: u64,
    /// Table pages that are free in the arena.
    pub free: u64,
    /// Table pages that vCPUs keep prepared.
    pub cached: u64,
    /// Table pages that were unlinked and wait for their grace.
    pub retired: u64,
    /// Table pages that the host has handed out, in whole blocks. At rest, when no operation is under way on any
    /// thread, the sum of `roots`, `tables`, `free`, `cached` and `retired`.
    pub pages: u64,
}

/// The first broken invariant, with where.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum AuditError {
    /// The VM refuses to answer.
    Refused(Error),
    /// An entry is wrong.
    Entry {
        /// Which invariant.
        invariant: &'static str,
        /// The guest frame.
        gfn: Gfn,
        /// The level.
        level: Level,
        /// The entry.
        raw: u64,
    },
    /// A leaf maps what the slot's backing does not name.
    Frame {
        /// The guest frame.
        gfn: Gfn,
        /// What is mapped.
        mapped: Pfn,
        /// What the backing says.
        backed: Pfn,
    },
    /// Two counts of one thing disagree.
    Count {
        /// Of what.
        what: &'static str,
        /// As counted by the audit.
        counted: u64,
        /// As the books have it.
        booked: u64,
    },
    /// A table is reached twice, or its record does not fit the place where it hangs.
    Table {
        /// Which invariant.
        invariant: &'static str,
        /// The page.
        at: Hpa,
    },
    /// Two slots overlap, or one is out of order or in an impossible state.
    Slot {
        /// Which invariant.
        invariant: &'static str,
        /// The slot.
        id: SlotId,
    },
}

impl fmt::Display for AuditError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(error) => write!(f, "{error}"),
            Self::Entry { invariant, gfn, level, raw } => {
                write!(f, "{invariant}: entry {raw:#x} for guest frame {gfn} at {level:?}")
            }
            Self::Frame { gfn, mapped, backed } => {
                write!(f, "T-inv 11: guest frame {gfn} maps {mapped}, its backing says {backed}")
            }
            Self::Count { what, counted, booked } => {
                write!(f, "{what}: counted {counted}, booked {booked}")
            }
            Self::Table { invariant, at } => write!(f, "{invariant}: table {at}"),
            Self::Slot { invariant, id } => write!(f, "{invariant}: {id}"),
        }
    }
}

impl core::error::Error for AuditError {}

impl<H: Host> Vm<H> {
    /// Checks every invariant of everything that exists, and reports the first that is broken.
    ///
    /// Asks backings, without waiting, whether what is mapped is theirs. Not to be called by a thread that holds
    /// an invalidation guard.
    pub fn audit(&self) -> Result<AuditReport, AuditError> {
        let inner = &*self.inner;
        inner.alive().map_err(AuditError::Refused)?;
        let own = self.own_line();
        let writer = inner.slots.write();
        let mut report = AuditReport { slots: slots(inner, &writer)?, ..AuditReport::default() };
        let exclusive = inner.tlb.lock.exclusive(&inner.tlb, own.line(), &inner.host);
        let mut audit = Audit {
            inner,
            writer: &writer,
            report: &mut report,
            seen: BTreeSet::new(),
            blocks: BTreeSet::new(),
            error: None,
        };
        inner.tables().count_free(|block| {
            audit.blocks.insert(block.raw());
        });
        inner.tdp.for_each_entry(inner.env(), &exclusive, |visit| audit.check(visit));
        if let Some(error) = audit.error.take() {
            return Err(error);
        }
        audit.roots()?;
        // Only Shared changes the gauges, and nobody holds it now.
        let stats = self.stats();
        drop(exclusive);
        counts(inner, &mut report, &stats)?;
        Ok(report)
    }
}

/// M-inv 1, 3, 5: sets are sorted and disjoint, generations belong to their spaces, nothing is changing while
/// the slots mutex is held by an audit.
fn slots<H: Host>(inner: &Inner<H>, writer: &SlotsWriter<'_>) -> Result<u64, AuditError> {
    let mut count = 0;
    for space in (0..inner.slots.spaces()).map(AddressSpace) {
        let set = writer.set(space);
        let mut end = Gfn::new(0);
        let mut ids = BTreeSet::new();
        for slot in set.iter() {
            let wrong = |invariant| Err(AuditError::Slot { invariant, id: slot.id });
            if slot.range.start() < end || slot.range.is_empty() {
                return wrong("M-inv 1: slots of a space are disjoint and in order");
            }
            if !ids.insert(slot.id) || slot.id.space() != space {
                return wrong("M-inv 1: a slot has one number in its space");
            }
            if slot.changing {
                return wrong("M-inv 5: no slot is changing outside a delete or move");
            }
            end = slot.range.end();
            count += 1;
        }
        if set.generation().in_progress() {
            return Err(AuditError::Count {
                what: "M-inv 2: generations in progress",
                counted: 1,
                booked: 0,
            });
        }
    }
    Ok(count)
}

/// T-inv 3 and 4: what was counted is what the books have.
fn counts<H: Host>(inner: &Inner<H>, report: &mut AuditReport, stats: &Stats) -> Result<(), AuditError> {
    let check = |what, counted, booked| {
        if counted == booked { Ok(()) } else { Err(AuditError::Count { what, counted, booked }) }
    };
    check("T-inv 3: tables below roots", report.tables, stats.table_pages)?;
    for (size, counted) in PageSize::ALL.into_iter().zip(report.leaves) {
        check("T-inv 4: leaves of a size", counted, stats.pages(size))?;
    }
    let mut blocks = 0;
    report.free = inner.tables().count_free(|_| blocks += 1);
    report.pages = blocks * BLOCK_TABLES;
    report.cached = stats.table_pages_cached;
    report.retired = inner.reclaim.waiting();
    if report.free > report.pages {
        return check("T-inv 22: free pages", report.free, report.pages);
    }
    Ok(())
}

/// The walk over all entries.
struct Audit<'a, H: Host> {
    inner: &'a Inner<H>,
    writer: &'a SlotsWriter<'a>,
    report: &'a mut AuditReport,
    seen: BTreeSet<u64>,
    /// Blocks of tables that the host handed out.
    blocks: BTreeSet<u64>,
    error: Option<AuditError>,
}

impl<H: Host> Audit<'_, H> {
    fn check(&mut self, visit: Visit) -> ControlFlow<()> {
        self.error = self.entry(visit).err();
        if self.error.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn entry(&mut self, visit: Visit) -> Result<(), AuditError> {
        let format = &self.inner.tdp.format;
        let wrong = |invariant| {
            let Visit { gfn, level, raw: Raw(raw), .. } = visit;
            Err(AuditError::Entry { invariant, gfn, level, raw })
        };
        if visit.entry.is_present() && format.reserved_bits(visit.raw, visit.level) != 0 {
            return wrong("T-inv 5: no reserved bit in a present entry");
        }
        match visit.entry {
            Entry::Empty => Ok(()),
            Entry::Frozen => wrong("T-inv 6 and 20: no frozen or stray entry while nobody holds Shared"),
            Entry::Link(table) => self.link(visit, table),
            Entry::Mmio(mmio) => {
                self.report.mmio += 1;
                if mmio.gfn != visit.gfn || visit.level != Level::L1 {
                    return wrong("T-inv 16: an MMIO entry names its own frame, at level 1");
                }
                let set = self.writer.set(visit.space);
                let current = mmio.generation == set.generation().for_mmio();
                if current && visit.root_is_valid && set.find(visit.gfn, &mut Hint::default()).is_some() {
                    return wrong("T-inv 16: a current MMIO entry covers no slot");
                }
                Ok(())
            }
            Entry::Leaf(leaf) => self.leaf(visit, leaf),
        }
    }

    fn link(&mut self, visit: Visit, table: Hpa) -> Result<(), AuditError> {
        let tables = self.inner.tables();
        // The record of a page may be read only where the page is one of the arena's.
        if !self.blocks.contains(&block_of(table).raw()) || !tables.owns(table) {
            return Err(AuditError::Table {
                invariant: "T-inv 2: a link leads to a table of this VM",
                at: table,
            });
        }
        if !self.seen.insert(table.raw()) {
            return Err(AuditError::Table { invariant: "T-inv 1: a table hangs from one link", at: table });
        }
        if tables.description(table) != (visit.gfn, visit.level.below()) {
            return Err(AuditError::Table {
                invariant: "T-inv 1: a table's record fits the place where it hangs",
                at: table,
            });
        }
        if self.inner.tdp.format.encode(Entry::Link(table), visit.level) != visit.raw {
            let Visit { gfn, level, raw: Raw(raw), .. } = visit;
            return Err(AuditError::Entry {
                invariant: "T-inv 24: links have full permissions",
                gfn,
                level,
                raw,
            });
        }
        self.report.tables += 1;
        Ok(())
    }

    fn leaf(&mut self, visit: Visit, leaf: Leaf) -> Result<(), AuditError> {
        let wrong = |invariant| {
            let Visit { gfn, level, raw: Raw(raw), .. } = visit;
            Err(AuditError::Entry { invariant, gfn, level, raw })
        };
        let Some(size) = PageSize::at(visit.level) else {
            return wrong("T6: no leaf above level 3");
        };
        self.report.leaves[usize::from(visit.level.number()) - 1] += 1;
        if !visit.root_is_valid {
            // Being zapped: its slot may be gone already.
            return Ok(());
        }
        if self.inner.tdp.format.encode(Entry::Leaf(leaf), visit.level) != visit.raw {
            return wrong("T-inv 7: one of the four legal combinations, and no stray bit");
        }
        let set = self.writer.set(visit.space);
        let Some(slot) = set.find(visit.gfn, &mut Hint::default()) else {
            return wrong("T-inv 11: a leaf lies inside a slot");
        };
        let block = GfnRange::block(visit.gfn, visit.level);
        if !slot.range.covers(block) {
            return wrong("T-inv 13: a leaf lies wholly inside its slot");
        }
        if !leaf.pfn.is_aligned(visit.level) {
            return wrong("T-inv 13: guest and host frames agree modulo the page");
        }
        if slot.is_read_only() && leaf.writable != Writable::No {
            return wrong("T-inv 12: no writable leaf in a read-only slot");
        }
        if self.inner.sequence.open() == 0 {
            Self::frames(visit, leaf, size, slot)?;
        }
        Ok(())
    }

    /// T-inv 11 to 13: the backing names the frames that are mapped: the first and the last, in debug builds every
    /// one of up to 2 MiB; it allows the size, and writes.
    fn frames(visit: Visit, leaf: Leaf, size: PageSize, slot: &Slot) -> Result<(), AuditError> {
        let wrong = |invariant| {
            let Visit { gfn, level, raw: Raw(raw), .. } = visit;
            Err(AuditError::Entry { invariant, gfn, level, raw })
        };
        let last = size.pages() - 1;
        let step = if cfg!(debug_assertions) && size < PageSize::Size1G { 1 } else { last.max(1) };
        // A backing need not say "writable" to who only reads (M80).
        let request = ResolveRequest::new(leaf.writable == Writable::Yes, false);
        let mut n = 0;
        while n <= last {
            let (gfn, mapped) = (visit.gfn.offset(n), leaf.pfn.offset(n));
            if let Ok(backed) = slot.backing.resolve(slot.page(gfn), request) {
                if backed.pfn != mapped {
                    return Err(AuditError::Frame { gfn, mapped, backed: backed.pfn });
                }
                if backed.max_size < size {
                    return wrong("T-inv 13: a leaf is no larger than its backing allows");
                }
                if leaf.writable == Writable::Yes && !backed.writable {
                    return wrong("T-inv 12: no writable leaf over a read-only backing");
                }
            }
            n += step;
        }
        Ok(())
    }

    /// T-inv 18 and 19: valid roots have distinct roles; processors are in live ones.
    fn roots(&mut self) -> Result<(), AuditError> {
        let list = self.inner.tdp.roots.all();
        self.report.roots = list.len() as u64;
        let mut spaces = Vec::new();
        for root in list.iter() {
            if self.seen.contains(&root.page.raw()) {
                return Err(AuditError::Table { invariant: "T-inv 1: a root hangs nowhere", at: root.page });
            }
            if root.is_valid() {
                if spaces.contains(&root.space) {
                    return Err(AuditError::Table {
                        invariant: "T-inv 18: valid roots have distinct roles",
                        at: root.page,
                    });
                }
                spaces.push(root.space);
            }
        }
        for line in self.inner.tlb.readers.iter() {
            // Between its announcement and its look at the root, a vCPU may name one that is gone; then it leaves.
            let gone = |root: Hpa| !list.iter().any(|known| known.page == root);
            let seen = line.announcement();
            let mut patience = 1_000_000;
            while line.announcement() == seen && seen.state() == State::InGuest && gone(line.root()) {
                patience -= 1;
                if patience == 0 {
                    return Err(AuditError::Table {
                        invariant: "T-inv 19: a vCPU in the guest is in a live root",
                        at: line.root(),
                    });
                }
                self.inner.host.relax();
            }
        }
        Ok(())
    }
}
