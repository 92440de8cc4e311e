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
pub(crate) const BLOCK: u64 = 256 << 10;
const BLOCKS: u64 = 512;
/// Words of a guest's frame that anybody looks at: the others stay as they are, since nothing would see them.
pub(crate) const WORDS: usize = 16;
/// What a frame holds that no VM has.
pub(crate) const POISON: u64 = 0xDEAD_F00D_DEAD_F00D;

/// Which allocations of tables fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Failures {
    /// One in so many; 0: none.
    pub one_in: u64,
    /// The n-th of the history, from 1 on; 0: none.
    pub nth: u64,
    /// And as many as this after the n-th.
    pub then: u64,
}

impl Failures {
    /// None fails.
    pub const NONE: Self = Self { one_in: 0, nth: 0, then: 0 };
}

/// The host, shared by all tasks.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) memory: Arc<Memory>,
    blocks: Mutex<BTreeSet<u64>>,
    failures: Failures,
    allocations: AtomicU64,
    /// A kick reaches its vCPU within so many looks of the guest.
    kick_delay: u64,
    random: Mutex<Random>,
    /// For each vCPU, in how many looks a kick reaches it; 0: it was not kicked.
    kicked: [AtomicU64; 64],
}

/// The host as the library holds it.
#[derive(Clone, Debug)]
pub(crate) struct SimHost(pub(crate) Arc<Shared>);

impl SimHost {
    pub(crate) fn new(memory: Arc<Memory>, random: Random, failures: Failures, kick_delay: u64) -> Self {
        Self(Arc::new(Shared {
            memory,
            blocks: Mutex::default(),
            failures,
            allocations: AtomicU64::new(0),
            kick_delay: kick_delay.max(1),
            random: Mutex::new(random),
            kicked: [const { AtomicU64::new(0) }; 64],
        }))
    }
    /// Whether a kick reaches the vCPU now: it is under way for a while, as interrupts are, and the guest goes on.
    pub(crate) fn take_kick(&self, vcpu: VcpuId) -> bool {
        let kicked = &self.0.kicked[vcpu.number() as usize];
        let left = kicked.load(Relaxed);
        kicked.store(left.saturating_sub(1), Relaxed);
        left == 1
    }
    /// Whether a kick is under way.
    pub(crate) fn is_kicked(&self, vcpu: VcpuId) -> bool {
        self.0.kicked[vcpu.number() as usize].load(Relaxed) != 0
    }
    /// Takes a kick that came while the vCPU was out of the guest.
    pub(crate) fn forget_kick(&self, vcpu: VcpuId) {
        self.0.kicked[vcpu.number() as usize].store(0, Relaxed);
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
    /// A word of a frame.
    pub(crate) fn word(&self, pfn: Pfn, at: usize) -> u64 {
        self.page(pfn)[at].load(Relaxed)
    }
    /// Whether a frame that nobody has is as it was left.
    pub(crate) fn is_untouched(&self, pfn: Pfn) -> bool {
        let words = &self.page(pfn)[..WORDS];
        let all = |value| words.iter().all(|word| word.load(Relaxed) == value);
        all(0) || all(POISON)
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
        let Failures { one_in, nth, then } = self.0.failures;
        let number = self.0.allocations.fetch_add(1, Relaxed) + 1;
        let this = nth != 0 && (nth..=nth.saturating_add(then)).contains(&number);
        if this || self.0.random.lock().expect("one thread").one_in(one_in) {
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
        let kicked = &self.0.kicked[vcpu.number() as usize];
        if kicked.load(Relaxed) == 0 {
            let delay = self.0.random.lock().expect("one thread").below(self.0.kick_delay);
            kicked.store(1 + delay, Relaxed);
        }
    }
    fn bug(&self, bug: &Bug) {
        panic!("the library reports a bug: {bug}");
    }
}
