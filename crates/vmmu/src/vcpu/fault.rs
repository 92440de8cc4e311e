//! The way of a fault: from the exit to the outcome (T71, with the order of PROTOCOLS 1 to 5).
//!
//! One pass announces walking and the slot section with one fence; walks; snapshots the invalidation sequence;
//! finds the slot; asks the backing for what it has at once; raises the announcement to Shared with a second
//! fence; rechecks root, range, sequence and slot generation; and maps by one compare-exchange. A backing that
//! must wait is asked again with nothing announced, and the pass repeats with its answer. Invariants: between
//! announcement and end nothing sleeps or allocates; no answer is used that was not rechecked under Shared.

use super::Vcpu;
use crate::addr::{Gfn, Gpa, Level};
use crate::arch::entry::{Entry, Format, Mmio, Writable};
use crate::arch::fault::Fault;
use crate::error::{Bug, Error};
use crate::host::{Host, ResolveError, ResolveRequest, Resolved};
use crate::memory::invalidation::Snapshot;
use crate::memory::slot::Slot;
use crate::memory::slots::SlotGeneration;
use crate::tdp::map::{Mapped, Wanted};
use crate::trace::Event;
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

/// How one pass ended.
enum Pass {
    Done(Outcome),
    /// The backing wants to wait: ask it with nothing announced.
    Wait(Question),
    /// An invariant is broken.
    Broken(Bug),
}

/// What a backing is asked with nothing announced; the slot value keeps it alive.
struct Question {
    slot: Arc<Slot>,
    snapshot: Snapshot,
    generation: SlotGeneration,
}

