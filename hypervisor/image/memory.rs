//! What the library asks of its host: memory for tables, a way to reach frames, and what stands behind the
//! guest's pages.
//!
//! Invariant: a frame that the frame map handed out has one owner: a table block, a slot's backing, the heap.
//! The host maps all memory at its physical address, so a frame number is a pointer.

use crate::machine::spin::Spin;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use core::ptr::NonNull;
use hypervisor::frame_map::FrameMap;
use hypervisor::layout::{Block, Frames};
use hypervisor::moving::MovingFrames;
use vmmu::addr::PAGE_BYTES;
use vmmu::{
    Backing, Contiguous, Host, Hpa, PageSize, Pfn, ResolveError, ResolveRequest, Resolved, Scattered, VcpuId,
};

/// The machine's memory: which frames are free, and which are memory at all.
pub(crate) struct Memory {
    frames: Spin<FrameMap>,
    /// RAM and firmware ranges that software may read like RAM, host-physical.
    readable: Vec<Range<u64>>,
}

impl Memory {
    /// Takes over the free `frames`; `readable` are the ranges that are memory rather than devices.
    pub(crate) fn new(frames: FrameMap, readable: Vec<Range<u64>>) -> Arc<Self> {
        Arc::new(Self { frames: Spin::new(frames), readable })
    }

    /// Uses the frame map.
    pub(crate) fn frames<R>(&self, using: impl FnOnce(&mut FrameMap) -> R) -> R {
        self.frames.with(using)
    }
}

/// The library's host: a share of the machine's memory.
#[derive(Clone)]
pub(crate) struct MachineHost(pub(crate) Arc<Memory>);

// SAFETY: blocks come from the frame map, which gives each frame to one owner, and all of RAM is mapped at
// its physical address for as long as the image runs.
unsafe impl Host for MachineHost {
    fn alloc_tables(&self, order: u8, below_4g: bool) -> Option<Hpa> {
        let limit = below_4g.then_some(1 << 20);
        self.0.frames(|frames| frames.take_block(order, limit)).map(|first| Pfn::new(first).hpa())
    }

    fn free_tables(&self, block: Hpa, order: u8) {
        self.0.frames(|frames| frames.give_block(block.pfn().raw(), order));
    }

    #[inline]
    fn table_ptr(&self, at: Hpa) -> NonNull<u8> {
        // Frame 0 is never free, so no table lies at address 0.
        NonNull::new(at.raw() as *mut u8).unwrap_or(NonNull::dangling())
    }

    #[inline]
    fn frame_ptr(&self, pfn: Pfn) -> Option<NonNull<u8>> {
        let at = pfn.hpa().raw();
        if self.0.readable.iter().any(|range| range.start <= at && at < range.end) {
            NonNull::new(at as *mut u8)
        } else {
            None
        }
    }

    fn kick(&self, vcpu: VcpuId) {
        // The only processor is the one that calls, and it is not in the guest.
        crate::report::fatal(format_args!("a kick for vCPU {} with one processor", vcpu.number()))
    }
}

/// The library's backing for frames that were planned: `pages` of them.
pub(crate) fn backing(frames: &Frames, pages: u64) -> Arc<dyn Backing> {
    match frames {
        // SAFETY: the plan took the frames from the frame map, for the guest alone.
        Frames::Run(first) => Arc::new(unsafe { Contiguous::new(Pfn::new(*first), pages) }),
        Frames::Blocks(blocks) => {
            let builder = blocks.iter().fold(Scattered::builder(), |builder, block| match block {
                Block::Whole(first) => builder.huge(Pfn::new(*first)),
                Block::Pages(frames) => {
                    let frames: Vec<Pfn> = frames.iter().copied().map(Pfn::new).collect();
                    builder.pages(&frames)
                }
            });
            // SAFETY: as above.
            Arc::new(unsafe { builder.build() })
        }
    }
}

/// A backing whose frames change, under invalidations (see [`crate::churn`]).
pub(crate) struct Moving(pub(crate) Arc<MovingFrames>);

