//! What the embedding hypervisor supplies: memory for tables, a way to reach frames, kicks; and, per slot, a
//! [`Backing`] that says which host frame stands behind a guest page.
//!
//! Only traits and plain values live here, and the two backings that need nothing but arithmetic. Invariants:
//! the library calls no method of [`Host`] or [`Backing`] with a lock held that the method could want, except
//! where a method's own text says so.

use crate::addr::{Hpa, Level, PageSize, Pfn};
use crate::error::{Bug, ResolveError};
use crate::names::VcpuId;
use alloc::vec::Vec;
use core::ptr::NonNull;

/// The hypervisor around the library.
///
/// # Safety
/// The library dereferences what these methods return, and lets the processor walk it as page tables. So:
/// a block from [`Host::alloc_tables`] must be memory of the stated size and alignment that nobody else uses
/// until it is given back; [`Host::table_ptr`] must map every byte of every such block, at an address that
/// stays the same and keeps the alignment; [`Host::frame_ptr`] must map all 4096 bytes of a guest frame, at an
/// address that stays the same until an invalidation or the deletion of a slot that covers the frame has
/// returned, as memory that is read and written only by atomic or volatile accesses while guests run.
pub unsafe trait Host: Send + Sync {
    /// A naturally aligned block of 4 KiB << `order` for tables, below 4 GiB where `below_4g`. Its content
    /// does not matter. `None` when memory has run out.
    fn alloc_tables(&self, order: u8, below_4g: bool) -> Option<Hpa>;

    /// Takes back a block of [`Host::alloc_tables`], of the same order.
    fn free_tables(&self, block: Hpa, order: u8);

    /// Where software reaches the table memory at `at`.
    fn table_ptr(&self, at: Hpa) -> NonNull<u8>;

    /// Where software reaches a guest's frame; `None` where the host cannot (then reads and writes of guest
    /// memory through the library fail, and mapping it does not).
    fn frame_ptr(&self, pfn: Pfn) -> Option<NonNull<u8>>;

    /// Forces `vcpu` out of the guest soon. The library waits until the vCPU's exit was reported. Called with
    /// locks of the library held; must neither sleep nor call back. It may come between [`crate::Vcpu::enter`] and
    /// the moment in which the processor is in the guest, and must not be lost then: with interrupts off from
    /// before `enter`, an interprocessor interrupt stays pending until it ends the guest's run.
    fn kick(&self, vcpu: VcpuId);

    /// Called in loops that wait for another processor. May yield; must not call back.
    fn relax(&self) {
        crate::sync::relax();
    }

    /// Something happened ([`crate::trace::Event`]). Called anywhere, under any lock: must neither wait nor call
    /// back. Not implementing it costs nothing.
    #[inline(always)]
    fn trace(&self, _event: crate::trace::Event) {}

    /// An invariant of the library is broken. The VM refuses everything from then on (M136).
    fn bug(&self, bug: &Bug) {
        panic!("{bug}");
    }
}

/// How a page is wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct ResolveRequest {
    /// For writing: the backing must break copy-on-write first (M86).
    pub write: bool,
    /// Whether the backing may sleep. Where not, it must answer at once from what is there, without waiting
    /// for any lock, or say [`ResolveError::WouldWait`]; the library holds a read-side section meanwhile, so a
    /// lock awaited here while its owner invalidates would never be released.
    pub may_wait: bool,
}

impl ResolveRequest {
    /// A request.
    pub const fn new(write: bool, may_wait: bool) -> Self {
        Self { write, may_wait }
    }
}

/// A host frame behind a guest page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Resolved {
    /// The frame of the page itself (not of the large page around it).
    pub pfn: Pfn,
    /// The largest naturally aligned block around the page that is contiguous in the host and may be mapped
    /// as one.
    pub max_size: PageSize,
    /// Whether the guest may write to it. May be true for a read request (M80).
    pub writable: bool,
}

impl Resolved {
    /// A resolved page.
    pub const fn new(pfn: Pfn, max_size: PageSize, writable: bool) -> Self {
        Self { pfn, max_size, writable }
    }
}

