//! The slot sets: one for each address space, published whole, looked up without a lock (M10–M25, PROTOCOLS 5).
//!
//! A set is a sorted array of slots with a generation. A change builds the next set, publishes it with the
//! generation marked *in progress*, waits for the readers of the last, and then completes the generation in
//! place. Invariants: ranges within a set are disjoint; generations of different address spaces never
//! coincide (each starts at its number and advances by the number of spaces); only a holder of the slots
//! mutex publishes; only a holder of a slot section (or that mutex) reads.

use super::slot::{Region, Slot, validate_id};
use crate::addr::{Gfn, GfnRange};
use crate::arch::entry::MMIO_GENERATION_MASK;
use crate::error::SlotError;
use crate::host::Host;
use crate::mutants::Mutant::NoWrapZap;
use crate::mutants::mutant;
use crate::names::{AddressSpace, SlotId};
use crate::sync::{AtomicPtr, AtomicU64, Mutex, MutexGuard, Ordering, Rank};
use crate::tlb::Tlb;
use crate::tlb::reader::SlotSection;
use Ordering::{AcqRel, Acquire, Relaxed, Release};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

/// The most address spaces.
pub(crate) const MAX_SPACES: usize = 2;
/// Marks a generation whose readers of the set before may not all have left (M13).
const IN_PROGRESS: u64 = 1 << 63;

/// A slot generation as a reader saw it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SlotGeneration(u64);

impl SlotGeneration {
    /// Whether the change that made it is still in progress: nothing looked up under it may be cached (M14).
    pub(crate) fn in_progress(self) -> bool {
        self.0 & IN_PROGRESS != 0
    }
    /// The bits that an MMIO entry keeps (T48).
    pub(crate) fn for_mmio(self) -> u32 {
        (self.0 & MMIO_GENERATION_MASK) as u32
    }
}

/// One address space's slots at one time.
#[derive(Debug)]
pub(crate) struct SlotSet {
    slots: Vec<Arc<Slot>>,
    generation: AtomicU64,
}

/// A set that was replaced and has no reader any more. It is to be dropped with no lock held: the last reference to
/// a backing may go with it, and that is the user's code.
#[must_use = "drop it with no lock held"]
#[derive(Debug)]
pub(crate) struct OldSet(#[allow(dead_code)] Box<SlotSet>);

/// Where a vCPU found its last slot (M17).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Hint(usize);

impl SlotSet {
    /// The generation, now.
    #[inline(always)]
    pub(crate) fn generation(&self) -> SlotGeneration {
        SlotGeneration(self.generation.load(Acquire))
    }

    /// The slot that holds `gfn`: by the hint, else by bisection, which renews the hint. A hint from another
    /// set is as good as any number.
    #[inline]
    pub(crate) fn find(&self, gfn: Gfn, hint: &mut Hint) -> Option<&Arc<Slot>> {
        if let Some(slot) = self.slots.get(hint.0)
            && slot.range.contains(gfn)
        {
            return Some(slot);
        }
        let at = self.slots.partition_point(|slot| slot.range.end() <= gfn);
        let slot = self.slots.get(at).filter(|slot| slot.range.contains(gfn))?;
        hint.0 = at;
        Some(slot)
    }

    /// All slots, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Slot>> {
        self.slots.iter()
    }

    /// The slots that intersect `range`, ascending.
    pub(crate) fn overlapping(&self, range: GfnRange) -> impl Iterator<Item = &Arc<Slot>> {
        let at = self.slots.partition_point(|slot| slot.range.end() <= range.start());
        self.slots[at..].iter().take_while(move |slot| slot.range.start() < range.end())
    }

    fn by_id(&self, id: SlotId) -> Option<&Arc<Slot>> {
        self.slots.iter().find(|slot| slot.id == id)
    }
}

/// What a request for an existing or a new slot means (M6).
#[derive(Debug)]
pub(crate) enum Change {
    /// It is already so.
    Nothing,
    /// A new slot.
    Create(Arc<Slot>),
    /// Other flags.
    Flags(Arc<Slot>),
    /// Another place for the slot with this old value.
    Move {
        /// What it is now.
        from: Arc<Slot>,
        /// What it becomes.
        to: Arc<Slot>,
    },
}

