//! The VM: the object that users share, its operations on memory, and the parts that they are made of.
//!
//! | room | holds |
//! |---|---|
//! | `config` | what a VM is made with |
//! | `regions` | slots: add, move, delete |
//! | `invalidate` | the host takes frames away; everything is zapped; retired tables are reused |
//!
//! It may touch everything below. Invariants: no operation holds a lock while it waits for a section or a
//! guest but for the slots mutex; whatever an operation unlinked is retired before it returns.

pub(crate) mod config;
pub(crate) mod invalidate;
pub(crate) mod regions;

use crate::addr::{Gfn, PageSize, Pfn};
use crate::arch::Npt;
use crate::arch::entry::{Entry, Format, Writable};
use crate::error::{Bug, ConfigError, Error, SlotError};
use crate::host::Host;
use crate::memory::invalidation::InvalidationSequence;
use crate::memory::slots::Slots;
use crate::names::{AddressSpace, VcpuId};
use crate::stats::Stats;
use crate::sync::{AtomicBool, AtomicU32, Ordering};
use crate::table::arena::{Arena, BLOCK_BYTES, Tables};
use crate::tdp::{Env, Tdp};
use crate::tlb::Tlb;
use crate::tlb::reader::{Line, Request, State};
use crate::tlb::reclaim::Reclaim;
use crate::tlb::tag::Identity;
use alloc::sync::Arc;
use config::Config;
use core::fmt;
use core::ops::ControlFlow;
use core::ptr::NonNull;

/// A virtual machine's memory. Cheap to clone; all clones are one VM, which ends with the last of its clones,
/// vCPUs and readers.
pub struct Vm<H: Host> {
    pub(crate) inner: Arc<Inner<H>>,
}

/// What a VM is made of.
pub(crate) struct Inner<H: Host> {
    pub(crate) host: H,
    pub(crate) config: Config,
    pub(crate) tlb: Tlb,
    pub(crate) arena: Arena<H>,
    pub(crate) reclaim: Reclaim,
    pub(crate) slots: Slots,
    pub(crate) sequence: InvalidationSequence,
    pub(crate) tdp: Tdp<Npt>,
    dead: AtomicBool,
    next_vcpu: AtomicU32,
}

/// A reader's line, held for as long as its owner lives.
pub(crate) struct OwnLine<H: Host> {
    inner: Arc<Inner<H>>,
    line: NonNull<Line>,
}

// SAFETY: the line belongs to its owner wherever that is; the slab that holds it is shared and lives as long as
// `inner`.
unsafe impl<H: Host> Send for OwnLine<H> {}

impl<H: Host> OwnLine<H> {
    pub(crate) fn new(inner: Arc<Inner<H>>, vcpu: Option<VcpuId>) -> Self {
        let line = NonNull::from(inner.tlb.readers.take(vcpu));
        Self { inner, line }
    }
    #[inline(always)]
    pub(crate) fn inner(&self) -> &Arc<Inner<H>> {
        &self.inner
    }
    #[inline(always)]
    pub(crate) fn line(&self) -> &Line {
        // SAFETY: lines are freed with the slab, which `inner` keeps.
        unsafe { self.line.as_ref() }
    }
}

impl<H: Host> Drop for OwnLine<H> {
    fn drop(&mut self) {
        self.line().give_back();
    }
}

impl<H: Host> fmt::Debug for OwnLine<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.line(), f)
    }
}

impl<H: Host> Inner<H> {
    #[inline(always)]
    pub(crate) fn env(&self) -> Env<'_, H> {
        Env { host: &self.host, tlb: &self.tlb, arena: &self.arena }
    }
    #[inline(always)]
    pub(crate) fn tables(&self) -> Tables<'_, H> {
        Tables { arena: &self.arena, host: &self.host }
    }
    #[inline(always)]
    pub(crate) fn alive(&self) -> Result<(), Error> {
        if self.dead.load(Ordering::Relaxed) { Err(Error::Dead) } else { Ok(()) }
    }
    /// Marks the VM dead, takes every vCPU out of the guest, and reports why (M136). Called with nothing
    /// announced.
    #[cold]
    pub(crate) fn bug(&self, bug: &Bug) -> Error {
        self.dead.store(true, Ordering::Relaxed);
        self.post(Request::Exit, |_| true);
        self.host.bug(bug);
        Error::Dead
    }
    /// Posts a request to the vCPUs that `to` chooses, and kicks those of them that are in the guest.
    pub(crate) fn post(&self, request: Request, to: impl Fn(VcpuId) -> bool) {
        for line in self.tlb.readers.iter().filter(|line| line.vcpu().is_some_and(&to)) {
            line.post(request);
        }
        crate::sync::full_fence();
        for line in self.tlb.readers.iter() {
            if let Some(vcpu) = line.vcpu().filter(|id| to(*id))
                && line.announcement().state() == State::InGuest
            {
                self.host.kick(vcpu);
            }
        }
    }
}

impl<H: Host> Drop for Inner<H> {
    fn drop(&mut self) {
        // No reader is left, so neither flush nor grace is owed: every page goes back at once.
        let line = Line::detached();
        for root in self.tdp.roots.drain() {
            self.tdp.free_all(self.env(), &line, &root);
        }
        let retired = self.reclaim.drain();
        self.tables().free_list(retired);
        let lost = self.tables().release_all();
        debug_assert_eq!(lost, 0, "table pages were lost");
    }
}

