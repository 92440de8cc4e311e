//! The way of a fault: from the exit to the outcome (T71, with the order of PROTOCOLS 1 to 5).
//!
//! One pass announces walking and the slot section with one fence; walks; snapshots the invalidation sequence;
//! finds the slot; asks the backing for what it has at once; raises the announcement to Shared with a second
//! fence; rechecks root, range, sequence and slot generation; and maps by one compare-exchange. A backing that
//! must wait is asked again with nothing announced, and the pass repeats with its answer. Invariants: between
//! announcement and end nothing sleeps or allocates; nothing is mapped that was not rechecked under Shared; an answer
//! of a backing that maps nothing is rechecked in its section.

use super::Vcpu;
use crate::addr::{Gfn, GfnRange, Gpa, Level};
use crate::arch::entry::{Entry, Format, Mmio, Raw, Writable};
use crate::arch::fault::Fault;
use crate::coverage::{Point, hit};
use crate::error::{Error, ResolveError};
use crate::host::{Host, ResolveRequest, Resolved};
use crate::memory::invalidation::Snapshot;
use crate::memory::slot::Slot;
use crate::memory::slots::SlotGeneration;
use crate::mutants::Mutant::{
    ChangingIgnored, MmioEntryFirst, MmioHitInProgress, MmioStoredInProgress, NoRangeRecheck, NoRootRecheck,
    NoSlotRecheck, PageOnlyRecheck, RefusalNoRecheck, SnapshotAfterResolve,
};
use crate::mutants::mutant;
use crate::tdp::map::{Mapped, MmioMapped, Position, Wanted};
use crate::trace::Event;
use crate::vm::OwnLine;
use crate::vm::config::Optimizations;
use alloc::sync::Arc;

/// An access that memory did not answer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub struct MmioAccess {
    /// Where.
    pub gpa: Gpa,
    /// It writes.
    pub write: bool,
    /// It fetches an instruction.
    pub fetch: bool,
}

/// An access to memory that the backing could not supply (M104).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct MemoryFault {
    /// The page's address.
    pub gpa: Gpa,
    /// It was a write.
    pub write: bool,
    /// What the backing said.
    pub why: ResolveError,
}

/// What to do after a fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// Enter the guest again.
    Resume,
    /// No slot: a device's. Emulate the instruction, or answer as an empty bus does.
    Mmio(MmioAccess),
    /// A write to a read-only slot: emulate the instruction as a device would, memory stays as it is (M33).
    ReadOnlyWrite(MmioAccess),
    /// The backing has no memory for it: the host's to decide.
    MemoryFault(MemoryFault),
}

/// How one pass ended. Small, so that handing it on costs nothing.
enum Pass {
    /// Enter the guest again.
    Resume,
    /// No slot, or a frame out of reach.
    Mmio,
    /// A write to memory that is read-only.
    ReadOnly,
    /// The backing has nothing.
    Refused(ResolveError),
    /// The backing wants to wait: ask it with nothing announced.
    Wait(Question),
    /// A table is needed, and there is none.
    NoTable,
    /// A live entry has reserved bits.
    Reserved(Raw, Level),
    /// An invariant is broken; the bug is in the vCPU's place for one.
    Broken,
}

/// What a backing is asked with nothing announced; the slot value keeps it alive.
struct Question {
    slot: Arc<Slot>,
    basis: Basis,
}

/// What a backing answered.
type Answer = Result<Resolved, ResolveError>;

/// What an answer of a backing rests on.
#[derive(Clone, Copy)]
struct Basis {
    snapshot: Snapshot,
    generation: SlotGeneration,
}

impl<H: Host> Vcpu<H> {
    /// Handles a fault at the second stage that the vCPU's exit reported.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] and [`Error::MemoryLimit`] where no table can be had: the guest may be entered
    /// again once there is memory. [`Error::ReservedBits`] and [`Error::Dead`] betray a broken invariant.
    pub fn handle_fault(&mut self, fault: Fault) -> Result<Outcome, Error> {
        self.close_forgotten();
        let inner = self.own.inner();
        inner.alive()?;
        inner.host.trace(Event::Fault { gpa: fault.gpa(), access: fault.access() });
        if !self.cache.suffices() {
            // Most faults need no table; one that does, and finds none, says so.
            let _ = self.top_up();
        }
        match self.pass(fault, None, true) {
            Pass::Resume => Ok(Outcome::Resume),
            Pass::Mmio => Ok(Outcome::Mmio(mmio_access(fault))),
            other => self.finish(fault, other),
        }
    }