/// The slots of a VM.
pub(crate) struct Slots {
    spaces: u8,
    max_gfn: Gfn,
    sets: [AtomicPtr<SlotSet>; MAX_SPACES],
    writer: Mutex<()>,
}

/// The right to change slots (the slots mutex, M10).
#[must_use]
pub(crate) struct SlotsWriter<'a> {
    slots: &'a Slots,
    _guard: MutexGuard<'a, ()>,
}

impl Slots {
    /// No slots, in `spaces` address spaces, up to `max_gfn`.
    pub(crate) fn new(spaces: u8, max_gfn: Gfn) -> Self {
        let set = |space: u64| {
            AtomicPtr::new(Box::into_raw(Box::new(SlotSet {
                slots: Vec::new(),
                generation: AtomicU64::new(space),
            })))
        };
        Self { spaces, max_gfn, sets: [set(0), set(1)], writer: Mutex::new(Rank::Slots, ()) }
    }

    /// How many address spaces there are.
    pub(crate) fn spaces(&self) -> u8 {
        self.spaces
    }

    /// The set that is published now; it stays readable while the section lasts.
    #[inline(always)]
    pub(crate) fn read<'s>(&self, space: AddressSpace, _section: &'s SlotSection<'_>) -> &'s SlotSet {
        // SAFETY: the pointer is that of a leaked box. It is freed by a writer only after a wait for all slot
        // sections announced before the replacement (`SlotsWriter::publish`); this section was announced, with
        // a full fence, before this load.
        unsafe { &*self.sets[usize::from(space.0)].load(Acquire) }
    }

    /// Takes the slots mutex.
    pub(crate) fn write(&self) -> SlotsWriter<'_> {
        SlotsWriter { slots: self, _guard: self.writer.lock() }
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        for set in &self.sets {
            // SAFETY: the pointer came from `Box::into_raw` and is owned here; `&mut self` proves that no reader
            // is left.
            drop(unsafe { Box::from_raw(set.load(Relaxed)) });
        }
    }
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slots").field("spaces", &self.spaces).finish_non_exhaustive()
    }
}

