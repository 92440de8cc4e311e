//! Seeded histories of faults, slot changes, invalidations and zaps against a VM, with an audit after each
//! round and a reference model of what the guest may see; and short histories with every n-th allocation
//! failing.

mod common;

use common::{ChangingBacking, Handle, Page, Random, TestHost};
use std::collections::BTreeMap;
use std::sync::Arc;
use vmmu::{
    Backing, Config, Contiguous, Error, Fault, Gfn, GfnRange, Gpa, Level, Outcome, PageSize, Pfn, PhysCpu,
    Region, RegionFlags, SlotError, SlotId, TableFormat, TagSet, Vcpu, Vm,
};

/// Guest frames that histories use: 4 GiB, so that 1 GiB pages occur.
const GUEST_PAGES: u64 = 4 << 18;
const SLOTS: u16 = 6;

struct Slot {
    gfn: u64,
    pages: u64,
    read_only: bool,
    backing: Arc<dyn Backing>,
    /// The same, where its pages can change.
    changing: Option<Arc<ChangingBacking>>,
    /// The first frame, where they cannot.
    first: u64,
}

impl Slot {
    fn page(&self, page: u64) -> Option<Page> {
        match &self.changing {
            Some(backing) => backing.page(page),
            None => Some(Page {
                pfn: Pfn::new(self.first + page),
                // The backing offers less near its ends; what is mapped is checked against the slot.
                max_size: PageSize::Size1G,
                writable: true,
                slow: false,
            }),
        }
    }
}

/// One history: the VM, and what the model knows of it.
struct World {
    vm: Vm<Handle>,
    vcpus: Vec<Vcpu<Handle>>,
    cpus: Vec<PhysCpu>,
    slots: BTreeMap<u16, Slot>,
    random: Random,
    next_frame: u64,
}

fn npf(gfn: u64, write: bool, fetch: bool) -> Fault {
    let code = 1 << 32 | 4 | u64::from(write) << 1 | u64::from(fetch) << 4;
    Fault::npf(Gpa::new(gfn << 12), code)
}

impl World {
    fn new(host: &Arc<TestHost>, seed: u64) -> Result<Self, Error> {
        let mut random = Random::new(seed);
        let format = if random.one_in(3) { TableFormat::Npt5 } else { TableFormat::Npt4 };
        let mut config = Config::new(format, 40 + random.below(8) as u8);
        if random.one_in(4) {
            config = config.memory_limit(1 << 21);
        }
        let vm = Vm::new(Handle(host.clone()), config)?;
        let vcpus = (0..3).map(|_| vm.vcpu()).collect::<Result<_, _>>()?;
        let cpus = (0..2).map(|n| PhysCpu::new(TagSet::asids(5, n == 0))).collect();
        Ok(Self { vm, vcpus, cpus, slots: BTreeMap::new(), random, next_frame: 0x20_0000 })
    }

    /// Fresh host frames; large ones aligned.
    fn frames(&mut self, count: u64, align: u64) -> u64 {
        let first = self.next_frame.next_multiple_of(align);
        self.next_frame = first + count;
        first
    }

    /// Changes what stands behind `page`, and nothing outside the 2 MiB block of guest frames around it: one
    /// large page, small ones, a single one, or a hole.
    fn back(&mut self, slot: &Slot, page: u64) {
        let Some(backing) = &slot.changing else { return };
        let writable = !self.random.one_in(8);
        let slow = self.random.one_in(5);
        let block = GfnRange::block(Gfn::new(slot.gfn + page), Level::L2);
        let inside = block.intersect(GfnRange::with_len(Gfn::new(slot.gfn), slot.pages).expect("in range"));
        let whole = inside == block;
        let all = inside.start().raw() - slot.gfn..inside.end().raw() - slot.gfn;
        let (pages, max_size) = match self.random.below(8) {
            0..=3 if whole => (all, PageSize::Size2M),
            4 => (all, PageSize::Size4K),
            _ => (page..page + 1, PageSize::Size4K),
        };
        let hole = max_size == PageSize::Size4K && self.random.one_in(4);
        let first = self.frames(512, 512);
        let mut map = backing.pages.lock().expect("not poisoned");
        for n in pages.clone() {
            // A large page that loses a part is large no more.
            if let Some(old) = map.get(&n).copied().filter(|old| old.max_size > PageSize::Size4K) {
                let large = old.pfn.align_down(Level::L2);
                for other in map.values_mut().filter(|other| other.pfn.align_down(Level::L2) == large) {
                    other.max_size = PageSize::Size4K;
                }
            }
            let pfn = Pfn::new(first + n - pages.start);
            if hole {
                map.remove(&n);
            } else {
                map.insert(n, Page { pfn, max_size, writable, slow });
            }
        }
    }