    /// The rest of a fault whose first pass did not end it: the backing is asked with nothing announced, as often
    /// as it takes.
    #[cold]
    fn finish(&mut self, fault: Fault, mut pass: Pass) -> Result<Outcome, Error> {
        loop {
            return match pass {
                Pass::Resume => Ok(Outcome::Resume),
                Pass::Mmio => Ok(Outcome::Mmio(mmio_access(fault))),
                Pass::ReadOnly => Ok(Outcome::ReadOnlyWrite(mmio_access(fault))),
                Pass::Refused(why) => refused(fault, why),
                Pass::Wait(Question { slot, basis }) => {
                    hit(Point::AskedToWait);
                    let request = ResolveRequest::new(fault.access().write, true);
                    match slot.backing.resolve(slot.page(fault.gpa().gfn()), request) {
                        // That there is no page is an answer like any other: it may be out of date (T71).
                        answer @ (Ok(_) | Err(ResolveError::Unbacked | ResolveError::Poisoned)) => {
                            pass = self.pass(fault, Some((answer, basis)), false);
                            continue;
                        }
                        Err(why) => refused(fault, why),
                    }
                }
                Pass::NoTable => {
                    hit(Point::NoTablePrepared);
                    if let Err(error) = self.top_up() {
                        hit(match error {
                            Error::MemoryLimit { .. } => Point::ErrorMemoryLimit,
                            _ => Point::ErrorOutOfMemory,
                        });
                        return Err(error);
                    }
                    pass = self.pass(fault, None, false);
                    continue;
                }
                Pass::Reserved(entry, level) => {
                    hit(Point::ErrorReservedBits);
                    Err(Error::ReservedBits { gpa: fault.gpa(), entry: entry.0, level })
                }
                Pass::Broken => Err(self.broken()),
            };
        }
    }

    #[cold]
    fn broken(&mut self) -> Error {
        hit(Point::ErrorDead);
        match self.bug.take() {
            Some(bug) => self.own.inner().bug(&bug),
            None => Error::Dead,
        }
    }

