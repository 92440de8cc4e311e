//! A host for the library's own unit tests: real memory, identity-mapped, and a count of what was asked.
//!
//! Test builds only. Invariant: every block handed out is freed exactly once, with its own order.

use crate::addr::{Hpa, Pfn};
use crate::error::Bug;
use crate::host::Host;
use crate::names::VcpuId;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::sync::Mutex;

/// The host: everything works, nothing is ever refused.
#[derive(Debug, Default)]
pub(crate) struct QuietHost {
    blocks: Mutex<BTreeMap<u64, u8>>,
    kicks: AtomicU64,
}

impl QuietHost {
    pub(crate) fn new() -> Self {
        Self::default()
    }
    pub(crate) fn kicks(&self) -> u64 {
        self.kicks.load(Relaxed)
    }
    pub(crate) fn blocks_out(&self) -> usize {
        self.blocks.lock().expect("not poisoned").len()
    }
}

fn layout(order: u8) -> Layout {
    Layout::from_size_align(4096 << order, 4096 << order).expect("a small power of two")
}

// SAFETY: blocks are real allocations of the stated size and alignment, mapped where they are; frames are
// addresses that tests own.
unsafe impl Host for QuietHost {
    fn alloc_tables(&self, order: u8, _: bool) -> Option<Hpa> {
        // SAFETY: the layout is not empty.
        let at = unsafe { alloc(layout(order)) } as u64;
        assert_ne!(at, 0);
        self.blocks.lock().expect("not poisoned").insert(at, order);
        Some(Hpa::new(at))
    }
    fn free_tables(&self, block: Hpa, order: u8) {
        let removed = self.blocks.lock().expect("not poisoned").remove(&block.raw());
        assert_eq!(removed, Some(order), "block {block}");
        // SAFETY: allocated above with this layout, and taken off the list just now.
        unsafe { dealloc(block.raw() as *mut u8, layout(order)) };
    }
    fn table_ptr(&self, at: Hpa) -> NonNull<u8> {
        NonNull::new(at.raw() as *mut u8).expect("no block lies at 0")
    }
    fn frame_ptr(&self, pfn: Pfn) -> Option<NonNull<u8>> {
        NonNull::new(pfn.hpa().raw() as *mut u8)
    }
    fn kick(&self, _: VcpuId) {
        self.kicks.fetch_add(1, Relaxed);
    }
    fn bug(&self, bug: &Bug) {
        panic!("{bug}");
    }
}
