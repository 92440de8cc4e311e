//! What an open invalidation keeps away, case by case.

mod common;

use common::{ChangingBacking, Handle, Page, TestHost};
use std::sync::Arc;
use vmmu::{
    Backing, Config, Contiguous, Fault, Gfn, GfnRange, Gpa, Outcome, PageSize, Pfn, PhysCpu, Region, SlotId,
    TableFormat, TagSet, Vcpu, Vm,
};

const WRITE: u64 = 0x1_0000_0006;

fn vm(backing: Arc<dyn Backing>, pages: u64) -> (Vm<Handle>, Vcpu<Handle>) {
    let vm = Vm::new(Handle(TestHost::new()), Config::new(TableFormat::Npt4, 48)).expect("legal");
    vm.set_region(SlotId::new(0), Region::new(Gfn::new(0), pages, backing)).expect("valid");
    let mut vcpu = vm.vcpu().expect("alive");
    vcpu.prepare().expect("memory");
    (vm, vcpu)
}

/// Consecutive frames from `first`, for any slot of these tests.
fn run(first: u64) -> Contiguous {
    // SAFETY: the first frames are the host's own for guests; nobody reads or writes through the others.
    unsafe { Contiguous::new(Pfn::new(first), 1 << 19) }
}

fn pages(start: u64, count: u64) -> GfnRange {
    GfnRange::with_len(Gfn::new(start), count).expect("no wrap")
}

fn touch(vcpu: &mut Vcpu<Handle>, gfn: u64) -> Outcome {
    vcpu.prepare().expect("memory");
    vcpu.handle_fault(Fault::npf(Gpa::new(gfn << 12), WRITE)).expect("no error")
}

fn mapped(vm: &Vm<Handle>) -> Vec<(u64, PageSize)> {
    let mut all = Vec::new();
    vm.for_each_mapping(|m| all.push((m.gfn.raw(), m.size))).expect("alive");
    all
}

/// M71, PROTOCOLS 4: a fault on one page of a large block must not map, with the block, another page of it that
/// is being taken away; it gets the largest page that misses the range, and the block comes back afterwards.
#[test]
fn a_large_leaf_does_not_cover_an_open_range() {
    let smaller = [(PageSize::Size2M, 5, PageSize::Size4K), (PageSize::Size1G, 300_000, PageSize::Size2M)];
    for (size, page, beside) in smaller {
        let (vm, mut vcpu) = vm(Arc::new(run(1 << 20).max_size(size)), 1 << 19);
        let gfn = page / size.pages() * size.pages();
        let guard = vm.invalidate(pages(page, 1)).expect("alive");
        assert_eq!(touch(&mut vcpu, gfn), Outcome::Resume);
        assert_eq!(mapped(&vm), [(gfn, beside)]);
        assert_eq!(touch(&mut vcpu, page), Outcome::Resume);
        assert_eq!(mapped(&vm), [(gfn, beside)], "the page itself waits for the end");
        drop(guard);
        assert_eq!(touch(&mut vcpu, page), Outcome::Resume);
        assert_eq!(mapped(&vm), [(gfn, size)]);
        vm.audit().unwrap_or_else(|broken| panic!("{broken}"));
    }
}

/// T100: a large leaf that merely overlaps the range goes whole, and only that.
#[test]
fn a_large_leaf_goes_whole() {
    let backing = run(1 << 20).max_size(PageSize::Size2M);
    let (vm, mut vcpu) = vm(Arc::new(backing), 2048);
    for gfn in [0, 512, 1024] {
        assert_eq!(touch(&mut vcpu, gfn), Outcome::Resume);
    }
    drop(vm.invalidate(pages(700, 1)).expect("alive"));
    assert_eq!(mapped(&vm), [(0, PageSize::Size2M), (1024, PageSize::Size2M)]);
}