    /// One pass; with an answer from the backing, or to get one. The first counts the fault (T87).
    #[inline(always)]
    fn pass(&mut self, fault: Fault, answer: Option<(Answer, Basis)>, first: bool) -> Pass {
        let access = fault.access();
        let gfn = fault.gpa().gfn();
        let own = &self.own;
        let (inner, line) = (own.inner(), own.line());
        let (tdp, env, counters) = (&inner.tdp, inner.env(), &line.counters);
        if gfn > tdp.format.max_gfn() {
            // T5: no entry of any kind may be made for it.
            counters.pf_taken.add(u64::from(first));
            counters.pf_emulate.add(1);
            hit(Point::DeviceBeyond);
            return Pass::Mmio;
        }
        let (walking, section) = line.walk_with_slots(&inner.tlb);
        let root = match &self.root {
            Some(root) if root.is_valid() => root,
            _ => return retry_for(Point::RetryNoRoot, own, gfn),
        };
        let set = inner.slots.read(self.space, &section);
        // Before the entry is read, so that a hit is one of this set's (PROTOCOLS 5).
        let generation = set.generation();
        let at = tdp.walk(env, root, gfn, Level::L1, &walking);
        let generation = if mutant(MmioEntryFirst) {
            inner.slots.read(self.space, &section).generation()
        } else {
            generation
        };
        if at.raw != tdp.format.empty()
            && let Some(pass) = already_there(own, fault, at, generation, first)
        {
            return pass;
        }
        if fault.is_reserved() && at.raw == tdp.format.empty() {
            // T49: no entry has reserved bits any more: another processor zapped it.
            return retry_for(Point::RetryReserved, own, gfn);
        }
        if first {
            counters.pf_taken.add(1);
        }
        // Before slot and backing are looked at (M72).
        let snapshot = inner.sequence.snapshot();
        let Some(slot) = set.find(gfn, &mut self.hint) else {
            let cacheable = (!generation.in_progress() || mutant(MmioStoredInProgress))
                && tdp.format.caches_mmio()
                && inner.config.optimizations.contains(Optimizations::MMIO_ENTRIES);
            if cacheable {
                let shared = inner.tlb.lock.shared(&inner.tlb, line, &inner.host);
                let mmio = Mmio { gfn, write: access.write, generation: generation.for_mmio() };
                if !root.is_valid() {
                    return retry_for(Point::RetryDeviceRoot, own, gfn);
                }
                // A slot may be there by now (PROTOCOLS 5).
                if inner.slots.read(self.space, &section).generation() != generation {
                    return retry_for(Point::RetryDeviceSlots, own, gfn);
                }
                match tdp.map_mmio(env, &shared, at, mmio, &mut self.cache) {
                    MmioMapped::Created => {
                        hit(Point::DeviceMarked);
                        inner.host.trace(Event::MmioMark { gfn });
                    }
                    MmioMapped::NotCached => hit(Point::DeviceNoTable),
                    MmioMapped::Retry => return retry(own, gfn),
                }
            } else {
                hit(Point::DeviceUncached);
            }
            counters.pf_emulate.add(1);
            return Pass::Mmio;
        };
        if slot.changing && !mutant(ChangingIgnored) {
            // T73: never MMIO, so that its translations are gone before anything else can appear.
            return retry_for(Point::RetryChanging, own, gfn);
        }
        if access.write && slot.is_read_only() {
            hit(Point::ReadOnlySlot);
            counters.pf_emulate.add(1);
            return Pass::ReadOnly;
        }
        // Whether an answer that maps nothing still stands: range, sequence, slots, in this order (PROTOCOLS 4).
        let stands = |basis: Basis| {
            inner.sequence.is_current(GfnRange::block(gfn, Level::L1), basis.snapshot)
                && inner.slots.read(self.space, &section).generation() == basis.generation
                || mutant(RefusalNoRecheck)
        };
        let (resolved, basis) = match answer {
            // An answer for another set is stale; one from before an end is refused by the recheck below.
            Some((Ok(resolved), basis)) if basis.generation == generation => (resolved, basis),
            Some((Err(why), basis)) if basis.generation == generation => {
                return if stands(basis) {
                    Pass::Refused(why)
                } else {
                    retry_for(Point::RetryRefusalWaited, own, gfn)
                };
            }
            other => {
                if other.is_some() {
                    hit(Point::AnswerOutdated);
                }
                let basis = Basis { snapshot, generation };
                let resolved = if inner.config.optimizations.contains(Optimizations::RESOLVE_AT_ONCE) {
                    slot.backing.resolve(slot.page(gfn), ResolveRequest::new(access.write, false))
                } else {
                    Err(ResolveError::WouldWait)
                };
                let basis = if mutant(SnapshotAfterResolve) {
                    Basis { snapshot: inner.sequence.snapshot(), generation }
                } else {
                    basis
                };
                match resolved {
                    Ok(resolved) => (resolved, basis),
                    Err(ResolveError::WouldWait) => {
                        return Pass::Wait(Question { slot: slot.clone(), basis });
                    }
                    Err(why @ (ResolveError::OutOfMemory | ResolveError::Interrupted)) => {
                        return Pass::Refused(why);
                    }
                    Err(why) => {
                        return if stands(basis) {
                            Pass::Refused(why)
                        } else {
                            retry_for(Point::RetryRefusalAtOnce, own, gfn)
                        };
                    }
                }
            }
        };
        let writable = resolved.writable && !slot.is_read_only();
        if access.write && !writable {
            if !stands(basis) {
                return retry_for(Point::RetryReadOnly, own, gfn);
            }
            hit(Point::ReadOnlyBacking);
            counters.pf_emulate.add(1);
            return Pass::ReadOnly;
        }
        let limit = if inner.config.optimizations.contains(Optimizations::LARGE_PAGES) {
            tdp.format.max_leaf_level()
        } else {
            Level::L1
        };
        let level = slot.leaf_level(gfn, resolved.pfn, resolved.max_size, limit);
        let shared = inner.tlb.lock.shared(&inner.tlb, line, &inner.host);
        // Count and range, sequence, slots, in this order (PROTOCOLS 4).
        let clear = if mutant(PageOnlyRecheck) || mutant(NoRangeRecheck) {
            Some(level)
        } else {
            inner.sequence.clear_level(gfn, level)
        };
        let Some(clear) = clear else { return retry_for(Point::RetryRangeOpen, own, gfn) };
        if clear < level {
            hit(Point::BesideRange);
        }
        let level = clear;
        let rechecked = GfnRange::block(gfn, if mutant(PageOnlyRecheck) { Level::L1 } else { level });
        if !(root.is_valid() || mutant(NoRootRecheck)) {
            return retry_for(Point::RetryRoot, own, gfn);
        }
        if !inner.sequence.is_current(rechecked, basis.snapshot) {
            return retry_for(Point::RetrySequence, own, gfn);
        }
        if inner.slots.read(self.space, &section).generation() != basis.generation && !mutant(NoSlotRecheck) {
            return retry_for(Point::RetrySlots, own, gfn);
        }
        let writable = if writable { Writable::Yes } else { Writable::No };
        let want = Wanted { gfn, pfn: resolved.pfn, level, writable, access };
        let size = match tdp.map(env, &shared, root, at, want, &mut self.cache) {
            Mapped::Fixed(size) => size,
            Mapped::Spurious => {
                hit(Point::SpuriousUnderShared);
                counters.pf_spurious.add(1);
                return Pass::Resume;
            }
            Mapped::Retry => return retry(own, gfn),
            Mapped::NoTable => return Pass::NoTable,
            Mapped::Collapsed(size, removed) => {
                inner.settle_removed(line, removed);
                size
            }
            Mapped::Broken(bug) => {
                self.bug = Some(bug);
                return Pass::Broken;
            }
        };
        hit(Point::LeafMapped);
        inner.host.trace(Event::LeafSet {
            gfn: gfn.align_down(level),
            pfn: resolved.pfn.align_down(level),
            size,
        });
        Pass::Resume
    }
}