/// A backing's answer, with what it was based on.
#[derive(Clone, Copy)]
struct Answer {
    resolved: Resolved,
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
        let gfn = fault.gpa().gfn();
        if gfn > inner.tdp.format.max_gfn() {
            // T5: no entry of any kind may be made for it.
            let counters = &self.own.line().counters;
            counters.pf_taken.add(1);
            counters.pf_emulate.add(1);
            return Ok(Outcome::Mmio(mmio_access(fault)));
        }
        if !self.cache.suffices() {
            self.top_up()?;
        }
        let mut answer = None;
        loop {
            match self.pass(fault, gfn, answer)? {
                Pass::Done(outcome) => return Ok(outcome),
                Pass::Broken(bug) => return Err(self.own.inner().bug(&bug)),
                Pass::Wait(question) => {
                    let request = ResolveRequest::new(fault.access().write, true);
                    match question.slot.backing.resolve(question.slot.page(gfn), request) {
                        Ok(resolved) => {
                            let Question { snapshot, generation, .. } = question;
                            answer = Some(Answer { resolved, snapshot, generation });
                        }
                        Err(why) => return refused(fault, why),
                    }
                }
            }
        }
    }

    /// One pass; with an answer from the backing, or to get one.
    #[inline]
    fn pass(&mut self, fault: Fault, gfn: Gfn, answer: Option<Answer>) -> Result<Pass, Error> {
        let access = fault.access();
        let own = &self.own;
        let (inner, line) = (own.inner(), own.line());
        let (tdp, env, counters) = (&inner.tdp, inner.env(), &line.counters);
        let optimizations = inner.config.optimizations;
        let (walking, section) = line.walk_with_slots(&inner.tlb);
        let root = match &self.root {
            Some(root) if root.is_valid() => root,
            _ => return Ok(retry(own, gfn)),
        };
        let set = inner.slots.read(self.space, &section);
        // Before the entry is read, so that a hit is one of this set's (PROTOCOLS 5).
        let generation = set.generation();
        let at = tdp.walk(env, root, gfn, Level::L1, &walking);
        match at.entry {
            Entry::Leaf(leaf) if leaf.allows(access) => {
                let reserved = tdp.format.reserved_bits(at.raw, at.level);
                if fault.is_reserved() && reserved != 0 {
                    return Err(Error::ReservedBits { gpa: fault.gpa(), entry: at.raw.0, level: at.level });
                }
                counters.pf_taken.add(1);
                counters.pf_spurious.add(1);
                return Ok(Pass::Done(Outcome::Resume));
            }
            Entry::Frozen => return Ok(retry(own, gfn)),
            Entry::Mmio(mmio) if !generation.in_progress() && mmio.generation == generation.for_mmio() => {
                counters.pf_mmio_hit.add(1);
                inner.host.trace(Event::MmioHit { gfn });
                return Ok(Pass::Done(Outcome::Mmio(mmio_access(fault))));
            }
            // T49: a reserved-bit fault for an entry that has none any more: another processor zapped it.
            Entry::Empty if fault.is_reserved() => return Ok(retry(own, gfn)),
            _ => {}
        }
        counters.pf_taken.add(1);
        // Before slot and backing are looked at (M72).
        let snapshot = inner.sequence.snapshot();
        let Some(slot) = set.find(gfn, &mut self.hint) else {
            counters.pf_emulate.add(1);
            let cacheable = !generation.in_progress()
                && tdp.format.caches_mmio()
                && optimizations.contains(Optimizations::MMIO_ENTRIES);
            if cacheable {
                let shared = inner.tlb.lock.shared(&inner.tlb, line, &inner.host);
                if root.is_valid() && inner.slots.read(self.space, &section).generation() == generation {
                    let mmio = Mmio { gfn, write: access.write, generation: generation.for_mmio() };
                    if tdp.map_mmio(env, &shared, at, mmio, &mut self.cache) {
                        inner.host.trace(Event::MmioMark { gfn });
                    }
                }
            }
            return Ok(Pass::Done(Outcome::Mmio(mmio_access(fault))));
        };
        if slot.changing {
            // T73: never MMIO, so that its translations are gone before anything else can appear.
            return Ok(retry(own, gfn));
        }
        if access.write && slot.is_read_only() {
            counters.pf_emulate.add(1);
            return Ok(Pass::Done(Outcome::ReadOnlyWrite(mmio_access(fault))));
        }
        let answer = match answer {
            // An answer for another set or from before an end: the recheck below would refuse it.
            Some(answer) if answer.generation == generation => answer,
            _ => {
                let at_once = optimizations.contains(Optimizations::RESOLVE_AT_ONCE);
                let resolved = if at_once {
                    slot.backing.resolve(slot.page(gfn), ResolveRequest::new(access.write, false))
                } else {
                    Err(ResolveError::WouldWait)
                };
                match resolved {
                    Ok(resolved) => Answer { resolved, snapshot, generation },
                    Err(ResolveError::WouldWait) => {
                        return Ok(Pass::Wait(Question { slot: slot.clone(), snapshot, generation }));
                    }
                    Err(why) => return refused(fault, why).map(Pass::Done),
                }
            }
        };
        let resolved = answer.resolved;
        let writable = resolved.writable && !slot.is_read_only();
        if access.write && !writable {
            counters.pf_emulate.add(1);
            return Ok(Pass::Done(Outcome::ReadOnlyWrite(mmio_access(fault))));
        }
        let limit = if optimizations.contains(Optimizations::LARGE_PAGES) {
            tdp.format.max_leaf_level()
        } else {
            Level::L1
        };
        let level = slot.leaf_level(gfn, resolved.pfn, resolved.max_size, limit);
        let shared = inner.tlb.lock.shared(&inner.tlb, line, &inner.host);
        let current = root.is_valid()
            && inner.sequence.is_current(gfn, answer.snapshot)
            && inner.slots.read(self.space, &section).generation() == answer.generation;
        if !current {
            drop(shared);
            return Ok(retry(own, gfn));
        }
        let want = Wanted {
            gfn,
            pfn: resolved.pfn,
            level,
            writable: if writable { Writable::Yes } else { Writable::No },
            access,
        };
        match tdp.map(env, &shared, root, at, want, &mut self.cache) {
            Ok((mapped, removed)) => {
                if !removed.is_empty() {
                    inner.settle_removed(line, removed);
                }
                match mapped {
                    Mapped::Fixed(size) => {
                        counters.pf_fixed.add(1);
                        let (gfn, pfn) = (gfn.align_down(level), resolved.pfn.align_down(level));
                        inner.host.trace(Event::LeafSet { gfn, pfn, size });
                    }
                    Mapped::Spurious => counters.pf_spurious.add(1),
                    Mapped::Retry => counters.pf_retry.add(1),
                }
                Ok(Pass::Done(Outcome::Resume))
            }
            Err(bug) => Ok(Pass::Broken(bug)),
        }
    }
}

/// The backing has no page.
fn refused(fault: Fault, why: ResolveError) -> Result<Outcome, Error> {
    let gfn = fault.gpa().gfn();
    match why {
        ResolveError::OutOfMemory | ResolveError::Interrupted => Err(Error::Backing { gfn, why }),
        // A backing that would wait although it may: it is asked again by the next fault.
        ResolveError::WouldWait => Ok(Outcome::Resume),
        ResolveError::Unbacked | ResolveError::Poisoned => {
            let write = fault.access().write;
            Ok(Outcome::MemoryFault(MemoryFault { gpa: gfn.gpa(), write, why }))
        }
    }
}

/// The guest tries again.
#[inline(never)]
fn retry<H: Host>(own: &crate::vm::OwnLine<H>, gfn: Gfn) -> Pass {
    own.line().counters.pf_retry.add(1);
    own.inner().host.trace(Event::Retry { gfn });
    Pass::Done(Outcome::Resume)
}

fn mmio_access(fault: Fault) -> MmioAccess {
    let access = fault.access();
    MmioAccess { gpa: fault.gpa(), write: access.write, fetch: access.fetch }
}