impl SlotsWriter<'_> {
    /// The published set. The mutex keeps it in place.
    pub(crate) fn set(&self, space: AddressSpace) -> &SlotSet {
        // SAFETY: only the holder of the slots mutex frees sets, and this is the holder; `publish` needs
        // `&mut self`, so no reference from here outlives a replacement.
        unsafe { &*self.slots.sets[usize::from(space.0)].load(Relaxed) }
    }

    /// Pages of all slots.
    pub(crate) fn total_pages(&self) -> u64 {
        (0..self.slots.spaces)
            .flat_map(|space| self.set(AddressSpace(space)).iter())
            .map(|s| s.range.pages())
            .sum()
    }

    /// What a request means, after every check (M3–M7). Changes nothing.
    pub(crate) fn plan(&self, id: SlotId, region: Region) -> Result<Change, SlotError> {
        validate_id(id, self.slots.spaces)?;
        let range = region.validate(self.slots.max_gfn)?;
        let set = self.set(id.space);
        let old = set.by_id(id);
        if let Some(old) = old {
            if old.range.pages() != region.pages {
                return Err(SlotError::Resized { from: old.range.pages(), to: region.pages });
            }
            if !Arc::ptr_eq(&old.backing, &region.backing) {
                return Err(SlotError::BackingChanged(id));
            }
            if old.flags.symmetric_difference(region.flags).contains(super::RegionFlags::READ_ONLY) {
                return Err(SlotError::ReadOnlyChanged(id));
            }
        } else {
            let total = self.total_pages();
            // M3: the sum must not overflow what the statistics and limits count pages in.
            if total.checked_add(region.pages).is_none_or(|sum| sum > i64::MAX.cast_unsigned()) {
                return Err(SlotError::TotalPages(total));
            }
        }
        if let Some(other) = set.overlapping(range).find(|other| other.id != id) {
            return Err(SlotError::Overlaps(other.id));
        }
        let slot = |range| {
            Arc::new(Slot {
                id,
                range,
                flags: region.flags,
                backing: region.backing.clone(),
                changing: false,
            })
        };
        Ok(match old {
            None => Change::Create(slot(range)),
            Some(old) if old.range != range => Change::Move { from: old.clone(), to: slot(range) },
            Some(old) if old.flags != region.flags => Change::Flags(slot(range)),
            Some(_) => Change::Nothing,
        })
    }

    /// The slot that a request to delete means.
    pub(crate) fn existing(&self, id: SlotId) -> Result<Arc<Slot>, SlotError> {
        validate_id(id, self.slots.spaces)?;
        self.set(id.space).by_id(id).cloned().ok_or(SlotError::Missing(id))
    }

    /// Publishes the set without the slot `id` and with `slot` in its place, waits for the readers of the old
    /// set, lets `at_wrap` run where the bits that MMIO entries keep are about to start over (T51), and
    /// completes the generation.
    pub(crate) fn publish<H: Host>(
        &mut self,
        tlb: &Tlb,
        host: &H,
        id: SlotId,
        slot: Option<Arc<Slot>>,
        at_wrap: impl FnOnce(),
    ) -> OldSet {
        let space = id.space;
        let old = self.set(space);
        let generation = old.generation.load(Relaxed);
        debug_assert_eq!(generation & IN_PROGRESS, 0, "a change is in progress");
        let mut slots: Vec<Arc<Slot>> = old.slots.iter().filter(|s| s.id != id).cloned().collect();
        if let Some(slot) = slot {
            let at = slots.partition_point(|other| other.range.start() < slot.range.start());
            slots.insert(at, slot);
        }
        let next = Box::new(SlotSet { slots, generation: AtomicU64::new(generation | IN_PROGRESS) });
        let before = self.slots.sets[usize::from(space.0)].swap(Box::into_raw(next), AcqRel);
        tlb.wait_for_slot_readers(host);
        let stride = u64::from(self.slots.spaces);
        let last = (generation - u64::from(space.0)) / stride;
        if (last + 1) & (MMIO_GENERATION_MASK / stride) == 0 && !mutant(NoWrapZap) {
            at_wrap();
        }
        self.set(space).generation.store(generation + stride, Release);
        // SAFETY: the old set came from `Box::into_raw`, is no longer published, and every section that could
        // have read it has ended; this writer's references to it (`old`) are not used any more.
        OldSet(unsafe { Box::from_raw(before) })
    }

    /// Whether the kept bits of a space's generation start over with the next change: for tests.
    #[cfg(test)]
    pub(crate) fn set_generation(&mut self, space: AddressSpace, generation: u64) {
        self.set(space).generation.store(generation, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Pfn;
    use crate::host::{Backing, Contiguous};
    use crate::memory::RegionFlags;
    use crate::testing::QuietHost;
    use proptest::prelude::*;

    const MAX: Gfn = Gfn::new((1 << 36) - 1);

    /// A backing that nobody asks.
    fn nothing() -> Arc<dyn Backing> {
        // SAFETY: no guest ever gets the frames.
        Arc::new(unsafe { Contiguous::new(Pfn::new(0), 1) })
    }

    fn backing() -> Arc<dyn Backing> {
        nothing()
    }
    fn region(gfn: u64, pages: u64, backing: &Arc<dyn Backing>) -> Region {
        Region::new(Gfn::new(gfn), pages, backing.clone())
    }
    fn apply(slots: &Slots, id: SlotId, region: Region) -> Result<(), SlotError> {
        let (tlb, host) = (Tlb::new(), QuietHost::new());
        let mut writer = slots.write();
        let slot = match writer.plan(id, region)? {
            Change::Nothing => return Ok(()),
            Change::Create(slot) | Change::Flags(slot) | Change::Move { to: slot, .. } => slot,
        };
        drop(writer.publish(&tlb, &host, id, Some(slot), || {}));
        Ok(())
    }

    /// M6, M7: what may change about a slot, and what overlaps.
    #[test]
    fn modifications() {
        let slots = Slots::new(1, MAX);
        let (a, b) = (backing(), backing());
        let id = SlotId::new(3);
        apply(&slots, id, region(10, 10, &a)).expect("create");
        assert_eq!(apply(&slots, id, region(10, 11, &a)), Err(SlotError::Resized { from: 10, to: 11 }));
        assert_eq!(apply(&slots, id, region(10, 10, &b)), Err(SlotError::BackingChanged(id)));
        let read_only = region(10, 10, &a).flags(RegionFlags::READ_ONLY);
        assert_eq!(apply(&slots, id, read_only), Err(SlotError::ReadOnlyChanged(id)));
        assert_eq!(apply(&slots, SlotId::new(4), region(19, 5, &b)), Err(SlotError::Overlaps(id)));
        apply(&slots, SlotId::new(4), region(20, 5, &b)).expect("beside it");
        apply(&slots, id, region(5, 10, &a)).expect("a move may overlap its own old range");
        assert_eq!(apply(&slots, id, region(12, 10, &a)), Err(SlotError::Overlaps(SlotId::new(4))));
        let writer = slots.write();
        assert_eq!(writer.existing(SlotId::new(9)).err(), Some(SlotError::Missing(SlotId::new(9))));
        assert_eq!(writer.total_pages(), 15);
    }

    /// M6: a request that changes nothing changes no generation.
    #[test]
    fn nothing_is_nothing() {
        let slots = Slots::new(1, MAX);
        let a = backing();
        apply(&slots, SlotId::new(0), region(0, 1, &a)).expect("create");
        let before = slots.write().set(AddressSpace::NORMAL).generation();
        apply(&slots, SlotId::new(0), region(0, 1, &a)).expect("the same");
        assert_eq!(slots.write().set(AddressSpace::NORMAL).generation(), before);
    }

    /// M13: generations of different address spaces never coincide; each change advances by the stride.
    #[test]
    fn generations_of_spaces_differ() {
        let slots = Slots::new(2, MAX);
        let a = backing();
        apply(&slots, SlotId::new(0), region(0, 1, &a)).expect("create");
        apply(&slots, SlotId::in_space(AddressSpace::SMM, 0), region(0, 1, &a)).expect("spaces may overlap");
        let writer = slots.write();
        assert_eq!(writer.set(AddressSpace::NORMAL).generation(), SlotGeneration(2));
        assert_eq!(writer.set(AddressSpace::SMM).generation(), SlotGeneration(3));
    }

    /// T51: the wrap of the kept bits is seen between the wait and the end of the mark.
    #[test]
    fn the_wrap_is_announced_while_in_progress() {
        for spaces in [1u8, 2] {
            let slots = Slots::new(spaces, MAX);
            let (tlb, host) = (Tlb::new(), QuietHost::new());
            let mut writer = slots.write();
            let id = SlotId::new(0);
            let stride = u64::from(spaces);
            writer.set_generation(AddressSpace::NORMAL, (MMIO_GENERATION_MASK + 1) - 2 * stride);
            let mut wraps = 0;
            for expected in [0, 1, 1] {
                drop(writer.publish(&tlb, &host, id, None, || wraps += 1));
                assert_eq!(wraps, expected);
            }
            assert_eq!(u64::from(writer.set(AddressSpace::NORMAL).generation().for_mmio()), stride);
        }
    }

    proptest! {
        /// M17: the hint never changes what is found.
        #[test]
        fn lookup_agrees_with_a_scan(
            gaps in proptest::collection::vec((0u64..4, 1u64..5), 1..20),
            probes in proptest::collection::vec((0u64..120, 0usize..40), 1..50),
        ) {
            let slots = Slots::new(1, MAX);
            let a = backing();
            let mut at = 0;
            for (n, (gap, pages)) in gaps.iter().enumerate() {
                let id = SlotId::new(u16::try_from(n).expect("few"));
                apply(&slots, id, region(at + gap, *pages, &a)).expect("disjoint");
                at += gap + pages;
            }
            let writer = slots.write();
            let set = writer.set(AddressSpace::NORMAL);
            for (gfn, hint) in probes {
                let gfn = Gfn::new(gfn);
                let scanned = set.iter().find(|s| s.range.contains(gfn)).map(|s| s.id);
                prop_assert_eq!(set.find(gfn, &mut Hint(hint)).map(|s| s.id), scanned);
            }
            let range = GfnRange::new(Gfn::new(7), Gfn::new(31)).expect("ordered");
            let scanned: Vec<SlotId> = set.iter().filter(|s| s.range.overlaps(range)).map(|s| s.id).collect();
            let found: Vec<SlotId> = set.overlapping(range).map(|s| s.id).collect();
            prop_assert_eq!(found, scanned);
        }
    }
}
