//! The global allocator: a buddy heap that begins with a small static block, so that the machine's own
//! description can be read, and grows by memory that the frame map hands out.
//!
//! It is for bookkeeping; table pages and guest memory never come from it.

use super::spin::Spin;
use buddy_system_allocator::Heap;
use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::NonNull;

/// Bytes of the static block: enough for the loader's map and the bits of the frame map.
const FIRST: usize = 1 << 20;

#[repr(C, align(4096))]
struct FirstBlock(UnsafeCell<[u8; FIRST]>);
// SAFETY: the heap alone reaches the block, after `initialise` has given it away.
unsafe impl Sync for FirstBlock {}

static FIRST_BLOCK: FirstBlock = FirstBlock(UnsafeCell::new([0; FIRST]));

struct Locked(Spin<Heap<32>>);

// SAFETY: the buddy heap returns blocks that are disjoint and as large and aligned as the layout asks.
unsafe impl GlobalAlloc for Locked {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0.with(|heap| heap.alloc(layout).map_or(core::ptr::null_mut(), NonNull::as_ptr))
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if let Some(block) = NonNull::new(block) {
            // SAFETY: the caller returns a block that `alloc` gave it for this layout.
            self.0.with(|heap| unsafe { heap.dealloc(block, layout) });
        }
    }
}

#[global_allocator]
static HEAP: Locked = Locked(Spin::new(Heap::empty()));

/// Gives the static block to the heap. Called once, before anything allocates.
pub(crate) fn initialise() {
    let start = FIRST_BLOCK.0.get() as usize;
    // SAFETY: the block is ours alone, writable, and given once.
    HEAP.0.with(|heap| unsafe { heap.add_to_heap(start, start + FIRST) });
}

/// Gives more memory to the heap.
///
/// # Safety
/// The `bytes` at the host-physical address `start` must be memory that nobody else uses, now or later.
#[allow(clippy::cast_possible_truncation)] // the host is a 64-bit machine
pub(crate) unsafe fn extend(start: u64, bytes: u64) {
    let (start, end) = (start as usize, (start + bytes) as usize);
    // SAFETY: the caller gives the block away.
    HEAP.0.with(|heap| unsafe { heap.add_to_heap(start, end) });
}

/// Bytes of the heap that are handed out.
pub(crate) fn used() -> u64 {
    HEAP.0.with(|heap| heap.stats_alloc_actual() as u64)
}

/// Bytes of the heap that are free.
pub(crate) fn free() -> u64 {
    HEAP.0.with(|heap| (heap.stats_total_bytes() - heap.stats_alloc_actual()) as u64)
}
