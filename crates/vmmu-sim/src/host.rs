//! The host of a simulated VM: table memory and frames in the machine's memory, kicks that take their time, and
//! allocations that may fail.
//!
//! Invariants: a block of tables is out once at a time and is filled with rubbish when it comes back; a frame
//! that its VM gave back holds poison.

use crate::random::Random;
use std::collections::BTreeSet;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use vmmu::{Bug, Host, Hpa, Pfn, VcpuId};
use vmmu_machine::Memory;

/// Where blocks of tables start, and how large one is.
const TABLES: u64 = 1 << 32;
const BLOCK: u64 = 256 << 10;
const BLOCKS: u64 = 512;
/// Words of a guest's frame that anybody looks at: the others stay as they are, since nothing would see them.
pub(crate) const WORDS: usize = 16;
/// What a frame holds that no VM has.
pub(crate) const POISON: u64 = 0xDEAD_F00D_DEAD_F00D;

/// The host, shared by all tasks.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) memory: Arc<Memory>,
    blocks: Mutex<BTreeSet<u64>>,
    /// One allocation in so many fails; 0: none.
    fail_one_in: u64,
    random: Mutex<Random>,
    /// For each vCPU, whether it was kicked.
    kicked: [AtomicU64; 64],
}

/// The host as the library holds it.
#[derive(Clone, Debug)]
pub(crate) struct SimHost(pub(crate) Arc<Shared>);

impl SimHost {
    pub(crate) fn new(memory: Arc<Memory>, random: Random, fail_one_in: u64) -> Self {
        Self(Arc::new(Shared {
            memory,
            blocks: Mutex::default(),
            fail_one_in,
            random: Mutex::new(random),
            kicked: [const { AtomicU64::new(0) }; 64],
        }))
    }
    /// Whether the vCPU was kicked since it last asked.
    pub(crate) fn take_kick(&self, vcpu: VcpuId) -> bool {
        self.0.kicked[vcpu.number() as usize].swap(0, Relaxed) != 0
    }
    /// Blocks of tables that are out.
    pub(crate) fn blocks_out(&self) -> usize {
        self.0.blocks.lock().expect("one thread").len()
    }
    fn page(&self, pfn: Pfn) -> &[AtomicU64; 512] {
        self.0.memory.page(vmmu_machine::Pfn::new(pfn.raw()))
    }
    /// Fills a frame of the guest, as far as anybody looks.
    pub(crate) fn fill(&self, pfn: Pfn, value: u64) {
        self.page(pfn)[..WORDS].iter().for_each(|word| word.store(value, Relaxed));
    }
    /// Copies a frame of the guest, as far as anybody looks.
    pub(crate) fn copy(&self, from: Pfn, to: Pfn) {
        for (from, to) in self.page(from).iter().zip(self.page(to)).take(WORDS) {
            to.store(from.load(Relaxed), Relaxed);
        }
    }
}

// SAFETY: blocks are pages of the machine's memory, which never move; a naturally aligned block of 64 pages is in
// one piece there; each is out once at a time. Frames are other pages of it.
unsafe impl Host for SimHost {
    fn alloc_tables(&self, order: u8, _: bool) -> Option<Hpa> {
        assert_eq!(4096u64 << order, BLOCK);
        if self.0.random.lock().expect("one thread").one_in(self.0.fail_one_in) {
            return None;
        }
        let mut blocks = self.0.blocks.lock().expect("one thread");
        let index = (0..BLOCKS).find(|n| !blocks.contains(n))?;
        blocks.insert(index);
        Some(Hpa::new(TABLES + index * BLOCK))
    }
    fn free_tables(&self, block: Hpa, order: u8) {
        let index = (block.raw() - TABLES) / BLOCK;
        assert!(self.0.blocks.lock().expect("one thread").remove(&index), "{block} was not out");
        for page in 0..1 << order {
            self.page(block.pfn().offset(page)).iter().for_each(|word| word.store(POISON, Relaxed));
        }
    }
    fn table_ptr(&self, at: Hpa) -> NonNull<u8> {
        let words = self.page(at.pfn());
        NonNull::from(words).cast::<u8>().map_addr(|address| address | (at.raw() & 0xFFF) as usize)
    }
    fn frame_ptr(&self, pfn: Pfn) -> Option<NonNull<u8>> {
        Some(NonNull::from(self.page(pfn)).cast())
    }
    fn kick(&self, vcpu: VcpuId) {
        self.0.kicked[vcpu.number() as usize].store(1, Relaxed);
    }
    fn bug(&self, bug: &Bug) {
        panic!("the library reports a bug: {bug}");
    }
}
