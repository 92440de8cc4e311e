//! What the models stand on: a host whose frames know who uses them, a backing that moves its page, a VM with its
//! first tables, and what a processor does.
//!
//! Invariants: who uses a frame and who takes it away are accesses that loom compares: it reports each pair that
//! nothing orders. A processor walks by acquire loads, as its own walks depend on what they read.

use super::RACE;
use crate::addr::{Gfn, Gpa, Hpa, PageSize, Pfn};
use crate::arch::Npt;
use crate::arch::entry::{Entry, Format, Leaf};
use crate::arch::fault::Fault;
use crate::error::ResolveError;
use crate::host::{Backing, Host, ResolveRequest, Resolved};
use crate::memory::Region;
use crate::names::{SlotId, VcpuId};
use crate::sync::{AtomicU64, Ordering};
use crate::table::page::EntryCell;
use crate::vcpu::{Outcome, Vcpu};
use crate::vm::Vm;
use crate::vm::config::{Config, TableFormat};
use core::mem::ManuallyDrop;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;
use core::sync::atomic;
use loom::cell::UnsafeCell;
use std::alloc::{Layout, alloc, dealloc};
use std::sync::Arc;

/// A thing that some use and somebody takes away for good: a frame, or what stands for the memory of something.
#[derive(Debug)]
struct Thing {
    touched: UnsafeCell<()>,
    /// An observation, not a step of the model.
    gone: atomic::AtomicBool,
}

/// Such things, by number.
#[derive(Debug)]
pub(super) struct Things([Thing; 4]);

// SAFETY: nothing is in the cells; loom watches who comes to them.
unsafe impl Send for Things {}
// SAFETY: as above.
unsafe impl Sync for Things {}

impl Things {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self(core::array::from_fn(|_| Thing {
            touched: UnsafeCell::new(()),
            gone: atomic::AtomicBool::new(false),
        })))
    }
    /// Somebody uses it, beside others that do.
    pub(super) fn used(&self, number: u64) {
        let thing = &self.0[number as usize];
        thing.touched.with(|_| ());
        assert!(!thing.gone.load(Ordering::Relaxed), "{RACE}: it is used after it was taken away");
    }
    /// Somebody has it alone, and it is gone from here on.
    pub(super) fn taken(&self, number: u64) {
        let thing = &self.0[number as usize];
        thing.touched.with_mut(|_| ());
        thing.gone.store(true, Ordering::Relaxed);
    }
}

/// What is left as it is where an execution ends in a panic: the library's own `drop` would find things half done.
#[derive(Debug)]
pub(super) struct Kept<T>(ManuallyDrop<T>);

impl<T> Kept<T> {
    pub(super) fn new(value: T) -> Self {
        Self(ManuallyDrop::new(value))
    }
}

impl<T> Deref for Kept<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for Kept<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T> Drop for Kept<T> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: dropped once, here, and not used any more.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}

/// The host: an address is a pointer, and whoever asks for a frame's place uses the frame.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) frames: Arc<Things>,
    /// Kicks so far. An observation, not a step of the model.
    pub(super) kicks: atomic::AtomicU64,
}

impl Machine {
    pub(super) fn new() -> Self {
        Self { frames: Things::new(), kicks: atomic::AtomicU64::new(0) }
    }
}

fn layout(order: u8) -> Layout {
    Layout::from_size_align(4096 << order, 4096 << order).expect("a small power of two")
}

/// What every frame holds.
static CONTENT: atomic::AtomicU64 = atomic::AtomicU64::new(0);

// SAFETY: blocks are allocations of the stated size and alignment, mapped where they are; of a frame, models access
// the first word alone.
unsafe impl Host for Machine {
    fn alloc_tables(&self, order: u8, _: bool) -> Option<Hpa> {
        // SAFETY: the layout is not empty.
        NonNull::new(unsafe { alloc(layout(order)) }).map(|at| Hpa::new(at.as_ptr() as u64))
    }
    fn free_tables(&self, block: Hpa, order: u8) {
        // SAFETY: from `alloc_tables`, with the same layout.
        unsafe { dealloc(block.raw() as *mut u8, layout(order)) };
    }
    fn table_ptr(&self, at: Hpa) -> NonNull<u8> {
        NonNull::new(at.raw() as *mut u8).expect("no block lies at 0")
    }
    fn frame_ptr(&self, pfn: Pfn) -> Option<NonNull<u8>> {
        self.frames.used(pfn.raw());
        Some(NonNull::from(&CONTENT).cast())
    }
    fn kick(&self, _: VcpuId) {
        self.kicks.fetch_add(1, Ordering::Relaxed);
    }
}

/// A backing of pages of 4 KiB that is one frame, until it becomes another. Whoever changes it does so within an
/// invalidation; no order of its own helps.
#[derive(Debug)]
pub(super) struct Moving(AtomicU64);

impl Moving {
    pub(super) fn to(&self, pfn: u64) {
        self.0.store(pfn, Ordering::Relaxed);
    }
}

// SAFETY: the frames are numbers, under which the models keep count.
unsafe impl Backing for Moving {
    fn resolve(&self, _: u64, _: ResolveRequest) -> Result<Resolved, ResolveError> {
        let pfn = Pfn::new(self.0.load(Ordering::Relaxed));
        Ok(Resolved { pfn, max_size: PageSize::Size4K, writable: true })
    }
}

/// The tables of every model: four levels.
pub(super) fn format() -> Npt {
    Npt::new(false, 48).expect("legal")
}

/// A VM whose slot 0 is the first four pages, all of them the frame of the backing.
pub(super) fn vm() -> (Kept<Vm<Machine>>, Arc<Moving>) {
    let backing = Arc::new(Moving(AtomicU64::new(1)));
    let vm = Vm::new(Machine::new(), Config::new(TableFormat::Npt4, 48)).expect("legal");
    vm.set_region(SlotId::new(0), Region::new(Gfn::new(0), 4, backing.clone())).expect("valid");
    (Kept::new(vm), backing)
}

/// A vCPU that has a root and, by a fault on the page, tables down to the leaf.
pub(super) fn prepared(vm: &Vm<Machine>, page: u64) -> Kept<Vcpu<Machine>> {
    let mut vcpu = Kept::new(vm.vcpu().expect("alive"));
    vcpu.prepare().expect("memory");
    assert_eq!(fault(&mut vcpu, page), Outcome::Resume);
    vcpu
}

/// The vCPU's guest has written to the page and met nothing, and the fault is handled.
pub(super) fn fault(vcpu: &mut Vcpu<Machine>, page: u64) -> Outcome {
    vcpu.handle_fault(Fault::npf(Gpa::new(page << 12), 0x1_0000_0006)).expect("memory")
}

/// The processor's own walk.
pub(super) fn walk(root: Hpa, page: u64) -> Option<Leaf> {
    let (format, gfn) = (format(), Gfn::new(page));
    let (mut table, mut level) = (root, format.root_level());
    loop {
        let cell = (table.raw() as *const EntryCell).wrapping_add(level.index(gfn));
        // SAFETY: the library linked the table, so it is filled; that it is not freed is what the models show.
        match format.decode(unsafe { &*cell }.load(), level) {
            Entry::Link(below) => (table, level) = (below, level.below()?),
            Entry::Leaf(leaf) => return Some(leaf),
            _ => return None,
        }
    }
}
