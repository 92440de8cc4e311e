//! What the paths of a vCPU cost in full fences and locked operations, and that remembered walks tell the truth.

use super::*;
use crate::addr::{Gfn, Gpa, Gva, Hpa, PageSize, Pfn};
use crate::arch::fault::Fault;
use crate::host::Contiguous;
use crate::memory::{Region, RegionFlags};
use crate::names::SlotId;
use crate::sync::cost;
use crate::testing::QuietHost;
use crate::tlb::tag::{PhysCpu, TagSet};
use crate::vm::Vm;
use crate::vm::config::{Config, TableFormat};
use core::fmt::Write;
use std::boxed::Box;
use std::string::String;
use std::vec::Vec;

const WRITE: u64 = 0x1_0000_0006;

fn vm() -> Vm<QuietHost> {
    // The quiet host's tables are wherever the allocator puts them: addresses of a process need 47 bits.
    let vm = Vm::new(QuietHost::new(), Config::new(TableFormat::Npt4, 51)).expect("legal");
    let region = |first, pages, size| {
        // SAFETY: nobody reads or writes through these frames.
        let backing = unsafe { Contiguous::new(Pfn::new(1 << 20), pages) }.max_size(size);
        Region::new(Gfn::new(first), pages, Arc::new(backing))
    };
    vm.set_region(SlotId::new(0), region(0, 1 << 18, PageSize::Size4K)).expect("valid");
    vm.set_region(SlotId::new(1), region(1 << 20, 1 << 18, PageSize::Size2M)).expect("valid");
    vm
}

/// The table that readers of the documentation and of the benchmark see: one row a path.
#[test]
fn fences_and_locked_operations_of_each_path() {
    let vm = vm();
    let mut vcpu = vm.vcpu().expect("alive");
    let mut cpu = PhysCpu::new(TagSet::asids(16, true));
    vcpu.prepare().expect("memory");
    let mut rows: Vec<(&str, u64, u64)> = Vec::new();
    let mut row = |name, vcpu: &mut Vcpu<QuietHost>, gpa: u64, code| {
        vcpu.prepare().expect("memory");
        let (outcome, fences, locked) = cost::of(|| vcpu.handle_fault(Fault::npf(Gpa::new(gpa), code)));
        outcome.expect("memory");
        rows.push((name, fences, locked));
    };
    row("first touch, all tables to link", &mut vcpu, 0, WRITE);
    row("first touch of 4 KiB", &mut vcpu, 0x1000, WRITE);
    row("first touch with a new leaf table", &mut vcpu, 0x20_0000, WRITE);
    row("first touch of 2 MiB, all tables to link", &mut vcpu, 1 << 32, WRITE);
    row("first touch of 2 MiB", &mut vcpu, (1 << 32) + (4 << 20), WRITE);
    row("spurious", &mut vcpu, 0x1000, WRITE);
    row("no slot, first time", &mut vcpu, 0x8000_1000, WRITE);
    row("no slot, again", &mut vcpu, 0x8000_1000, WRITE | 8);
    vcpu.prepare().expect("memory");
    let ((), fences, locked) = cost::of(|| vcpu.enter(&mut cpu).expect("prepared").ran());
    rows.push(("entry and exit", fences, locked));
    let mut guest = Guest::new();
    for name in ["instruction fetched, first time", "instruction fetched, again"] {
        let (page, fences, locked) = cost::of(|| guest.page_behind(6));
        assert_eq!(page, Some(6));
        rows.push((name, fences, locked));
    }
    let mut table = String::new();
    for (name, fences, locked) in &rows {
        writeln!(table, "{name}\t{fences}\t{locked}").expect("strings take everything");
    }
    // The design's bound: a first touch that finds its table has at most three of both together.
    assert_eq!(table, include_str!("../../fences.tsv"), "fences.tsv is to be:\n{table}");
    assert!(rows.iter().filter(|r| r.0 == "first touch of 4 KiB").all(|r| r.1 + r.2 <= 3));
}

