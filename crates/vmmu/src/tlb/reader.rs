//! The reader's line: one cache line in which a vCPU, or another thread, says what it may still be using
//! (PROTOCOLS 1), and the slab that holds the lines.
//!
//! The first word packs a state and the generation since when: *out* < *walking* < *mapping* (holds Shared),
//! or *in guest*. The second is the slot section, the third the root entered or about to be, the fourth the
//! requests that wait for the vCPU. Only the owner writes the first three. Sections are guards that nest by
//! raising the state; the generation stays the oldest. Invariants: a line is published before its first
//! announcement and given back *out*; lines are never freed before the VM, so scans need no lock.

use super::Tlb;
use super::generation::Generation;
use crate::addr::Hpa;
use crate::mutants::Mutant::{
    NestEndOut, NestNewGeneration, NewerBefore, NoFenceWalk, RelaxedAnnouncement, RelaxedEnd, RelaxedScan,
};
use crate::mutants::mutant;
use crate::names::VcpuId;
use crate::stats::Counters;
use crate::sync::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering, full_fence, places};
use Ordering::{AcqRel, Acquire, Relaxed, Release};
use alloc::boxed::Box;
use core::fmt;
use core::marker::PhantomData;
use core::ptr;

/// What a line says its owner is doing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum State {
    /// Using nothing.
    Out = 0,
    /// Reading tables without a lock.
    Walking = 1,
    /// Holding Shared.
    Mapping = 2,
    /// The processor may use any translation that was valid since the generation.
    InGuest = 3,
}

/// The first word of a line: a state and the generation since when.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Announcement(u64);

impl Announcement {
    pub(crate) const OUT: Self = Self(0);

    fn new(state: State, since: u64) -> Self {
        Self(since << 2 | state as u64)
    }
    pub(crate) fn state(self) -> State {
        match self.0 & 3 {
            0 => State::Out,
            1 => State::Walking,
            2 => State::Mapping,
            _ => State::InGuest,
        }
    }
    pub(crate) fn since(self) -> u64 {
        self.0 >> 2
    }
    /// Whether the owner may still use something that was removed before `generation` (PROTOCOLS 1: "newer"
    /// is at least the value after the advance).
    pub(crate) fn is_older_than(self, generation: u64) -> bool {
        let generation = if mutant(NewerBefore) { generation - 1 } else { generation };
        self.state() != State::Out && self.since() < generation
    }
}

impl fmt::Debug for Announcement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} since {}", self.state(), self.since())
    }
}

/// No vCPU: the line belongs to a thread that only reads.
const NO_VCPU: u32 = u32::MAX;

/// One reader's line, with its owner's counters behind it.
#[repr(C, align(64))]
pub(crate) struct Line {
    state: AtomicU64,
    slots: AtomicU64,
    root: AtomicU64,
    requests: AtomicU64,
    owner: AtomicU32,
    taken: AtomicBool,
    pub(crate) counters: Counters,
}

/// A request to a vCPU, served before its next entry (T161).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub(crate) enum Request {
    /// Drop roots that have become invalid (T102).
    FreeObsoleteRoots = 1,
    /// Leave the guest and look around.
    Exit = 2,
}

impl Line {
    fn new() -> Self {
        Self {
            state: AtomicU64::new(0),
            slots: AtomicU64::new(0),
            root: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            owner: AtomicU32::new(NO_VCPU),
            taken: AtomicBool::new(false),
            counters: Counters::new(),
        }
    }

    /// A line outside every slab: for the end of a VM, when only the counters are of use.
    pub(crate) fn detached() -> Self {
        Self::new()
    }

    /// Gives the line back to its slab, *out*.
    pub(crate) fn give_back(&self) {
        assert!(self.is_out(), "a line was given back announced: {self:?}");
        self.owner.store(NO_VCPU, Relaxed);
        self.taken.store(false, Release);
    }

    /// The announcement, as a scan reads it.
    #[inline]
    pub(crate) fn announcement(&self) -> Announcement {
        Announcement(self.state.load(if mutant(RelaxedScan) { Relaxed } else { Acquire }))
    }

    /// The announcement, as its owner reads it.
    #[inline]
    fn own(&self) -> Announcement {
        Announcement(self.state.load(Relaxed))
    }

    /// Whether the owner uses nothing, as the owner itself sees it.
    pub(crate) fn is_out(&self) -> bool {
        self.own() == Announcement::OUT
    }

    pub(crate) fn vcpu(&self) -> Option<VcpuId> {
        match self.owner.load(Relaxed) {
            NO_VCPU => None,
            n => Some(VcpuId::new(n)),
        }
    }