/// One translation of the second stage, as [`Vm::for_each_mapping`] shows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Mapping {
    /// The address space.
    pub space: AddressSpace,
    /// The first guest frame.
    pub gfn: Gfn,
    /// The first host frame.
    pub pfn: Pfn,
    /// The size of the page.
    pub size: PageSize,
    /// Whether the guest may write to it now.
    pub writable: bool,
}

impl<H: Host> Vm<H> {
    /// A VM without slots or vCPUs. Takes no table memory yet.
    pub fn new(host: H, config: Config) -> Result<Self, Error> {
        let format = Npt::new(config.five_levels(), config.phys_bits)?;
        if !(1..=2).contains(&config.address_spaces) {
            return Err(ConfigError::AddressSpaces(config.address_spaces).into());
        }
        if config.memory_limit < BLOCK_BYTES {
            return Err(ConfigError::MemoryLimit { limit: config.memory_limit, least: BLOCK_BYTES }.into());
        }
        let identity = Identity::new();
        Ok(Self {
            inner: Arc::new(Inner {
                host,
                tlb: Tlb::new(),
                arena: Arena::new(config.memory_limit, identity.number(), config.tables_below_4g),
                reclaim: Reclaim::new(),
                slots: Slots::new(config.address_spaces, format.max_gfn()),
                sequence: InvalidationSequence::new(),
                tdp: Tdp::new(format),
                dead: AtomicBool::new(false),
                next_vcpu: AtomicU32::new(0),
                config,
            }),
        })
    }

    /// The host that the VM was made with.
    pub fn host(&self) -> &H {
        &self.inner.host
    }

    /// A new vCPU, numbered from 0 in the order of these calls.
    pub fn vcpu(&self) -> Result<crate::Vcpu<H>, Error> {
        self.inner.alive()?;
        let id = VcpuId::new(self.inner.next_vcpu.fetch_add(1, Ordering::Relaxed));
        Ok(crate::Vcpu::new(OwnLine::new(self.inner.clone(), Some(id)), id))
    }

    /// A reader: guest memory of the ordinary address space for a thread that is no vCPU.
    pub fn reader(&self) -> Result<crate::Reader<H>, Error> {
        self.reader_in(AddressSpace::NORMAL)
    }

    /// A reader of `space`.
    ///
    /// # Errors
    /// [`SlotError::AddressSpace`] where the VM has none such.
    pub fn reader_in(&self, space: AddressSpace) -> Result<crate::Reader<H>, Error> {
        self.inner.alive()?;
        if space.number() >= self.inner.slots.spaces() {
            return Err(SlotError::AddressSpace(space.number()).into());
        }
        Ok(crate::Reader::new(OwnLine::new(self.inner.clone(), None), space))
    }

    /// A line for the length of one operation. Not to be called between an entry and its end: the operation would
    /// wait for the caller's own vCPU (checked in debug builds with `std`).
    pub(crate) fn own_line(&self) -> OwnLine<H> {
        OwnLine::new(self.inner.clone(), None)
    }

    /// Makes every vCPU leave the guest soon, or, where it is out, prepare before it enters. Does not wait. The
    /// vCPU's owner looks at what it was kicked for between [`crate::Vcpu::prepare`], which takes the request, and
    /// [`crate::Vcpu::enter`].
    pub fn kick_all(&self) {
        self.inner.post(Request::Exit, |_| true);
    }

    /// The same for one vCPU.
    pub fn kick(&self, vcpu: VcpuId) {
        self.inner.post(Request::Exit, |id| id == vcpu);
    }

    /// The statistics, now.
    pub fn stats(&self) -> Stats {
        let inner = &*self.inner;
        let mut stats = Stats::default();
        let now = inner.tlb.generation.now();
        for line in inner.tlb.readers.iter() {
            stats.add(&line.counters);
            let announced = line.announcement();
            if announced.state() == State::InGuest && announced.since() != 0 {
                stats.entry_age = stats.entry_age.max(now.saturating_sub(announced.since()));
            }
        }
        stats.settle_gauges();
        stats.pf_fixed = stats.pf_fixed_4k.wrapping_add(stats.pf_fixed_2m).wrapping_add(stats.pf_fixed_1g);
        stats.table_bytes = inner.arena.bytes();
        stats.table_pages_retired = inner.reclaim.waiting();
        stats.roots = inner.tdp.roots.all().len() as u64;
        stats.invalidations_open = inner.sequence.open();
        stats.invalidation_age = inner.sequence.open_since().map_or(0, |since| now.saturating_sub(since));
        stats
    }

    /// Shows every leaf of every valid root, in order of guest frames. Stops all faults meanwhile; `show` must not
    /// call the VM.
    pub fn for_each_mapping(&self, mut show: impl FnMut(Mapping)) -> Result<(), Error> {
        self.inner.alive()?;
        let own = self.own_line();
        let inner = &*self.inner;
        let exclusive = inner.tlb.lock.exclusive(&inner.tlb, own.line(), &inner.host);
        inner.tdp.for_each_entry(inner.env(), &exclusive, |visit| {
            if let (Entry::Leaf(leaf), Some(size)) = (visit.entry, PageSize::at(visit.level))
                && visit.root_is_valid
            {
                let writable = leaf.writable == Writable::Yes;
                show(Mapping { space: visit.space, gfn: visit.gfn, pfn: leaf.pfn, size, writable });
            }
            ControlFlow::Continue(())
        });
        Ok(())
    }
}

impl<H: Host> Clone for Vm<H> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<H: Host> fmt::Debug for Vm<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm")
            .field("slots", &self.inner.slots)
            .field("readers", &self.inner.tlb.readers)
            .field("config", &self.inner.config)
            .finish_non_exhaustive()
    }
}