/// PROTOCOLS 3: the root is looked at again after *in guest* is announced, whatever the requests say: a processor never
/// loads one that was invalidated before its entry.
#[test]
fn a_root_that_died_turns_an_entry_away() {
    let vm = vm();
    let mut vcpu = vm.vcpu().expect("alive");
    let mut cpu = PhysCpu::new(TagSet::asids(16, true));
    vcpu.prepare().expect("memory");
    let inner = &*vm.inner;
    let own = vm.own_line();
    let exclusive = inner.tlb.lock.exclusive(&inner.tlb, own.line(), &inner.host);
    inner.tdp.roots.invalidate_all(&exclusive);
    assert!(vcpu.enter(&mut cpu).is_err(), "an invalid root was entered");
    assert!(vcpu.own.line().is_out());
    drop(exclusive);
    vcpu.prepare().expect("memory");
    vcpu.enter(&mut cpu).expect("prepared").ran();
    vm.zap_all().expect("alive");
    assert_eq!(vm.stats().roots, 0);
}

/// PROTOCOLS 5: an MMIO hit reads the generation before the entry. Wherever a wrap ends in the middle of a fault, its
/// zap first, an entry from before it is not taken for one of the generation that begins.
#[test]
#[cfg(feature = "instrument")]
fn an_mmio_hit_reads_the_generation_first() {
    use crate::instrument::{Scheduler, with_scheduler};
    use core::cell::Cell;

    struct Once<'a>(Cell<u32>, &'a dyn Fn());
    impl Scheduler for Once<'_> {
        fn task(&self) -> usize {
            0
        }
        fn step(&self) {
            let left = self.0.get();
            self.0.set(left.saturating_sub(1));
            if left == 1 {
                (self.1)();
            }
        }
        fn relax(&self) {}
        fn drain(&self) -> Option<usize> {
            None
        }
        fn holds_back(&self) -> bool {
            false
        }
    }

    const IN_PROGRESS: u64 = 1 << 63;
    let fault = Fault::npf(Gpa::new(0x8000_1000), WRITE);
    let gfn = fault.gpa().gfn();
    for access in 1.. {
        let vm = vm();
        let mut vcpu = vm.vcpu().expect("alive");
        vcpu.prepare().expect("memory");
        let inner = &*vm.inner;
        let new = inner.slots.write().set(AddressSpace::NORMAL).generation().for_mmio();
        vcpu.handle_fault(fault).expect("memory");
        let set = |generation| inner.slots.write().set_generation(AddressSpace::NORMAL, generation);
        set(IN_PROGRESS | u64::from(new - 1));
        let (own, root) = (vm.own_line(), vcpu.root.clone().expect("prepared"));
        let wrap_ends = || {
            let walking = own.line().walk(&inner.tlb);
            let at = inner.tdp.walk(inner.env(), &root, gfn, crate::addr::Level::L1, &walking);
            at.cell.swap(inner.tdp.format.empty());
            set(u64::from(new));
        };
        let once = Once(Cell::new(access), &wrap_ends);
        with_scheduler(&once, || vcpu.handle_fault(fault).expect("memory"));
        assert_eq!(vm.stats().pf_mmio_hit, 0, "a stale entry answered, before access {access}");
        if once.0.get() != 0 {
            assert!(access > 10, "{access} accesses");
            set(u64::from(new));
            break;
        }
    }
}

/// Guest tables of four levels that map `pages` pages from gva 0, and the memory they lie in.
struct Guest {
    vm: Vm<QuietHost>,
    vcpu: Vcpu<QuietHost>,
    memory: Box<[Frame]>,
}

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Frame([u64; 512]);