/// The memory behind one slot.
///
/// # Safety
/// The guest gets whatever this returns. A frame must belong to the VM until the range was invalidated
/// ([`crate::Vm::invalidate`]) or the slot deleted; `max_size` must be true: all frames of the naturally
/// aligned block around `pfn` belong to the VM at the corresponding pages. Between invalidations the answer
/// for a page does not change its frame.
pub unsafe trait Backing: Send + Sync {
    /// The frame behind the slot's page number `page`, counted in 4 KiB from the slot's start.
    ///
    /// Where it may wait, it may call the VM, also to invalidate other pages; where not, it must not. Where it may
    /// wait, it is called with no lock of the library held and nothing announced; where it may not, inside a section,
    /// and by the audit under the library's locks.
    fn resolve(&self, page: u64, request: ResolveRequest) -> Result<Resolved, ResolveError>;
}

/// A backing of consecutive host frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Contiguous {
    first: Pfn,
    pages: u64,
    max_size: PageSize,
    writable: bool,
}

impl Contiguous {
    /// Slot page `n` is frame `first + n`, for `pages` pages, mapped in pages of up to 1 GiB.
    ///
    /// # Safety
    /// Guests and the library read and write what is behind these frames, so they must belong to whatever VM the
    /// backing is given to, until the slot was deleted or the range invalidated.
    pub const unsafe fn new(first: Pfn, pages: u64) -> Self {
        Self { first, pages, max_size: PageSize::Size1G, writable: true }
    }
    /// The same, in pages of at most `size`.
    #[must_use]
    pub const fn max_size(mut self, size: PageSize) -> Self {
        self.max_size = size;
        self
    }
    /// The same, never writable for the guest.
    #[must_use]
    pub const fn read_only(mut self) -> Self {
        self.writable = false;
        self
    }

    /// The largest page around `page` that lies wholly inside the run.
    #[cold]
    fn size_near_an_end(&self, page: u64) -> PageSize {
        let fits = |size: &&PageSize| {
            let block = self.first.offset(page).align_down(size.level()).raw();
            let first = self.first.raw();
            **size <= self.max_size && block >= first && block + size.pages() <= first + self.pages
        };
        PageSize::ALL.iter().rev().find(fits).copied().unwrap_or(PageSize::Size4K)
    }
}

// SAFETY: the constructor's caller gave the frames away; a block is called whole only where it lies inside the
// run; the answer is constant.
unsafe impl Backing for Contiguous {
    #[inline]
    fn resolve(&self, page: u64, _: ResolveRequest) -> Result<Resolved, ResolveError> {
        if page >= self.pages {
            return Err(ResolveError::Unbacked);
        }
        let largest = self.max_size.pages();
        let inside = page >= largest && page + largest <= self.pages;
        let size = if inside { self.max_size } else { self.size_near_an_end(page) };
        Ok(Resolved::new(self.first.offset(page), size, self.writable))
    }
}

/// A backing of single frames and whole 2 MiB blocks in any order: what a host that allocates guest memory
/// piece by piece has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Scattered {
    /// One entry for each 512 slot pages.
    blocks: Vec<Block>,
    /// Frames of the blocks that are not whole, 512 each but for the last.
    pages: Vec<Pfn>,
}

/// 512 pages of a [`Scattered`] backing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Block {
    /// Consecutive frames from here, and the largest size in which they may be mapped.
    Whole(Pfn, PageSize),
    /// Single frames: where they start in the list, and how many there are.
    Pages { first: usize, count: usize },
}

impl Scattered {
    /// A builder without pages.
    pub const fn builder() -> ScatteredBuilder {
        ScatteredBuilder { inner: Self { blocks: Vec::new(), pages: Vec::new() } }
    }

    /// Slot pages that have a frame, if the last block is complete: the slot's length.
    pub fn pages(&self) -> u64 {
        self.blocks
            .iter()
            .map(|block| match block {
                Block::Whole(..) => 512,
                Block::Pages { count, .. } => *count as u64,
            })
            .sum()
    }
}

/// Collects the frames of a [`Scattered`] backing in the order of the slot's pages.
#[derive(Clone, Debug)]
pub struct ScatteredBuilder {
    inner: Scattered,
}

