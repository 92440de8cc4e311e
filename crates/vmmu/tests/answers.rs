//! What answers come to that nothing is mapped by: a backing's refusals under an open invalidation, a table that comes
//! late, a VM that has died, a host that fails in the middle of a zap.

mod common;

use common::scene::{Asked, npf, orderly, pages, run, set, start, touch, vcpu, vm, word};
use common::{ChangingBacking, FIRST_FRAME, Page, TestHost};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use vmmu::trace::Event;
use vmmu::{Error, Gpa, Gva, Outcome, PageSize, PagingState, Pfn, ResolveRequest, Resolved};

/// M80: a backing need not say "writable" to a read; the audit must not take that for read-only.
#[test]
fn an_audit_asks_for_what_is_mapped() {
    let vm = vm(&TestHost::new());
    let backing = Asked(|page, request: ResolveRequest| {
        Ok(Resolved::new(Pfn::new((1 << 20) + page), PageSize::Size4K, request.write))
    });
    set(&vm, 0, 0, 16, Arc::new(backing));
    assert_eq!(touch(&mut vcpu(&vm), 3), Outcome::Resume);
    orderly(&vm);
}

/// T71, M71: no answer of a backing counts that an invalidation overtook: not "nothing is there" either.
#[test]
fn a_refusal_in_an_open_range_is_retried() {
    let vm = vm(&TestHost::new());
    let backing = Arc::new(ChangingBacking::default());
    set(&vm, 0, 0, 16, backing.clone());
    let mut vcpu = vcpu(&vm);
    let guard = vm.invalidate(pages(3, 1)).expect("alive");
    // The old page is gone, the new one not there yet.
    let outcome = touch(&mut vcpu, 3);
    let page = Page { pfn: Pfn::new(FIRST_FRAME), max_size: PageSize::Size4K, writable: true, slow: false };
    backing.pages.lock().expect("not poisoned").insert(3, page);
    drop(guard);
    assert_eq!(outcome, Outcome::Resume);
}

/// The same for a write to a page that is read-only for the moment.
#[test]
fn a_read_only_answer_in_an_open_range_is_retried() {
    let vm = vm(&TestHost::new());
    let backing = Arc::new(ChangingBacking::default());
    set(&vm, 0, 0, 16, backing.clone());
    let mut vcpu = vcpu(&vm);
    let guard = vm.invalidate(pages(3, 1)).expect("alive");
    let page = Page { pfn: Pfn::new(FIRST_FRAME), max_size: PageSize::Size4K, writable: false, slow: false };
    backing.pages.lock().expect("not poisoned").insert(3, page);
    let outcome = touch(&mut vcpu, 3);
    drop(guard);
    assert_eq!(outcome, Outcome::Resume);
}

/// And for software: it waits for the end.
#[test]
fn a_read_in_an_open_range_waits_also_where_nothing_is_there() {
    let vm = vm(&TestHost::new());
    let backing = Arc::new(ChangingBacking::default());
    set(&vm, 0, 0, 16, backing.clone());
    std::thread::scope(|s| {
        let guard = vm.invalidate(pages(3, 1)).expect("alive");
        let read = start(s, || vm.reader().expect("alive").read(Gpa::new(0x3000), &mut [0; 8]));
        let waits = read.waits();
        let page =
            Page { pfn: Pfn::new(FIRST_FRAME), max_size: PageSize::Size4K, writable: true, slow: false };
        backing.pages.lock().expect("not poisoned").insert(3, page);
        drop(guard);
        assert_eq!((waits, read.join()), (true, Ok(())));
    });
}

/// T87: one fault, counted once, also where its table came late.
#[test]
fn a_fault_whose_table_came_late_is_one_fault() {
    let host = TestHost::new();
    let vm = vm(&host);
    let n = 64 << 18;
    set(&vm, 0, 0, n, run(1 << 30, n));
    let mut vcpu = vcpu(&vm);
    let (weak, armed, calls) = (Arc::downgrade(&host), Arc::new(AtomicBool::new(false)), AtomicU64::new(0));
    let arm = armed.clone();
    host.on_alloc.set(move |()| {
        if arm.load(Relaxed) && calls.fetch_add(1, Relaxed) == 1 {
            weak.upgrade().expect("alive").fail_from(None);
        }
    });
    host.fail_from(Some(0));
    let mut g = 0;
    while vcpu.handle_fault(npf(g << 18, true)).is_ok() {
        g += 1;
    }
    let before = vm.stats().pf_taken;
    armed.store(true, Relaxed);
    host.fail_from(Some(0));
    assert_eq!(vcpu.handle_fault(npf(g << 18, true)), Ok(Outcome::Resume));
    assert_eq!(vm.stats().pf_taken, before + 1);
}

/// M136: a dead VM refuses everything, remembered instructions too.
#[test]
fn a_dead_vm_fetches_nothing() {
    let host = TestHost::new();
    let vm = vm(&host);
    let backing = Arc::new(ChangingBacking::default());
    let put = |n: u64, frame: u64, writable| {
        let page = Page { pfn: Pfn::new(frame), max_size: PageSize::Size4K, writable, slow: false };
        backing.pages.lock().expect("not poisoned").insert(n, page);
    };
    for n in 0..16 {
        put(n, FIRST_FRAME + n, n != 9);
    }
    set(&vm, 0, 0, 16, backing.clone());
    for level in 1..4 {
        word(&host, FIRST_FRAME + level, 0).store((level + 1) << 12 | 0x63, Relaxed);
    }
    word(&host, FIRST_FRAME + 4, 6).store(6 << 12 | 0x63, Relaxed);
    let mut vcpu = vcpu(&vm);
    vcpu.set_paging(PagingState::new(0x8001_0001, 0x1000, 0x20, 0xD00, 48));
    let gva = Gva::new(6 << 12);
    assert!(vcpu.fetch_instruction(gva).is_ok());
    vcpu.handle_fault(npf(9, false)).expect("backed");
    put(9, FIRST_FRAME + 99, true);
    let died = catch_unwind(AssertUnwindSafe(|| {
        let _ = vcpu.handle_fault(npf(9, true));
    }));
    assert!(died.is_err());
    assert_eq!(vcpu.handle_fault(npf(9, true)), Err(Error::Dead));
    assert!(vcpu.fetch(gva, &mut [0; 16]).is_err());
    assert!(vcpu.fetch_instruction(gva).is_err());
}

/// A panic in the host in the middle of `zap_all`: the next one must not hang.
#[test]
fn a_panic_in_a_zap() {
    let hits: [fn(Event) -> bool; 2] =
        [|event| event == Event::RootsInvalidated, |event| matches!(event, Event::RootZapped { .. })];
    for hit in hits {
        let host = TestHost::new();
        let vm = vm(&host);
        set(&vm, 0, 0, 16, run(1 << 20, 16));
        assert_eq!(touch(&mut vcpu(&vm), 3), Outcome::Resume);
        let fails = AtomicBool::new(true);
        host.on_trace.set(move |event| {
            assert!(!(hit(event) && fails.swap(false, Relaxed)), "the host's own failure");
        });
        assert!(catch_unwind(AssertUnwindSafe(|| vm.zap_all())).is_err());
        std::thread::scope(|s| start(s, || vm.zap_all().expect("alive")).join());
        orderly(&vm);
    }
}
