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
    relaxed: AtomicU64,
}

impl QuietHost {
    pub(crate) fn new() -> Self {
        activate_chosen_mutant();
        Self::default()
    }
    /// How often something waited.
    pub(crate) fn relaxed(&self) -> u64 {
        self.relaxed.load(Relaxed)
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
    fn relax(&self) {
        self.relaxed.fetch_add(1, Relaxed);
        crate::sync::relax();
    }
    fn bug(&self, bug: &Bug) {
        panic!("{bug}");
    }
}

/// Breaks the rule that `VMMU_MUTANT` names, in every test of this process that has a host: for the proof that tests
/// notice.
fn activate_chosen_mutant() {
    #[cfg(feature = "mutants")]
    {
        use crate::mutants::{Mutant, activate};
        static CHOSEN: std::sync::OnceLock<()> = std::sync::OnceLock::new();
        CHOSEN.get_or_init(|| {
            let Ok(name) = std::env::var("VMMU_MUTANT") else { return };
            let mutant = Mutant::ALL.iter().find(|mutant| mutant.name() == name);
            activate(Some(*mutant.unwrap_or_else(|| panic!("there is no mutant {name}"))));
        });
    }
}

/// Polls until `condition` holds; false after two seconds, longer than anything takes that ends.
pub(crate) fn comes_true(condition: impl Fn() -> bool) -> bool {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(2);
    while !condition() {
        if std::time::Instant::now() > end {
            return false;
        }
        std::thread::yield_now();
    }
    true
}
