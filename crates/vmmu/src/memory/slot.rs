//! One slot: a range of guest frames with a backing; what users ask for ([`Region`]) and what is published
//! ([`Slot`]); the validity of a request taken by itself (M1–M5).
//!
//! Invariant: a published slot is immutable; being deleted or moved is a new value that shares the backing.

use crate::addr::{Gfn, GfnRange, Level, PageSize, Pfn};
use crate::error::SlotError;
use crate::host::Backing;
use crate::names::SlotId;
use alloc::sync::Arc;
use bitflags::bitflags;
use core::fmt;

/// Slot numbers of one address space; the top three are internal (M3).
pub(crate) const SLOT_IDS: u16 = 32_767;
/// Those that users may have.
const USER_SLOT_IDS: u16 = SLOT_IDS - 3;
/// The most pages of one slot (M3).
const MAX_SLOT_PAGES: u64 = (1 << 31) - 1;

bitflags! {
    /// What a slot's user may ask for, by the kernel's values (M2).
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct RegionFlags: u32 {
        /// The guest may read and execute, not write: its writes come back as
        /// [`crate::Outcome::ReadOnlyWrite`].
        const READ_ONLY = 1 << 1;
    }
}

/// A request for a slot: where, how long, backed by what.
#[derive(Clone)]
#[non_exhaustive]
pub struct Region {
    /// The first guest frame.
    pub gfn: Gfn,
    /// The length in pages of 4 KiB.
    pub pages: u64,
    /// What stands behind it.
    pub backing: Arc<dyn Backing>,
    /// Flags.
    pub flags: RegionFlags,
}

impl Region {
    /// `pages` pages from `gfn`, writable.
    pub fn new(gfn: Gfn, pages: u64, backing: Arc<dyn Backing>) -> Self {
        Self { gfn, pages, backing, flags: RegionFlags::empty() }
    }
    /// The same with `flags`.
    #[must_use]
    pub fn flags(mut self, flags: RegionFlags) -> Self {
        self.flags = flags;
        self
    }

    /// The checks of M3 and M5 that need nothing but the request: returns the range.
    pub(crate) fn validate(&self, max_gfn: Gfn) -> Result<GfnRange, SlotError> {
        if self.flags != RegionFlags::from_bits_truncate(self.flags.bits()) {
            return Err(SlotError::Flags(self.flags.bits()));
        }
        if self.pages == 0 {
            return Err(SlotError::Empty);
        }
        let range = GfnRange::with_len(self.gfn, self.pages)
            .ok_or(SlotError::Wraps { gfn: self.gfn, pages: self.pages })?;
        if self.pages > MAX_SLOT_PAGES {
            return Err(SlotError::TooManyPages(self.pages));
        }
        let last = Gfn::new(range.end().raw() - 1);
        if last > max_gfn {
            return Err(SlotError::BeyondLimit { last, limit: max_gfn });
        }
        Ok(range)
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region")
            .field("gfn", &self.gfn)
            .field("pages", &self.pages)
            .field("flags", &self.flags)
            .finish_non_exhaustive()
    }
}

/// Whether `id` is one that users may name, in a VM with `spaces` address spaces (M3–M5).
pub(crate) fn validate_id(id: SlotId, spaces: u8) -> Result<(), SlotError> {
    if id.space.0 >= spaces {
        return Err(SlotError::AddressSpace(id.space.0));
    }
    if id.id >= USER_SLOT_IDS {
        return Err(SlotError::Id(id.id));
    }
    Ok(())
}

/// A slot as it is published.
#[derive(Clone)]
pub(crate) struct Slot {
    pub(crate) id: SlotId,
    pub(crate) range: GfnRange,
    pub(crate) flags: RegionFlags,
    pub(crate) backing: Arc<dyn Backing>,
    /// Being deleted or moved: faults retry until it is gone (M21, T73).
    pub(crate) changing: bool,
}

impl Slot {
    pub(crate) fn is_read_only(&self) -> bool {
        self.flags.contains(RegionFlags::READ_ONLY)
    }

    /// The number within the slot of a page that lies in it.
    #[inline(always)]
    pub(crate) fn page(&self, gfn: Gfn) -> u64 {
        gfn.raw() - self.range.start().raw()
    }