/// What an entry that is not empty answers by itself: the access is allowed, the entry is somebody's, or it says
/// that no slot is there.
#[inline(always)]
fn already_there<H: Host>(
    own: &OwnLine<H>,
    fault: Fault,
    at: Position<'_>,
    generation: SlotGeneration,
    first: bool,
) -> Option<Pass> {
    let (inner, counters) = (own.inner(), &own.line().counters);
    let format = &inner.tdp.format;
    match format.decode(at.raw, at.level) {
        Entry::Leaf(leaf) if leaf.allows(fault.access()) => {
            if fault.is_reserved() && format.reserved_bits(at.raw, at.level) != 0 {
                return Some(Pass::Reserved(at.raw, at.level));
            }
            counters.pf_taken.add(u64::from(first));
            counters.pf_spurious.add(1);
            hit(Point::SpuriousAtWalk);
            Some(Pass::Resume)
        }
        Entry::Frozen => Some(retry_for(Point::RetryFrozen, own, fault.gpa().gfn())),
        Entry::Mmio(mmio)
            if (!generation.in_progress() || mutant(MmioHitInProgress))
                && mmio.generation == generation.for_mmio() =>
        {
            counters.pf_mmio_hit.add(1);
            hit(Point::DeviceHit);
            inner.host.trace(Event::MmioHit { gfn: mmio.gfn });
            Some(Pass::Mmio)
        }
        Entry::Mmio(_) => {
            hit(Point::DeviceOutdated);
            None
        }
        Entry::Leaf(_) => {
            hit(Point::LeafUpgraded);
            None
        }
        Entry::Empty | Entry::Link(_) => None,
    }
}

/// The backing has no page.
fn refused(fault: Fault, why: ResolveError) -> Result<Outcome, Error> {
    let gfn = fault.gpa().gfn();
    match why {
        ResolveError::OutOfMemory | ResolveError::Interrupted => {
            hit(match why {
                ResolveError::Interrupted => Point::ErrorBackingInterrupted,
                _ => Point::ErrorBackingMemory,
            });
            Err(Error::Backing { gfn, why })
        }
        // A backing that would wait although it may: it is asked again by the next fault.
        ResolveError::WouldWait => {
            hit(Point::WaitsStill);
            Ok(Outcome::Resume)
        }
        ResolveError::Unbacked | ResolveError::Poisoned => {
            hit(match why {
                ResolveError::Poisoned => Point::FaultPoisoned,
                _ => Point::FaultUnbacked,
            });
            let write = fault.access().write;
            Ok(Outcome::MemoryFault(MemoryFault { gpa: gfn.gpa(), write, why }))
        }
    }
}

/// The guest tries again, for a reason that is counted.
#[inline(always)]
fn retry_for<H: Host>(cause: Point, own: &OwnLine<H>, gfn: Gfn) -> Pass {
    hit(cause);
    retry(own, gfn)
}

/// The guest tries again.
#[inline(never)]
fn retry<H: Host>(own: &OwnLine<H>, gfn: Gfn) -> Pass {
    own.line().counters.pf_retry.add(1);
    own.inner().host.trace(Event::Retry { gfn });
    Pass::Resume
}

fn mmio_access(fault: Fault) -> MmioAccess {
    let access = fault.access();
    MmioAccess { gpa: fault.gpa(), write: access.write, fetch: access.fetch }
}
