//! A hostile host for tests: its own frames and table memory, allocations that fail at the n-th, backings that
//! change under invalidation, and a reference model of what the guest may see.

#![allow(dead_code)] // each test file uses its own part

pub(crate) mod scene;

use scene::Hook;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use vmmu::trace::Event;
use vmmu::{Backing, Bug, Host, Hpa, PageSize, Pfn, ResolveError, ResolveRequest, Resolved, VcpuId};

/// A small generator of seeded choices (`SplitMix64`).
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    /// A number below `n`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    /// True once in `n`.
    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Frames of guest memory that tests may really read and write.
pub(crate) const FRAMES: u64 = 4096;
/// Where they start, as host frame numbers.
pub(crate) const FIRST_FRAME: u64 = 0x10_0000;

/// The host.
#[derive(Debug)]
pub(crate) struct TestHost {
    /// Blocks of tables that are out, by index.
    blocks: Mutex<BTreeSet<u64>>,
    tables: Zeroed,
    memory: Zeroed,
    /// Allocations so far, and the first that fails.
    allocations: AtomicU64,
    fail_from: AtomicU64,
    pub(crate) kicks: AtomicU64,
    /// vCPUs that were kicked, one bit each.
    pub(crate) kicked: AtomicU64,
    /// What a test does when the library calls the method of that name.
    pub(crate) on_trace: Hook<Event>,
    pub(crate) on_kick: Hook<VcpuId>,
    pub(crate) on_relax: Hook<()>,
    pub(crate) on_frame: Hook<Pfn>,
    pub(crate) on_alloc: Hook<()>,
}

// SAFETY: the memory is reached through atomics and raw pointers only, and freed when the host is dropped.
unsafe impl Send for TestHost {}
// SAFETY: as above.
unsafe impl Sync for TestHost {}

/// Blocks of tables that the host has, each of 256 KiB, and where they start in its physical memory.
const BLOCKS: u64 = 256;
const BLOCK_BYTES: u64 = 256 << 10;
const FIRST_BLOCK: u64 = 1 << 30;

/// Zeroed memory. Aligned by hand: an allocator that aligns it writes every zero, one that does not takes pages as
/// they are used, and tests make many hosts.
#[derive(Debug)]
struct Zeroed {
    base: NonNull<u8>,
    at: NonNull<u8>,
    layout: Layout,
}

impl Zeroed {
    fn new(bytes: u64, align: u64) -> Self {
        let layout = Layout::from_size_align((bytes + align) as usize, 16).expect("a fixed size");
        // SAFETY: the layout is not empty.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).expect("some MiB");
        // SAFETY: `align` more bytes than are needed were allocated.
        let at = unsafe { base.add(base.align_offset(align as usize)) };
        Self { base, at, layout }
    }
}