impl ScatteredBuilder {
    /// Appends 512 pages: the consecutive frames from `first`. They are mapped as one 2 MiB page where `first`
    /// and the slot's start are aligned to it.
    #[must_use]
    pub fn huge(mut self, first: Pfn) -> Self {
        // The naturally aligned block around each page must be this block, not parts of two.
        let size = if first.is_aligned(Level::L2) { PageSize::Size2M } else { PageSize::Size4K };
        self.inner.blocks.push(Block::Whole(first, size));
        self
    }
    /// Appends up to 512 single pages; fewer only as the slot's last.
    ///
    /// # Panics
    /// When given more than 512.
    #[must_use]
    pub fn pages(mut self, frames: &[Pfn]) -> Self {
        assert!(frames.len() <= 512, "{} frames in one block of 512", frames.len());
        let first = self.inner.pages.len();
        self.inner.pages.extend_from_slice(frames);
        self.inner.blocks.push(Block::Pages { first, count: frames.len() });
        self
    }
    /// The backing.
    ///
    /// # Safety
    /// Guests and the library read and write what is behind these frames, so they must belong to whatever VM the
    /// backing is given to, until the slot was deleted or the range invalidated.
    pub unsafe fn build(self) -> Scattered {
        self.inner
    }
}

// SAFETY: the builder's caller gave the frames away; a block is called large only if its 512 frames are
// consecutive and aligned; the answer is constant.
unsafe impl Backing for Scattered {
    #[inline]
    fn resolve(&self, page: u64, _: ResolveRequest) -> Result<Resolved, ResolveError> {
        let within = page % 512;
        match usize::try_from(page / 512).ok().and_then(|block| self.blocks.get(block)) {
            Some(Block::Whole(first, size)) => Ok(Resolved::new(first.offset(within), *size, true)),
            Some(Block::Pages { first, count }) if within < *count as u64 => {
                let pfn = self.pages[first + within as usize];
                Ok(Resolved::new(pfn, PageSize::Size4K, true))
            }
            _ => Err(ResolveError::Unbacked),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_finds_each_page() {
        let single: Vec<Pfn> = (0..512).map(|n| Pfn::new(7000 + n * 3)).collect();
        let builder =
            Scattered::builder().huge(Pfn::new(512)).pages(&single).pages(&[Pfn::new(9), Pfn::new(5)]);
        // SAFETY: no guest ever gets the frames.
        let backing = unsafe { builder.build() };
        let request = ResolveRequest::new(true, false);
        assert_eq!(backing.pages(), 1026);
        assert_eq!(backing.resolve(3, request), Ok(Resolved::new(Pfn::new(515), PageSize::Size2M, true)));
        assert_eq!(backing.resolve(514, request), Ok(Resolved::new(Pfn::new(7006), PageSize::Size4K, true)));
        assert_eq!(backing.resolve(1025, request), Ok(Resolved::new(Pfn::new(5), PageSize::Size4K, true)));
        assert_eq!(backing.resolve(1026, request), Err(ResolveError::Unbacked));
        assert_eq!(backing.resolve(u64::MAX, request), Err(ResolveError::Unbacked));
    }

    /// A run that is not aligned in the host is no large page, wherever the slot lies.
    #[test]
    fn an_unaligned_block_is_not_large() {
        // SAFETY: no guest ever gets the frames.
        let backing = unsafe { Scattered::builder().huge(Pfn::new(0x1100)).huge(Pfn::new(0x9100)).build() };
        let request = ResolveRequest::new(true, false);
        let resolved = backing.resolve(0x100, request).expect("backed");
        assert_eq!((resolved.pfn, resolved.max_size), (Pfn::new(0x1200), PageSize::Size4K));
    }

    /// A run ends where it ends, and offers no large page that reaches past either end.
    #[test]
    fn a_run_has_ends() {
        // SAFETY: no guest ever gets the frames.
        let backing = unsafe { Contiguous::new(Pfn::new(0x1F0), 0x10 + 3 * 512 + 5) };
        let request = ResolveRequest::new(true, false);
        let size = |page| backing.resolve(page, request).map(|r| r.max_size);
        assert_eq!(size(0xF), Ok(PageSize::Size4K));
        assert_eq!(size(0x10), Ok(PageSize::Size2M));
        assert_eq!(size(0x10 + 3 * 512 - 1), Ok(PageSize::Size2M));
        assert_eq!(size(0x10 + 3 * 512), Ok(PageSize::Size4K));
        assert_eq!(size(0x10 + 3 * 512 + 5), Err(ResolveError::Unbacked));
        assert_eq!(size(u64::MAX), Err(ResolveError::Unbacked));
    }
}
