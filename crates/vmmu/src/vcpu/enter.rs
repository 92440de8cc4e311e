//! Entering and leaving the guest: what to load, what to flush, and the line that shootdowns look at
//! (PROTOCOLS 3, T161).
//!
//! Invariants: everything that locks or allocates happens in `prepare`, while *out*; between *in guest* and
//! *out* nothing does. An entry that is dropped did not run and flushed nothing; one that is forgotten is
//! taken to have run, with nothing known of it.

use super::Vcpu;
use crate::addr::Hpa;
use crate::coverage::{Point, hit};
use crate::error::Error;
use crate::host::Host;
use crate::mutants::Mutant::{
    DropRecorded, ForgottenClean, GenerationBeforeAnnounce, NoFenceGuest, NoRequestLook, NoRootLook,
    NoteAtEnter, NoteIsNow,
};
use crate::mutants::mutant;
use crate::sync::{full_fence, order};
use crate::tlb::tag::{Choice, EntryFlush, Identity, PhysCpu};
use core::fmt;

/// Something came up between preparation and entry: prepare again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Again;

impl fmt::Display for Again {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a request came in before the entry; prepare the vCPU again")
    }
}

impl core::error::Error for Again {}

/// An entry into the guest: load what it says, run the guest, and call [`Entry::ran`] first thing after the
/// exit, on the same processor, before any lock, interrupt or schedule. Dropped instead, it did not run.
#[must_use = "an entry that is dropped did not run"]
pub struct Entry<'a, H: Host> {
    vcpu: &'a mut Vcpu<H>,
    cpu: &'a mut PhysCpu,
    choice: Choice,
    generation: u64,
    root: Hpa,
    identity: Identity,
}

impl<H: Host> Vcpu<H> {
    /// Gets the vCPU ready to enter: serves requests and makes sure of a root. May lock, allocate and wait, so
    /// call it with interrupts on and nothing held.
    pub fn prepare(&mut self) -> Result<(), Error> {
        self.close_forgotten();
        self.own.inner().alive()?;
        // Cleared before anything is served (PROTOCOLS 3). Both requests are served by what follows: obsolete
        // roots are replaced, and the exit has happened.
        if self.own.line().take_requests() != 0 {
            hit(Point::CameOut);
        }
        self.ensure_root()
    }

    /// Enters, on the processor of `cpu`, with interrupts off from before this call until the guest runs.
    ///
    /// # Errors
    /// [`Again`] where something came up since the last [`Vcpu::prepare`].
    #[inline(always)]
    pub fn enter<'a>(&'a mut self, cpu: &'a mut PhysCpu) -> Result<Entry<'a, H>, Again> {
        self.close_forgotten();
        let inner = self.own.inner();
        let line = self.own.line();
        let Some(root) = &self.root else {
            hit(Point::AgainNoRoot);
            return Err(Again);
        };
        let early = if mutant(GenerationBeforeAnnounce) { inner.tlb.generation.now() } else { 0 };
        line.announce_guest(root.page);
        if !mutant(NoFenceGuest) {
            full_fence();
        }
        let generation = if mutant(GenerationBeforeAnnounce) { early } else { inner.tlb.generation.now() };
        let requested = line.publish_guest(generation) && !mutant(NoRequestLook);
        if requested || !(root.is_valid() || mutant(NoRootLook)) {
            line.leave_guest();
            hit(if requested { Point::AgainRequested } else { Point::AgainRootDied });
            return Err(Again);
        }
        let (root, identity) = (root.page, root.identity);
        let choice = cpu.choose(identity, self.note, generation);
        if mutant(NoteAtEnter) {
            self.note = Some(cpu.note(identity, choice, generation));
        }
        self.entered = true;
        order::entered(&self.mark);
        Ok(Entry { vcpu: self, cpu, choice, generation, root, identity })
    }

    /// Closes an entry that was forgotten: it may have run, under a tag of which nothing is known now.
    #[inline(always)]
    pub(super) fn close_forgotten(&mut self) {
        if self.entered {
            self.entered = false;
            hit(Point::EntryForgotten);
            order::left(&self.mark);
            if !mutant(ForgottenClean) {
                self.note = None;
            }
            self.own.line().leave_guest();
        }
    }
}

impl<H: Host> Entry<'_, H> {
    /// The root table: the nested page table base to load.
    #[inline(always)]
    pub fn root(&self) -> Hpa {
        self.root
    }
    /// The tag (ASID or VPID) to load.
    #[inline(always)]
    pub fn tag(&self) -> u32 {
        self.choice.tag
    }
    /// What to flush by tag with the entry.
    #[inline(always)]
    pub fn flush(&self) -> EntryFlush {
        self.choice.flush
    }
    /// Whether the root's guest-physical mappings are to be flushed before the entry (single-context INVEPT).
    /// Never where tags cover them.
    #[inline(always)]
    pub fn flush_guest_physical(&self) -> bool {
        self.choice.guest_physical
    }
    /// The guest ran, with what the entry said, and has exited.
    #[inline(always)]
    pub fn ran(self) {
        let counters = &self.vcpu.own.line().counters;
        if self.choice.flush != EntryFlush::None {
            counters.tlb_flush.add(1);
        } else if self.choice.fresh {
            counters.tlb_fresh_tag.add(1);
        }
        hit(Point::EntryRan);
        hit(match (self.choice.flush, self.choice.fresh) {
            (EntryFlush::None, false) => Point::FlushNothing,
            (EntryFlush::None, true) => Point::FlushFreshTag,
            (EntryFlush::Tag, _) => Point::FlushTag,
            (EntryFlush::All, _) => Point::FlushAll,
        });
        #[cfg(feature = "instrument")]
        {
            // Told apart from an entry that is dropped.
            self.vcpu.entered = false;
        }
        let generation =
            if mutant(NoteIsNow) { self.vcpu.own.inner().tlb.generation.now() } else { self.generation };
        self.vcpu.note = Some(self.cpu.ran(self.identity, self.choice, generation));
        // Dropping it takes the line out of the guest.
    }
}

impl<H: Host> Drop for Entry<'_, H> {
    #[inline(always)]
    fn drop(&mut self) {
        if mutant(DropRecorded) {
            self.vcpu.note = Some(self.cpu.ran(self.identity, self.choice, self.generation));
        }
        if self.vcpu.entered {
            hit(Point::EntryDropped);
        }
        self.vcpu.entered = false;
        order::left(&self.vcpu.mark);
        self.vcpu.own.line().leave_guest();
    }
}

impl<H: Host> fmt::Debug for Entry<'_, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("root", &self.root)
            .field("choice", &self.choice)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}