impl Drop for Zeroed {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

impl TestHost {
    pub(crate) fn new() -> Arc<Self> {
        scene::activate_chosen_mutant();
        Arc::new(Self {
            blocks: Mutex::default(),
            tables: Zeroed::new(BLOCKS * BLOCK_BYTES, BLOCK_BYTES),
            memory: Zeroed::new(FRAMES * 4096, 4096),
            allocations: AtomicU64::new(0),
            fail_from: AtomicU64::new(u64::MAX),
            kicks: AtomicU64::new(0),
            kicked: AtomicU64::new(0),
            on_trace: Hook::default(),
            on_kick: Hook::default(),
            on_relax: Hook::default(),
            on_frame: Hook::default(),
            on_alloc: Hook::default(),
        })
    }
    /// Makes the `n`-th allocation from now, counted from 0, and all after it fail; `None` lets all succeed.
    pub(crate) fn fail_from(&self, n: Option<u64>) {
        self.allocations.store(0, Relaxed);
        self.fail_from.store(n.unwrap_or(u64::MAX), Relaxed);
    }
    /// Allocations since the last call of `fail_from`.
    pub(crate) fn allocations(&self) -> u64 {
        self.allocations.load(Relaxed)
    }
    /// Blocks of tables that the library has.
    pub(crate) fn blocks_out(&self) -> usize {
        self.blocks.lock().expect("not poisoned").len()
    }
}

impl Drop for TestHost {
    fn drop(&mut self) {
        assert_eq!(self.blocks_out(), 0, "blocks of tables were not given back");
    }
}

/// The host as the library holds it.
#[derive(Clone, Debug)]
pub(crate) struct Handle(pub(crate) Arc<TestHost>);

// SAFETY: blocks are parts of one aligned allocation, each out once at a time; frames lie in another; both live
// as long as the host.
unsafe impl Host for Handle {
    fn alloc_tables(&self, order: u8, _: bool) -> Option<Hpa> {
        self.0.on_alloc.call(());
        if self.0.allocations.fetch_add(1, Relaxed) >= self.0.fail_from.load(Relaxed) {
            return None;
        }
        assert_eq!(4096u64 << order, BLOCK_BYTES);
        let mut blocks = self.0.blocks.lock().expect("not poisoned");
        let index = (0..BLOCKS).find(|n| !blocks.contains(n))?;
        blocks.insert(index);
        Some(Hpa::new(FIRST_BLOCK + index * BLOCK_BYTES))
    }
    fn free_tables(&self, block: Hpa, _: u8) {
        let index = (block.raw() - FIRST_BLOCK) / BLOCK_BYTES;
        let removed = self.0.blocks.lock().expect("not poisoned").remove(&index);
        assert!(removed, "block {block} was given back but never taken");
        // SAFETY: the block is inside the allocation, and nobody has it any more: what still reads it reads this.
        unsafe { self.table_ptr(block).write_bytes(0xDB, BLOCK_BYTES as usize) };
    }
    fn table_ptr(&self, at: Hpa) -> NonNull<u8> {
        let offset = at.raw() - FIRST_BLOCK;
        assert!(offset < BLOCKS * BLOCK_BYTES, "{at} is no table memory");
        // SAFETY: below the end of the allocation.
        unsafe { self.0.tables.at.add(offset as usize) }
    }
    fn frame_ptr(&self, pfn: Pfn) -> Option<NonNull<u8>> {
        self.0.on_frame.call(pfn);
        let index = pfn.raw().checked_sub(FIRST_FRAME).filter(|n| *n < FRAMES)?;
        // SAFETY: below the end of the allocation.
        Some(unsafe { self.0.memory.at.add(index as usize * 4096) })
    }
    fn kick(&self, vcpu: VcpuId) {
        self.0.kicks.fetch_add(1, Relaxed);
        self.0.kicked.fetch_or(1 << vcpu.number(), Relaxed);
        self.0.on_kick.call(vcpu);
    }
    fn relax(&self) {
        self.0.on_relax.call(());
        scene::count_wait();
        std::thread::yield_now();
    }
    fn trace(&self, event: Event) {
        self.0.on_trace.call(event);
    }
    fn bug(&self, bug: &Bug) {
        panic!("{bug}");
    }
}

/// What stands behind one page of a [`ChangingBacking`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Page {
    pub(crate) pfn: Pfn,
    pub(crate) max_size: PageSize,
    pub(crate) writable: bool,
    /// Answers only requests that may wait.
    pub(crate) slow: bool,
}

/// A backing whose pages are changed by the test, under invalidation.
#[derive(Debug, Default)]
pub(crate) struct ChangingBacking {
    pub(crate) pages: Mutex<BTreeMap<u64, Page>>,
}

impl ChangingBacking {
    pub(crate) fn page(&self, page: u64) -> Option<Page> {
        self.pages.lock().expect("not poisoned").get(&page).copied()
    }
}

// SAFETY: tests change pages only inside invalidations, and give large sizes only to blocks that are whole.
unsafe impl Backing for ChangingBacking {
    fn resolve(&self, page: u64, request: ResolveRequest) -> Result<Resolved, ResolveError> {
        let Ok(pages) = self.pages.try_lock() else {
            if request.may_wait {
                let page = self.page(page).ok_or(ResolveError::Unbacked)?;
                return Ok(Resolved::new(page.pfn, page.max_size, page.writable));
            }
            return Err(ResolveError::WouldWait);
        };
        match pages.get(&page) {
            Some(page) if page.slow && !request.may_wait => Err(ResolveError::WouldWait),
            Some(page) => Ok(Resolved::new(page.pfn, page.max_size, page.writable)),
            None => Err(ResolveError::Unbacked),
        }
    }
}