    fn fault(&mut self) -> Result<(), Error> {
        let vcpu = self.random.below(self.vcpus.len() as u64) as usize;
        let (write, fetch) = (self.random.one_in(2), self.random.one_in(4));
        // Mostly inside slots, and mostly near their start, so that faults meet.
        let gfn = match self.random.below(8) {
            // Few places, so that MMIO entries are hit, and far apart, so that each needs a table.
            0 | 1 => self.random.below(256) * (GUEST_PAGES / 256) + 77,
            2 if self.random.one_in(4) => (1 << 36) + self.random.below(1 << 20),
            _ => {
                let n = self.random.below(u64::from(SLOTS)) as u16;
                match self.slots.get(&n) {
                    Some(slot) => {
                        let (gfn, pages) = (slot.gfn, slot.pages.min(2048));
                        gfn + self.random.below(pages)
                    }
                    None => self.random.below(GUEST_PAGES),
                }
            }
        };
        self.vcpus[vcpu].prepare()?;
        let outcome = self.vcpus[vcpu].handle_fault(npf(gfn, write, fetch && !write))?;
        let slot = self.slots.values().find(|s| s.gfn <= gfn && gfn < s.gfn + s.pages);
        let page = slot.and_then(|s| s.page(gfn - s.gfn));
        match (slot, page) {
            (None, _) => assert!(matches!(outcome, Outcome::Mmio(_)), "{gfn:#x}: {outcome:?}"),
            (Some(s), _) if s.read_only && write => assert!(matches!(outcome, Outcome::ReadOnlyWrite(_))),
            (Some(_), None) => assert!(matches!(outcome, Outcome::MemoryFault(_)), "{gfn:#x}: {outcome:?}"),
            (Some(_), Some(p)) if write && !p.writable => {
                assert!(matches!(outcome, Outcome::ReadOnlyWrite(_)), "{gfn:#x}: {outcome:?}");
            }
            (Some(_), Some(_)) => assert_eq!(outcome, Outcome::Resume, "{gfn:#x}"),
        }
        Ok(())
    }