// SAFETY: the frames belong to the guest, or wait to; a whole block is 512 consecutive frames, aligned on both sides.
// Who changes an answer invalidates its page first, unless it was told to make a mistake.
unsafe impl Backing for Moving {
    #[inline]
    fn resolve(&self, page: u64, _: ResolveRequest) -> Result<Resolved, ResolveError> {
        let (frame, whole) = self.0.frame(page).ok_or(ResolveError::Unbacked)?;
        let size = if whole { PageSize::Size2M } else { PageSize::Size4K };
        Ok(Resolved::new(Pfn::new(frame), size, true))
    }
}

/// A page of zeros that everybody may read and nobody writes.
#[repr(C, align(4096))]
struct Zeros([u8; 4096]);

static ZEROS: Zeros = Zeros([0; 4096]);

/// What stands behind the page of a device that is not there: zeros, to be mapped read-only.
pub(crate) fn absent_device() -> Arc<dyn Backing> {
    let at = Hpa::new(core::ptr::from_ref(&ZEROS) as u64);
    // SAFETY: a page of the image that holds nothing but zeros and lives as long as it; the backing lets nobody
    // write.
    Arc::new(unsafe { Contiguous::new(at.pfn(), 1) }.read_only())
}

/// A backing of whole 2 MiB blocks in any order; the values are their first frames.
pub(crate) struct WholeBlocks(pub(crate) Vec<u64>);

// SAFETY: the frames belong to the slot, and each block is whole and aligned; the answer is constant.
unsafe impl Backing for WholeBlocks {
    #[inline]
    fn resolve(&self, page: u64, _: ResolveRequest) -> Result<Resolved, ResolveError> {
        let block = usize::try_from(page / 512).ok().and_then(|block| self.0.get(block));
        let first = block.ok_or(ResolveError::Unbacked)?;
        Ok(Resolved::new(Pfn::new(first + page % 512), PageSize::Size2M, true))
    }
}

/// The same frames, mapped by 4 KiB pages only.
pub(crate) struct SmallPages(pub(crate) WholeBlocks);

// SAFETY: as for the blocks themselves; a page of a block is as contiguous as the block.
unsafe impl Backing for SmallPages {
    #[inline]
    fn resolve(&self, page: u64, request: ResolveRequest) -> Result<Resolved, ResolveError> {
        let inner = self.0.resolve(page, request)?;
        Ok(Resolved::new(inner.pfn, PageSize::Size4K, inner.writable))
    }
}

/// A backing that gives a page a frame, full of zeros, when it is first wanted.
pub(crate) struct OnTouch(Spin<Touched>);

struct Touched {
    /// The frame of each page that was touched; 0 where none was (frame 0 is never free).
    pages: Vec<u64>,
    /// Frames that no page has yet.
    free: Vec<u64>,
}

impl OnTouch {
    /// `pages` pages that share `free`, the frames that belong to them.
    #[allow(clippy::cast_possible_truncation)] // pages of a slot in this machine's memory
    pub(crate) fn new(pages: u64, free: Vec<u64>) -> Self {
        Self(Spin::new(Touched { pages: alloc::vec![0; pages as usize], free }))
    }
}

// SAFETY: each frame leaves `free` once and then belongs to one page for good; single pages only.
unsafe impl Backing for OnTouch {
    fn resolve(&self, page: u64, _: ResolveRequest) -> Result<Resolved, ResolveError> {
        self.0.with(|touched| {
            let index = usize::try_from(page).map_err(|_| ResolveError::Unbacked)?;
            let slot = touched.pages.get_mut(index).ok_or(ResolveError::Unbacked)?;
            if *slot == 0 {
                let frame = touched.free.pop().ok_or(ResolveError::OutOfMemory)?;
                let at = frame * PAGE_BYTES;
                // SAFETY: the frame is memory that belongs to this backing alone, mapped at its physical
                // address.
                unsafe { core::ptr::write_bytes(at as *mut u8, 0, 4096) };
                *slot = frame;
            }
            Ok(Resolved::new(Pfn::new(*slot), PageSize::Size4K, true))
        })
    }
}