    pub(crate) fn slot_section_older_than(&self, epoch: u64) -> bool {
        let since = self.slots.load(Acquire);
        since != 0 && since < epoch
    }

    /// The root that the owner is in, or about to enter.
    pub(crate) fn root(&self) -> Hpa {
        Hpa::new(self.root.load(Acquire))
    }

    /// Posts a request. The caller must fence, read the line, and kick a vCPU that is in the guest.
    pub(crate) fn post(&self, request: Request) {
        self.requests.fetch_or(request as u64, Release);
    }

    /// Takes every request; the word is cleared before anything is served (PROTOCOLS 3).
    pub(crate) fn take_requests(&self) -> u64 {
        if self.requests.load(Relaxed) == 0 { 0 } else { self.requests.swap(0, AcqRel) }
    }

    /// Announces a walking section, or joins the one that is open. The section lends its token to whatever it
    /// covers.
    #[inline]
    pub(crate) fn walk<'t>(&'t self, tlb: &'t Tlb) -> Walking<'t> {
        let before = self.raise(State::Walking, &tlb.generation);
        if before == Announcement::OUT && !mutant(NoFenceWalk) {
            full_fence();
        }
        Walking { line: self, before, _not_send: PhantomData }
    }

    /// Announces walking and the slot section with one fence.
    #[inline]
    pub(crate) fn walk_with_slots<'t>(&'t self, tlb: &'t Tlb) -> (Walking<'t>, SlotSection<'t>) {
        let before = self.raise(State::Walking, &tlb.generation);
        debug_assert_eq!(self.slots.load(Relaxed), 0, "slot sections do not nest");
        self.slots.store(tlb.slot_epoch.now(), Release);
        if !mutant(NoFenceWalk) {
            full_fence();
        }
        (
            Walking { line: self, before, _not_send: PhantomData },
            SlotSection { line: self, _not_send: PhantomData },
        )
    }

    /// Raises the state to `state` where it is lower, keeping the oldest generation; returns what it was.
    /// Where it changed, the caller must fence before its first load.
    #[inline]
    pub(super) fn raise(&self, state: State, generation: &Generation) -> Announcement {
        let before = self.own();
        debug_assert_ne!(before.state(), State::InGuest, "a section announced from the guest");
        if before.state() < state {
            // A section may load the generation before it announces: older is safe.
            let renew = before == Announcement::OUT || mutant(NestNewGeneration);
            let since = if renew { generation.now() } else { before.since() };
            // Release: the end of the section before was one, and a scan that reads this announcement instead of
            // that end must see what was done before it all the same.
            let order = if mutant(RelaxedAnnouncement) { Relaxed } else { Release };
            self.state.store(Announcement::new(state, since).0, order);
        }
        before
    }

    #[inline]
    pub(super) fn restore(&self, before: Announcement) {
        let before = if mutant(NestEndOut) { Announcement::OUT } else { before };
        self.state.store(before.0, if mutant(RelaxedEnd) { Relaxed } else { Release });
    }

    /// Announces the guest, before the generation is known. The caller must fence, then publish.
    #[inline]
    pub(crate) fn announce_guest(&self, root: Hpa) {
        self.root.store(root.raw(), Relaxed);
        self.state.store(Announcement::new(State::InGuest, 0).0, Release);
    }

    /// Publishes since when the owner is in the guest, and says whether a request waits.
    #[inline]
    pub(crate) fn publish_guest(&self, since: u64) -> bool {
        self.state.store(Announcement::new(State::InGuest, since).0, Release);
        self.requests.load(Acquire) != 0
    }

    /// The owner has left the guest, or will not enter it.
    #[inline]
    pub(crate) fn leave_guest(&self) {
        self.state.store(Announcement::OUT.0, Release);
    }
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line")
            .field("state", &self.announcement())
            .field("slots", &self.slots.load(Relaxed))
            .field("vcpu", &self.vcpu())
            .finish_non_exhaustive()
    }
}

/// A walking section: table pages that it can reach are not reused while it lasts.
#[must_use]
#[derive(Debug)]
pub(crate) struct Walking<'t> {
    line: &'t Line,
    before: Announcement,
    _not_send: PhantomData<*const ()>,
}

impl Drop for Walking<'_> {
    #[inline]
    fn drop(&mut self) {
        self.line.restore(self.before);
    }
}