/// T84, T85: a backing that offers a larger page later gets a larger leaf with the next fault that needs one, and
/// the table that it replaces is gone; T121: one that offers a smaller page splits.
#[test]
fn tables_collapse_and_leaves_split() {
    let backing = Arc::new(ChangingBacking::default());
    let offer = |size, writable| {
        let mut all = backing.pages.lock().expect("not poisoned");
        for n in 0..512 {
            all.insert(n, Page { pfn: Pfn::new((1 << 20) + n), max_size: size, writable, slow: false });
        }
    };
    offer(PageSize::Size4K, true);
    let (vm, mut vcpu) = vm(backing.clone(), 512);
    assert_eq!(touch(&mut vcpu, 1), Outcome::Resume);
    assert_eq!(touch(&mut vcpu, 3), Outcome::Resume);
    offer(PageSize::Size2M, true);
    assert_eq!(touch(&mut vcpu, 7), Outcome::Resume);
    assert_eq!(mapped(&vm), [(0, PageSize::Size2M)]);
    let stats = vm.stats();
    assert_eq!((stats.pages_collapsed, stats.pages_4k, stats.pages_2m), (1, 0, 1));
    vm.audit().unwrap_or_else(|broken| panic!("{broken}"));
    // The same as a read-only large leaf, which a write then splits.
    drop(vm.invalidate(pages(0, 512)).expect("alive"));
    offer(PageSize::Size2M, false);
    vcpu.prepare().expect("memory");
    let read = Fault::npf(Gpa::new(0x9000), WRITE & !2);
    assert_eq!(vcpu.handle_fault(read).expect("no error"), Outcome::Resume);
    offer(PageSize::Size4K, true);
    assert_eq!(touch(&mut vcpu, 9), Outcome::Resume);
    let stats = vm.stats();
    assert_eq!((stats.pages_split, stats.pages_4k, stats.pages_2m), (1, 512, 0));
    let mut writable = Vec::new();
    vm.for_each_mapping(|m| writable.extend(m.writable.then_some(m.gfn.raw()))).expect("alive");
    assert_eq!(writable, [9]);
}

/// The guard of a thread and its own accesses: a hang in release builds, a panic in debug builds.
#[test]
#[cfg(all(debug_assertions, feature = "std"))]
#[should_panic(expected = "invalidation guards of the same thread")]
fn reading_under_ones_own_guard_is_caught() {
    let (vm, mut vcpu) = vm(Arc::new(run(common::FIRST_FRAME)), 16);
    let _guard = vm.invalidate(pages(3, 1)).expect("alive");
    let mut byte = [0];
    let _ = vcpu.read(Gpa::new(3 << 12), &mut byte);
}

/// PROTOCOLS 5: slots are not changed under a guard of the same thread.
#[test]
#[cfg(all(debug_assertions, feature = "std"))]
#[should_panic(expected = "under 1 invalidation guards")]
fn changing_slots_under_ones_own_guard_is_caught() {
    let (vm, _vcpu) = vm(Arc::new(run(1 << 20)), 16);
    let _guard = vm.invalidate(pages(3, 1)).expect("alive");
    let _ = vm.delete_region(SlotId::new(0));
}

/// PROTOCOLS 3: a shootdown between an entry and its end would wait for the caller's own vCPU.
#[test]
#[cfg(all(debug_assertions, feature = "std"))]
#[should_panic(expected = "between an entry and its end")]
fn operations_between_entry_and_end_are_caught() {
    let (vm, mut vcpu) = vm(Arc::new(run(1 << 20)), 16);
    let mut cpu = PhysCpu::new(TagSet::asids(8, true));
    let _entry = vcpu.enter(&mut cpu).expect("prepared");
    let _ = vm.zap_all();
}

/// PROTOCOLS 3: an entry that was forgotten is closed at the vCPU's next call; until then its age shows.
#[test]
fn a_forgotten_entry_is_closed_by_the_next_call() {
    let (vm, mut vcpu) = vm(Arc::new(run(1 << 20)), 16);
    let mut cpu = PhysCpu::new(TagSet::asids(8, true));
    vcpu.enter(&mut cpu).expect("prepared").ran();
    let tag = {
        let entry = vcpu.enter(&mut cpu).expect("prepared");
        let tag = entry.tag();
        std::mem::forget(entry);
        tag
    };
    vcpu.prepare().expect("memory");
    assert_eq!(vm.stats().entry_age, 0);
    vm.zap_all().expect("nobody is in the guest");
    vcpu.prepare().expect("memory");
    let entry = vcpu.enter(&mut cpu).expect("prepared");
    assert_ne!(entry.tag(), tag, "nothing is known of the tag that the forgotten entry had");
}

/// M24: after a change of slots every vCPU comes out before it enters again.
#[test]
fn a_slot_change_reaches_every_vcpu() {
    let (vm, mut vcpu) = vm(Arc::new(run(1 << 20)), 16);
    let mut cpu = PhysCpu::new(TagSet::asids(8, true));
    vcpu.enter(&mut cpu).expect("prepared").ran();
    let other = Region::new(Gfn::new(64), 16, Arc::new(run(1 << 21)));
    vm.set_region(SlotId::new(1), other).expect("valid");
    assert!(vcpu.enter(&mut cpu).is_err());
    vcpu.prepare().expect("memory");
    assert!(vcpu.enter(&mut cpu).is_ok());
}
