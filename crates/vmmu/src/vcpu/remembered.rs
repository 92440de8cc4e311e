//! Remembered walks: fetches of instructions at few places again and again, without walking again.
//!
//! A processor without next-RIP makes its hypervisor read the exiting instruction, a walk of the guest's tables
//! each time; the same few instructions exit most. So a vCPU remembers walks whole: where each entry lies in
//! the host, what it held, and where the page is. A remembered walk is used only where a new one would read the
//! same: in one announced section, the registers equal, neither slots nor backings changed since, and every
//! entry re-read and equal. It is no TLB: nothing about it depends on what the guest flushes. Invariant: a
//! pointer is followed only after slot generation and invalidation sequence were found as they were when it was
//! made, in the section that lasts (PROTOCOLS 4).

use super::Vcpu;
use crate::addr::{Gpa, Gva, PAGE_BYTES};
use crate::arch::paging::{PagingMode, PagingState};
use crate::coverage::{Point, hit};
use crate::guest::Translation;
use crate::host::{Host, ResolveRequest};
use crate::memory::access::GuestPage;
use crate::memory::invalidation::Snapshot;
use crate::memory::slots::SlotGeneration;
use crate::mutants::Mutant::RecallNoRecheck;
use crate::mutants::mutant;
use crate::tlb::reader::Walking;
use arrayvec::ArrayVec;
use core::ptr::NonNull;

/// Walks that a vCPU remembers; the page number chooses the place.
const PLACES: usize = 8;

/// The registers under which a walk was made: all that a fetch's walk reads, but for PAE's own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Registers {
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    user: bool,
    max_phys_bits: u8,
    has_1g_pages: bool,
    amd_compatible: bool,
}

impl Registers {
    #[inline(always)]
    fn of(state: &PagingState) -> Self {
        let PagingState { cr0, cr3, cr4, efer, cpl, max_phys_bits, has_1g_pages, amd_compatible, .. } =
            *state;
        Self { cr0, cr3, cr4, efer, user: cpl == 3, max_phys_bits, has_1g_pages, amd_compatible }
    }
}

/// One page in the host, and an offset in it.
#[derive(Clone, Copy, Debug)]
struct Place {
    page: NonNull<u8>,
    offset: u16,
}

/// A walk.
#[derive(Debug)]
struct Walk {
    registers: Registers,
    page_number: u64,
    generation: SlotGeneration,
    snapshot: Snapshot,
    /// Whether entries have 8 bytes; else 4.
    wide: bool,
    entries: ArrayVec<(Place, u64), 5>,
    /// The page that it led to.
    page: NonNull<u8>,
}

/// The walks of one vCPU.
#[derive(Debug, Default)]
pub(crate) struct Remembered {
    walks: [Option<Walk>; PLACES],
}

// SAFETY: the pointers are followed only in sections of the vCPU that owns the walks, on whatever thread it is.
unsafe impl Send for Remembered {}

impl Remembered {
    #[inline(always)]
    fn place(gva: Gva) -> (u64, usize) {
        let number = gva.raw() / PAGE_BYTES;
        (number, number as usize % PLACES)
    }
}

impl<H: Host> Vcpu<H> {
    /// Fetches from a remembered walk; `None` where there is none, it does not hold any more, or the bytes go
    /// past its page.
    #[inline]
    pub(super) fn recall(&self, gva: Gva) -> Option<[u8; 16]> {
        let (number, place) = Remembered::place(gva);
        let walk = self.remembered.walks[place].as_ref()?;
        let offset = (gva.raw() % PAGE_BYTES) as usize;
        if walk.page_number != number
            || walk.registers != Registers::of(&self.paging)
            || offset + 16 > PAGE_BYTES as usize
        {
            return None;
        }
        let (inner, line) = (self.own.inner(), self.own.line());
        let (walking, section) = line.walk_with_slots(&inner.tlb);
        if inner.alive().is_err() {
            // A dead VM answers nothing (M136).
            return None;
        }
        // Count, sequence, slots, in this order (PROTOCOLS 4).
        let changed = inner.sequence.open() != 0
            || inner.sequence.snapshot() != walk.snapshot
            || inner.slots.read(self.space, &section).generation() != walk.generation;
        if changed && !mutant(RecallNoRecheck) {
            hit(Point::WalkOutdated);
            return None;
        }
        for (place, value) in &walk.entries {
            // SAFETY: `Remembered` holds what `frame_ptr` gave for frames of slots as they are now: neither an
            // invalidation nor a slot change came since, and one that comes now awaits this section.
            let page = unsafe { GuestPage::new(place.page, &walking) };
            let now = if walk.wide {
                page.load_u64(usize::from(place.offset))
            } else {
                u64::from(page.load_u32(usize::from(place.offset)))
            };
            if now != *value {
                hit(Point::WalkEntryChanged);
                return None;
            }
        }
        hit(Point::WalkRecalled);
        // SAFETY: as above.
        Some(unsafe { GuestPage::new(walk.page, &walking) }.read_16(offset))
    }

    /// Remembers a walk that a fetch just made, where everything about it can be had at once.
    #[cold]
    pub(super) fn remember(&mut self, gva: Gva, translation: &Translation) {
        let mode = self.paging.role().mode;
        if matches!(mode, PagingMode::Off | PagingMode::Pae) {
            // Nothing to save, and registers that are not among those compared.
            return;
        }
        let (number, place) = Remembered::place(gva);
        let walk = self.pin(number, mode, translation);
        hit(if walk.is_some() { Point::WalkRemembered } else { Point::WalkNotRemembered });
        self.remembered.walks[place] = walk;
    }

    fn pin(&self, page_number: u64, mode: PagingMode, translation: &Translation) -> Option<Walk> {
        let (inner, line) = (self.own.inner(), self.own.line());
        let (walking, section) = line.walk_with_slots(&inner.tlb);
        let set = inner.slots.read(self.space, &section);
        let generation = set.generation();
        let snapshot = inner.sequence.snapshot();
        let mut hint = self.hint;
        let mut locate = |gpa: Gpa| {
            let slot = set.find(gpa.gfn(), &mut hint).filter(|slot| !slot.changing)?;
            let resolved =
                slot.backing.resolve(slot.page(gpa.gfn()), ResolveRequest::new(false, false)).ok()?;
            let page = inner.host.frame_ptr(resolved.pfn)?;
            Some(Place { page, offset: gpa.page_offset() as u16 })
        };
        let wide = mode != PagingMode::Bits32;
        let mut entries = ArrayVec::new();
        for step in &translation.path {
            entries.push((locate(step.at)?, step.entry));
        }
        let page = locate(translation.gpa)?.page;
        let settled = !generation.in_progress()
            && inner.sequence.open() == 0
            && inner.sequence.snapshot() == snapshot
            && inner.slots.read(self.space, &section).generation() == generation;
        let registers = Registers::of(&self.paging);
        let walk = Walk { registers, page_number, generation, snapshot, wide, entries, page };
        // The entries are compared with what the walk read when the walk is used, so not here.
        let _: &Walking<'_> = &walking;
        settled.then_some(walk)
    }
}