    /// The highest level at which `gfn` may be mapped: the aligned block lies wholly inside the slot, the frames
    /// agree modulo the block, and neither `size` nor `limit` is exceeded (T75, M26, M27).
    #[inline(always)]
    pub(crate) fn leaf_level(&self, gfn: Gfn, pfn: Pfn, size: PageSize, limit: Level) -> Level {
        if size == PageSize::Size4K { Level::L1 } else { self.large_leaf_level(gfn, pfn, size, limit) }
    }

    fn large_leaf_level(&self, gfn: Gfn, pfn: Pfn, size: PageSize, limit: Level) -> Level {
        let mut level = size.level().min(limit);
        while level > Level::L1 {
            let congruent = (gfn.raw() ^ pfn.raw()) & (level.pages() - 1) == 0;
            if congruent && self.range.covers(GfnRange::block(gfn, level)) {
                break;
            }
            level = level.below().unwrap_or(Level::L1);
        }
        level
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot")
            .field("id", &self.id)
            .field("range", &self.range)
            .field("flags", &self.flags)
            .field("changing", &self.changing)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Contiguous;
    use crate::names::AddressSpace;

    /// A backing that nobody asks.
    fn nothing() -> Arc<dyn Backing> {
        // SAFETY: no guest ever gets the frames.
        Arc::new(unsafe { Contiguous::new(Pfn::new(0), 1) })
    }

    fn region(gfn: u64, pages: u64) -> Region {
        Region::new(Gfn::new(gfn), pages, nothing())
    }
    const LIMIT: Gfn = Gfn::new((1 << 36) - 1);

    /// M3, M5: each arithmetic refusal, with the value.
    #[test]
    fn requests_are_validated() {
        assert_eq!(region(0, 0).validate(LIMIT), Err(SlotError::Empty));
        assert_eq!(region(1, 1 << 31).validate(LIMIT), Err(SlotError::TooManyPages(1 << 31)));
        let wraps = SlotError::Wraps { gfn: Gfn::new(u64::MAX), pages: 2 };
        assert_eq!(region(u64::MAX, 2).validate(LIMIT), Err(wraps));
        let beyond = SlotError::BeyondLimit { last: Gfn::new(1 << 36), limit: LIMIT };
        assert_eq!(region((1 << 36) - 1, 2).validate(LIMIT), Err(beyond));
        let unknown = region(0, 1).flags(RegionFlags::from_bits_retain(1 << 16));
        assert_eq!(unknown.validate(LIMIT), Err(SlotError::Flags(1 << 16)));
        assert!(region((1 << 36) - 1, 1).validate(LIMIT).is_ok());
    }

    #[test]
    fn names_are_validated() {
        assert_eq!(validate_id(SlotId::new(32_764), 1), Err(SlotError::Id(32_764)));
        assert_eq!(validate_id(SlotId::in_space(AddressSpace::SMM, 0), 1), Err(SlotError::AddressSpace(1)));
        assert!(validate_id(SlotId::in_space(AddressSpace::SMM, 32_763), 2).is_ok());
    }

    /// M27, T75: unaligned ends and frames out of step lower the level.
    #[test]
    fn leaf_level_is_bounded_by_slot_and_frames() {
        let slot = Slot {
            id: SlotId::new(0),
            range: GfnRange::new(Gfn::new(0x100), Gfn::new(0x40_000 + 0x300)).expect("ordered"),
            flags: RegionFlags::empty(),
            backing: nothing(),
            changing: false,
        };
        let level = |gfn: u64, pfn: u64, size| slot.leaf_level(Gfn::new(gfn), Pfn::new(pfn), size, Level::L3);
        assert_eq!(level(0x200, 0x200, PageSize::Size1G), Level::L2, "the slot starts inside the first GiB");
        assert_eq!(
            level(0x180, 0x180, PageSize::Size1G),
            Level::L1,
            "the slot starts inside the first 2 MiB"
        );
        assert_eq!(level(0x40_200, 0x40_200, PageSize::Size1G), Level::L1, "and ends inside its last");
        assert_eq!(level(0x400, 0x601, PageSize::Size1G), Level::L1, "frames out of step");
        assert_eq!(level(0x400, 0x600, PageSize::Size1G), Level::L2);
        assert_eq!(level(0x400, 0x600, PageSize::Size4K), Level::L1);
    }
}