/// A slot section: the slot set that it reads is not freed, and no operation that replaces slots gets past
/// its wait, while it lasts.
#[must_use]
#[derive(Debug)]
pub(crate) struct SlotSection<'t> {
    line: &'t Line,
    _not_send: PhantomData<*const ()>,
}

impl Drop for SlotSection<'_> {
    #[inline]
    fn drop(&mut self) {
        self.line.slots.store(0, Release);
    }
}

/// Lines in one piece of the slab.
const CHUNK_LINES: usize = places(16, 4);

struct Chunk {
    lines: [Line; CHUNK_LINES],
    next: AtomicPtr<Chunk>,
}

/// The slab of lines: grows, is never moved, and is freed with the VM.
pub(crate) struct Readers {
    first: AtomicPtr<Chunk>,
}

impl Readers {
    pub(crate) fn new() -> Self {
        Self { first: AtomicPtr::new(ptr::null_mut()) }
    }

    /// Every line that was ever given out, whoever has it now. Needs no lock; sees every line that was
    /// published before the caller's last fence.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Line> {
        let mut chunk = self.first.load(Acquire);
        core::iter::from_fn(move || {
            // SAFETY: chunks are leaked boxes, linked with release and freed only in `Drop`, which has the
            // slab to itself; the reference lives no longer than `self`.
            let current = unsafe { chunk.as_ref() }?;
            chunk = current.next.load(Acquire);
            Some(current.lines.iter())
        })
        .flatten()
    }

    /// A line for a vCPU (by number) or a thread. It is published: scans see it from now on.
    pub(crate) fn take(&self, vcpu: Option<VcpuId>) -> &Line {
        loop {
            let free = |line: &&Line| !line.taken.load(Relaxed) && !line.taken.swap(true, AcqRel);
            if let Some(line) = self.iter().find(free) {
                line.owner.store(vcpu.map_or(NO_VCPU, VcpuId::number), Relaxed);
                line.requests.store(0, Relaxed);
                return line;
            }
            self.grow();
        }
    }

    fn grow(&self) {
        let chunk = Box::new(Chunk {
            lines: core::array::from_fn(|_| Line::new()),
            next: AtomicPtr::new(ptr::null_mut()),
        });
        let chunk = Box::into_raw(chunk);
        let mut head = self.first.load(Relaxed);
        loop {
            // SAFETY: the chunk was just leaked by this thread and is not linked yet.
            unsafe { (*chunk).next.store(head, Relaxed) };
            match self.first.compare_exchange(head, chunk, AcqRel, Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        let mut chunk = self.first.load(Relaxed);
        while !chunk.is_null() {
            // SAFETY: the chunk came from `Box::into_raw` in `grow`, is linked once, and `&mut self` proves
            // that no reference to it is left.
            let owned = unsafe { Box::from_raw(chunk) };
            chunk = owned.next.load(Relaxed);
        }
    }
}

impl fmt::Debug for Readers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter().filter(|line| line.taken.load(Relaxed))).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// PROTOCOLS 1: sections nest by raising, the end restores, the generation stays the oldest.
    #[test]
    fn sections_nest_by_raising() {
        let tlb = Tlb::new();
        let line = tlb.readers.take(None);
        let outer = line.walk(&tlb);
        let since = line.announcement().since();
        tlb.generation.advance();
        {
            let shared = tlb.lock.shared(&tlb, line, &crate::testing::QuietHost::new());
            assert_eq!(line.announcement(), Announcement::new(State::Mapping, since));
            drop(shared);
        }
        assert_eq!(line.announcement(), Announcement::new(State::Walking, since));
        drop(outer);
        assert!(line.is_out());
        line.give_back();
    }

    #[test]
    fn the_slab_grows_and_reuses() {
        let readers = Readers::new();
        let lines: std::vec::Vec<_> = (0..48).map(|n| readers.take(Some(VcpuId::new(n)))).collect();
        assert_eq!(readers.iter().filter(|l| l.vcpu().is_some()).count(), 48);
        lines[7].give_back();
        assert!(ptr::eq(readers.take(None), lines[7]));
    }

    /// PROTOCOLS 3: one announcement of walking and slots costs one fence, and a nested one none.
    #[test]
    fn announcements_cost_one_fence() {
        let tlb = Tlb::new();
        let line = tlb.readers.take(None);
        let (_, fences, locked) = crate::sync::cost::of(|| line.walk_with_slots(&tlb));
        assert_eq!((fences, locked), (1, 0));
        let outer = line.walk(&tlb);
        let (_, fences, locked) = crate::sync::cost::of(|| line.walk(&tlb));
        assert_eq!((fences, locked), (0, 0));
        drop(outer);
    }
}