    fn change_slot(&mut self) -> Result<(), Error> {
        let n = self.random.below(u64::from(SLOTS)) as u16;
        let id = SlotId::new(n);
        let gfn = self.random.below(GUEST_PAGES);
        let gfn = if self.random.one_in(2) { gfn & !511 } else { gfn };
        if let Some(slot) = self.slots.get(&n) {
            if self.random.one_in(2) {
                self.vm.delete_region(id)?;
                self.slots.remove(&n);
            } else {
                let region = Region::new(Gfn::new(gfn), slot.pages, slot.backing.clone());
                let flags = if slot.read_only { RegionFlags::READ_ONLY } else { RegionFlags::empty() };
                match self.vm.set_region(id, region.flags(flags)) {
                    // Pages were given for the old place: large ones need the new one to be as aligned.
                    Ok(()) => {
                        let slot = self.slots.get_mut(&n).expect("it was there");
                        slot.gfn = gfn;
                    }
                    Err(Error::Slot(SlotError::Overlaps(_))) => {}
                    Err(error) => return Err(error),
                }
            }
            return Ok(());
        }
        let huge = self.random.one_in(4);
        let pages = 1 + self.random.below(if huge { 1 << 20 } else { 3000 });
        let (backing, changing, first): (Arc<dyn Backing>, _, _) = if huge {
            // Congruent modulo 1 GiB, so that the largest pages occur.
            let first = self.frames(pages + (1 << 18), 1 << 18) + gfn % (1 << 18);
            // SAFETY: nobody reads or writes through these frames.
            (Arc::new(unsafe { Contiguous::new(Pfn::new(first), pages) }), None, first)
        } else {
            let changing = Arc::new(ChangingBacking::default());
            (changing.clone(), Some(changing), 0)
        };
        let read_only = self.random.one_in(5);
        let flags = if read_only { RegionFlags::READ_ONLY } else { RegionFlags::empty() };
        match self.vm.set_region(id, Region::new(Gfn::new(gfn), pages, backing.clone()).flags(flags)) {
            Ok(()) => {
                let slot = Slot { gfn, pages, read_only, backing, changing, first };
                for _ in 0..8 {
                    let page = self.random.below(pages.min(2048));
                    self.back(&slot, page);
                }
                self.slots.insert(n, slot);
            }
            Err(Error::Slot(SlotError::Overlaps(_))) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn invalidate(&mut self) -> Result<(), Error> {
        let n = self.random.below(u64::from(SLOTS)) as u16;
        let Some(slot) = self.slots.remove(&n) else { return Ok(()) };
        let result = self.invalidate_in(&slot);
        self.slots.insert(n, slot);
        result
    }

    fn invalidate_in(&mut self, slot: &Slot) -> Result<(), Error> {
        let page = self.random.below(slot.pages.min(2048));
        // A block that is whole is replaced whole, so the range covers it.
        let block = GfnRange::block(Gfn::new(slot.gfn + page), Level::L2);
        let vm = self.vm.clone();
        let guard = vm.invalidate(block)?;
        self.back(slot, page);
        // Under the guard a fault in the range is retried and maps nothing.
        self.vcpus[0].prepare()?;
        let outcome = self.vcpus[0].handle_fault(npf(slot.gfn + page, false, false))?;
        if slot.page(page).is_some() {
            assert_eq!(outcome, Outcome::Resume);
        }
        vm.for_each_mapping(|m| {
            let mapped = GfnRange::with_len(m.gfn, m.size.pages()).expect("in range");
            assert!(!mapped.overlaps(block), "{m:?} under an open invalidation of {block:?}");
        })?;
        drop(guard);
        Ok(())
    }

    fn run_guest(&mut self) -> Result<(), Error> {
        let v = self.random.below(self.vcpus.len() as u64) as usize;
        let c = self.random.below(self.cpus.len() as u64) as usize;
        let vcpu = &mut self.vcpus[v];
        if !self.random.one_in(3) {
            vcpu.prepare()?;
        }
        if let Ok(entry) = vcpu.enter(&mut self.cpus[c]) {
            match self.random.below(4) {
                0 => drop(entry),
                1 => std::mem::forget(entry),
                _ => entry.ran(),
            }
        }
        // A forgotten entry is closed at the vCPU's next call; nothing else may wait for it in one thread.
        vcpu.prepare()
    }

    fn round(&mut self) -> Result<(), Error> {
        match self.random.below(16) {
            0 if self.random.one_in(2) => self.change_slot(),
            1 | 2 => self.invalidate(),
            3 if self.random.one_in(16) => self.vm.zap_all(),
            4 | 5 => self.run_guest(),
            _ => self.fault(),
        }
    }

    /// The audit, and every mapping against the model.
    fn check(&self) {
        let report = self.vm.audit().unwrap_or_else(|broken| panic!("{broken}"));
        let mut leaves = 0;
        self.vm
            .for_each_mapping(|m| {
                leaves += 1;
                let gfn = m.gfn.raw();
                let slot = self
                    .slots
                    .values()
                    .find(|s| s.gfn <= gfn && gfn + m.size.pages() <= s.gfn + s.pages)
                    .unwrap_or_else(|| panic!("{m:?} lies in no slot"));
                let page = slot.page(gfn - slot.gfn).unwrap_or_else(|| panic!("{m:?} has no page"));
                assert_eq!(page.pfn, m.pfn, "{m:?}");
                assert!(m.size <= page.max_size, "{m:?}: {page:?}");
                assert!(!m.writable || (page.writable && !slot.read_only), "{m:?}: {page:?}");
            })
            .expect("alive");
        assert_eq!(report.leaves.iter().sum::<u64>(), leaves);
        let held = report.roots + report.tables + report.free + report.cached + report.retired;
        assert_eq!(held, report.pages, "every table page is in one place: {report:?}");
    }
}

/// T71–T108, M6–M25, M66–M73: ten thousand rounds, an audit and a comparison with the model after each, and
/// every block of tables accounted for at the end.
#[test]
fn ten_thousand_rounds() {
    let (mut fixed, mut spurious, mut hits, mut large, mut giant) = (0, 0, 0, 0, 0);
    for seed in 0..20 {
        let host = TestHost::new();
        let mut world = World::new(&host, seed).expect("memory");
        for round in 0..500 {
            world.round().unwrap_or_else(|error| match error {
                // Some seeds have a limit.
                Error::MemoryLimit { .. } => {}
                error => panic!("seed {seed}, round {round}: {error}"),
            });
            world.check();
        }
        let stats = world.vm.stats();
        fixed += stats.pf_fixed;
        spurious += stats.pf_spurious;
        hits += stats.pf_mmio_hit;
        large += stats.pf_fixed_2m;
        giant += stats.pf_fixed_1g;
        drop(world);
        assert_eq!(host.blocks_out(), 0, "seed {seed}: blocks of tables left at the end");
    }
    // The histories did what they are for.
    let did = [fixed, spurious, hits, large, giant];
    let floor = [1000, 300, 20, 300, 10];
    assert!(did.iter().zip(floor).all(|(did, floor)| *did > floor), "{did:?} against {floor:?}");
}

/// M158: for every n, a short history with the n-th allocation failing: the error is out-of-memory, the VM
/// stays in order, goes on once there is memory, and gives everything back.
#[test]
fn every_allocation_may_fail() {
    const ROUNDS: usize = 600;
    let mut noticed = 0;
    for seed in 100..104 {
        let host = TestHost::new();
        host.fail_from(None);
        let mut world = World::new(&host, seed).expect("memory");
        for _ in 0..ROUNDS {
            let _ = world.round();
        }
        drop(world);
        let needed = host.allocations();
        assert!(needed >= 2, "seed {seed} allocates {needed} blocks");
        for n in 0..needed {
            let host = TestHost::new();
            let mut world = World::new(&host, seed).expect("no memory is needed yet");
            host.fail_from(Some(n));
            let mut failed = 0;
            for round in 0..ROUNDS {
                match world.round() {
                    Ok(()) | Err(Error::MemoryLimit { .. }) => {}
                    Err(Error::OutOfMemory) => failed += 1,
                    Err(error) => panic!("seed {seed}, allocation {n}, round {round}: {error}"),
                }
                world.check();
            }
            // Where retired tables could be had instead, nobody noticed; but the host was asked.
            assert!(host.allocations() > n, "seed {seed}: allocation {n} of {needed} was never asked for");
            noticed += failed;
            host.fail_from(None);
            for _ in 0..20 {
                match world.round() {
                    Ok(()) | Err(Error::MemoryLimit { .. }) => {}
                    Err(error) => panic!("seed {seed}, allocation {n}, with memory again: {error}"),
                }
                world.check();
            }
            drop(world);
            assert_eq!(host.blocks_out(), 0);
        }
    }
    assert!(noticed > 20, "only {noticed} failures came out as errors");
}