impl Guest {
    fn new() -> Self {
        let mut memory = std::vec![Frame([0; 512]); 16].into_boxed_slice();
        for level in 1..4u64 {
            memory[level as usize].0[0] = (level + 1) << 12 | 0x63;
        }
        for page in 0..16u64 {
            memory[4].0[page as usize] = page << 12 | 0x63;
            memory[page as usize].0[500] = page;
        }
        let vm = Vm::new(QuietHost::new(), Config::new(TableFormat::Npt4, 51)).expect("legal");
        let mut this = Self { vcpu: vm.vcpu().expect("alive"), vm, memory };
        this.slot(0);
        *this.vcpu.paging_mut() = PagingState::new(0x8001_0001, 0x1000, 0x20, 0xD00, 51);
        this
    }
    fn backing(&self) -> Arc<Contiguous> {
        // SAFETY: the memory lives as long as the VM.
        Arc::new(unsafe { Contiguous::new(Hpa::new(self.memory.as_ptr() as u64).pfn(), 16) })
    }
    fn slot(&mut self, first: u64) {
        let region = Region::new(Gfn::new(first), 16, self.backing()).flags(RegionFlags::READ_ONLY);
        self.vm.set_region(SlotId::new(0), region).expect("valid");
    }
    /// The page number that the marker on the page behind `gva` tells.
    fn page_behind(&mut self, gva_page: u64) -> Option<u64> {
        let gva = Gva::new((gva_page << 12) + 500 * 8);
        let bytes = self.vcpu.fetch_instruction(gva).ok()?;
        Some(u64::from_le_bytes(bytes[..8].try_into().expect("eight")))
    }
    fn set_entry(&mut self, level: usize, index: usize, value: u64) {
        let at = Gpa::new((5 - level as u64) << 12 | 8 * index as u64);
        let cell = &raw mut self.memory[at.gfn().raw() as usize].0[index];
        // SAFETY: the test owns the memory; no guest runs.
        unsafe { cell.write_volatile(value) };
    }
}

/// A remembered walk answers only what a new one would: after a change of a leaf, of an upper entry, of a
/// register, of a slot, and after an invalidation.
#[test]
fn remembered_walks_never_lie() {
    let mut guest = Guest::new();
    for round in 0..3 {
        assert_eq!(guest.page_behind(6), Some(6), "round {round}");
    }
    // The leaf changes, without any flush that the hypervisor could see.
    guest.set_entry(1, 6, 7 << 12 | 0x63);
    assert_eq!(guest.page_behind(6), Some(7));
    assert_eq!(guest.page_behind(6), Some(7));
    // An upper entry goes away and comes back.
    guest.set_entry(2, 0, 0);
    assert_eq!(guest.page_behind(6), None);
    guest.set_entry(2, 0, 4 << 12 | 0x63);
    assert_eq!(guest.page_behind(6), Some(7));
    // No-execute appears in the leaf; then user code may not fetch a supervisor's page.
    guest.set_entry(1, 6, 1 << 63 | 7 << 12 | 0x63);
    assert_eq!(guest.page_behind(6), None);
    guest.set_entry(1, 6, 7 << 12 | 0x63);
    assert_eq!(guest.page_behind(6), Some(7));
    guest.vcpu.paging_mut().cpl = 3;
    assert_eq!(guest.page_behind(6), None);
    guest.vcpu.paging_mut().cpl = 0;
    assert_eq!(guest.page_behind(6), Some(7));
    // Another root: page 5 holds no table.
    guest.vcpu.paging_mut().cr3 = 0x5000;
    assert_eq!(guest.page_behind(6), None);
    guest.vcpu.paging_mut().cr3 = 0x1000;
    assert_eq!(guest.page_behind(6), Some(7));
    // An invalidation in between: the walk is made anew, and remembered anew.
    let range = crate::addr::GfnRange::with_len(Gfn::new(7), 1).expect("in range");
    drop(guest.vm.invalidate(range).expect("alive"));
    assert_eq!(guest.page_behind(6), Some(7));
    // The slot goes away.
    guest.vm.delete_region(SlotId::new(0)).expect("there");
    assert_eq!(guest.page_behind(6), None);
    guest.slot(0);
    assert_eq!(guest.page_behind(6), Some(7));
}

/// What is remembered costs one fence and no walk.
#[test]
fn a_remembered_walk_costs_one_fence() {
    let mut guest = Guest::new();
    let (_, fences, _) = cost::of(|| guest.page_behind(6));
    assert!(fences > 5, "the first fetch walks: {fences} fences");
    let (page, fences, locked) = cost::of(|| guest.page_behind(6));
    assert_eq!((page, fences, locked), (Some(6), 1, 0));
}
