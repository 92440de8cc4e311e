//! Who waits for whom when memory changes hands (PROTOCOLS 4): sections, open ranges, tables and frames, each rule
//! with the one interleaving that shows it broken.

mod common;

use common::scene::{
    Asked, Gate, mapped, npf, orderly, pages, run, set, small, start, touch, vcpu, vm, word,
};
use common::{ChangingBacking, FIRST_FRAME, Handle, Page, TestHost};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::scope;
use vmmu::trace::Event;
use vmmu::{Error, Gpa, Gva, Outcome, PageSize, PagingState, Pfn, Resolved, Vm};

/// A slot from guest frame 0 whose page `n` is the host's frame `n`, until `frame` says otherwise.
fn changing(vm: &Vm<Handle>, count: u64) -> Arc<ChangingBacking> {
    let backing = Arc::new(ChangingBacking::default());
    for n in 0..count {
        frame(&backing, n, FIRST_FRAME + n);
    }
    set(vm, 0, 0, count, backing.clone());
    backing
}

/// A slot of 16 pages from guest frame 0 whose backing waits: asked so for the first time, it answers after a whole
/// invalidation of the page with the frame from before it; the page is 100 frames further by then.
fn outlived(vm: &Vm<Handle>) {
    let (moved, other) = (AtomicBool::new(false), Mutex::new(Some(vm.clone())));
    let backing = Asked(move |page, request: vmmu::ResolveRequest| {
        let old = FIRST_FRAME + page;
        match other.lock().expect("not poisoned").take_if(|_| request.may_wait) {
            Some(vm) => {
                // Allowed where it may wait: nothing is held.
                let guard = vm.invalidate(pages(page, 1)).expect("alive");
                moved.store(true, Relaxed);
                drop(guard);
                small(old)
            }
            None if moved.load(Relaxed) => small(old + 100),
            None => Err(vmmu::ResolveError::WouldWait),
        }
    });
    set(vm, 0, 0, 16, Arc::new(backing));
}

/// Puts `frame` behind `page`.
fn frame(backing: &ChangingBacking, page: u64, frame: u64) {
    let new = Page { pfn: Pfn::new(frame), max_size: PageSize::Size4K, writable: true, slow: false };
    backing.pages.lock().expect("not poisoned").insert(page, new);
}

fn read(vm: &Vm<Handle>, gfn: u64) -> u64 {
    let mut bytes = [0; 8];
    vm.reader().expect("alive").read(Gpa::new(gfn << 12), &mut bytes).expect("backed");
    u64::from_le_bytes(bytes)
}

/// PROTOCOLS 4: `invalidate` returns only when every section announced before has ended: here a thread that has the
/// frame in its hands. Also where nothing was mapped, since software needs no entry.
#[test]
fn an_invalidation_waits_for_software() {
    for touched in [true, false] {
        let host = TestHost::new();
        let vm = vm(&host);
        set(&vm, 0, 0, 16, run(FIRST_FRAME, 16));
        if touched {
            assert_eq!(touch(&mut vcpu(&vm), 3), Outcome::Resume);
        }
        let gate = Gate::new();
        let stop = gate.clone();
        host.on_frame.set(move |_| stop.stop());
        scope(|s| {
            let reader = start(s, || read(&vm, 3));
            gate.reached();
            let invalidation = start(s, || drop(vm.invalidate(pages(3, 1)).expect("alive")));
            assert!(invalidation.waits(), "the frame was given back while it was read (mapped: {touched})");
            gate.open();
            reader.join();
            invalidation.join();
        });
        orderly(&vm);
    }
}

/// PROTOCOLS 4: the same for a fault that has resolved a frame and not mapped it yet.
#[test]
fn an_invalidation_waits_for_faults() {
    let host = TestHost::new();
    let vm = vm(&host);
    let gate = Gate::new();
    let stop = gate.clone();
    let backing = Asked(move |page, _| {
        stop.stop();
        small(FIRST_FRAME + page)
    });
    set(&vm, 0, 0, 16, Arc::new(backing));
    let mut faulting = vcpu(&vm);
    scope(|s| {
        let fault = start(s, || touch(&mut faulting, 3));
        gate.reached();
        let invalidation = start(s, || drop(vm.invalidate(pages(3, 1)).expect("alive")));
        assert!(invalidation.waits(), "a frame that a fault is about to map was given back");
        gate.open();
        assert_eq!(fault.join(), Outcome::Resume);
        invalidation.join();
    });
    assert_eq!(mapped(&vm), [], "the fault saw the open range");
    orderly(&vm);
}

/// PROTOCOLS 4, M71: while a range is open software gets none of its frames; it waits, and reads what is there
/// after the end.
#[test]
fn software_waits_for_the_end() {
    let host = TestHost::new();
    let vm = vm(&host);
    let backing = changing(&vm, 16);
    word(&host, FIRST_FRAME + 3, 0).store(0xAAAA, Relaxed);
    word(&host, FIRST_FRAME + 100, 0).store(0xBBBB, Relaxed);
    scope(|s| {
        let guard = vm.invalidate(pages(3, 1)).expect("alive");
        let reader = start(s, || read(&vm, 3));
        assert!(reader.waits(), "a frame was read that the host is taking away");
        frame(&backing, 3, FIRST_FRAME + 100);
        drop(guard);
        assert_eq!(reader.join(), 0xBBBB);
    });
}

/// M72, PROTOCOLS 4: a read whose backing waited uses its answer only where no invalidation ended meanwhile.
#[test]
fn software_drops_an_answer_that_an_invalidation_outlived() {
    let host = TestHost::new();
    let vm = vm(&host);
    outlived(&vm);
    word(&host, FIRST_FRAME + 3, 0).store(0xAAAA, Relaxed);
    word(&host, FIRST_FRAME + 103, 0).store(0xBBBB, Relaxed);
    assert_eq!(read(&vm, 3), 0xBBBB, "a frame was read that was given back");
}

/// PROTOCOLS 4: a remembered walk holds frames as well: none is used while a range is open, nor after its end.
#[test]
fn a_remembered_walk_waits_for_the_end() {
    let host = TestHost::new();
    let vm = vm(&host);
    let backing = changing(&vm, 16);
    // Tables of four levels at guest frames 1 to 4, which map guest-virtual page 6 to guest frame 6.
    for level in 1..4 {
        word(&host, FIRST_FRAME + level, 0).store((level + 1) << 12 | 0x63, Relaxed);
    }
    word(&host, FIRST_FRAME + 4, 6).store(6 << 12 | 0x63, Relaxed);
    word(&host, FIRST_FRAME + 6, 0).store(0xAAAA, Relaxed);
    word(&host, FIRST_FRAME + 100, 0).store(0xBBBB, Relaxed);
    let mut fetching = vcpu(&vm);
    fetching.set_paging(PagingState::new(0x8001_0001, 0x1000, 0x20, 0xD00, 48));
    let mut fetch = move || {
        let bytes = fetching.fetch_instruction(Gva::new(6 << 12)).expect("mapped");
        u64::from_le_bytes(bytes[..8].try_into().expect("eight"))
    };
    assert_eq!((fetch(), fetch()), (0xAAAA, 0xAAAA));
    scope(|s| {
        let guard = vm.invalidate(pages(6, 1)).expect("alive");
        let fetching = start(s, || (fetch(), fetch()));
        assert!(fetching.waits(), "a remembered frame was read that the host is taking away");
        frame(&backing, 6, FIRST_FRAME + 100);
        drop(guard);
        assert_eq!(fetching.join(), (0xBBBB, 0xBBBB));
    });
}

/// M71, T71: no fault maps a page of an open range, whatever the backing says meanwhile.
#[test]
fn a_fault_in_an_open_range_maps_nothing() {
    let host = TestHost::new();
    let vm = vm(&host);
    changing(&vm, 16);
    let mut vcpu = vcpu(&vm);
    let guard = vm.invalidate(pages(3, 1)).expect("alive");
    assert_eq!(touch(&mut vcpu, 3), Outcome::Resume);
    assert_eq!(touch(&mut vcpu, 4), Outcome::Resume);
    assert_eq!(mapped(&vm), [(4, FIRST_FRAME + 4, PageSize::Size4K)]);
    drop(guard);
    assert_eq!(touch(&mut vcpu, 3), Outcome::Resume);
    assert_eq!(mapped(&vm).len(), 2);
}

/// M73, PROTOCOLS 4: the pending range only grows until no invalidation is open, whichever ends first.
#[test]
fn the_range_stays_while_any_is_open() {
    for first in [10, 20] {
        let host = TestHost::new();
        let vm = vm(&host);
        changing(&vm, 32);
        let mut vcpu = vcpu(&vm);
        let ends = vm.invalidate(pages(first, 1)).expect("alive");
        let stays = vm.invalidate(pages(30 - first, 1)).expect("alive");
        drop(ends);
        assert_eq!(touch(&mut vcpu, 30 - first), Outcome::Resume);
        assert_eq!(mapped(&vm), [], "guest frame {} is still being taken away", 30 - first);
        drop(stays);
        assert_eq!(touch(&mut vcpu, 30 - first), Outcome::Resume);
        assert_eq!(mapped(&vm).len(), 1);
    }
}

/// M72: an answer is as old as the question. The backing waits, a whole invalidation passes, and the answer from
/// before it must not be mapped.
#[test]
fn a_fault_drops_an_answer_that_an_invalidation_outlived() {
    let host = TestHost::new();
    let vm = vm(&host);
    outlived(&vm);
    let mut vcpu = vcpu(&vm);
    assert_eq!(touch(&mut vcpu, 3), Outcome::Resume);
    assert_eq!(mapped(&vm), [], "a frame was mapped that was given back");
    assert_eq!(touch(&mut vcpu, 3), Outcome::Resume);
    assert_eq!(mapped(&vm), [(3, FIRST_FRAME + 103, PageSize::Size4K)]);
    orderly(&vm);
}

/// M72: the sequence is read before the backing is asked. The range is open when the fault begins; the backing
/// answers with the frame that is being taken away; the invalidation ends; only then the fault goes on.
#[test]
fn a_fault_drops_an_answer_from_before_an_end() {
    let host = TestHost::new();
    let vm = vm(&host);
    let (gate, now) = (Gate::new(), Arc::new(AtomicU64::new(FIRST_FRAME)));
    let (stop, current) = (gate.clone(), now.clone());
    let backing = Asked(move |page, _| {
        let answer = current.load(Relaxed) + page;
        stop.stop();
        small(answer)
    });
    set(&vm, 0, 0, 16, Arc::new(backing));
    let mut faulting = vcpu(&vm);
    scope(|s| {
        let guard = vm.invalidate(pages(3, 1)).expect("alive");
        let fault = start(s, || touch(&mut faulting, 3));
        gate.reached();
        now.store(FIRST_FRAME + 100, Relaxed);
        drop(guard);
        gate.open();
        assert_eq!(fault.join(), Outcome::Resume);
    });
    assert_eq!(mapped(&vm), [], "a frame was mapped that was given back");
    assert_eq!(touch(&mut faulting, 3), Outcome::Resume);
    assert_eq!(mapped(&vm), [(3, FIRST_FRAME + 103, PageSize::Size4K)]);
    orderly(&vm);
}

/// T59, PROTOCOLS 4: a large range is taken away in pieces, and faults come in between; the range is open before
/// the first piece, so none maps what an earlier piece took.
#[test]
fn a_range_in_pieces_is_open_throughout() {
    let host = TestHost::new();
    let vm = vm(&host);
    // A page in each of ten tables of leaves: more entries than one piece meets.
    let count = 10 * 512;
    set(&vm, 0, 0, count, run(1 << 20, count));
    let mut vcpu = vcpu(&vm);
    for table in 0..10 {
        assert_eq!(touch(&mut vcpu, table * 512), Outcome::Resume);
    }
    let gate = Gate::new();
    let stop = gate.clone();
    host.on_relax.set(move |()| stop.stop());
    scope(|s| {
        let invalidation = start(s, || {
            let guard = vm.invalidate(pages(0, count)).expect("alive");
            (mapped(&vm), drop(guard)).0
        });
        gate.reached();
        let left = vm.stats().pages_4k;
        assert!((1..10).contains(&left), "{left} of 10 pages are left between two pieces");
        assert_eq!(touch(&mut vcpu, 0), Outcome::Resume);
        gate.open();
        assert_eq!(invalidation.join(), [], "mapped under an open invalidation");
    });
    orderly(&vm);
}

/// One leaf table of which `walker` has seen an empty entry, and that a large leaf replaces meanwhile. Hands both
/// the VM and the gate at which the walker stands to `meanwhile`.
fn a_table_goes_under_a_walker(meanwhile: impl FnOnce(&Vm<Handle>)) {
    let host = TestHost::new();
    let vm = vm(&host);
    let (gate, large) = (Gate::new(), Arc::new(AtomicBool::new(false)));
    let (stop, grown) = (gate.clone(), large.clone());
    let backing = Asked(move |page, _| {
        let size = if grown.load(Relaxed) { PageSize::Size2M } else { PageSize::Size4K };
        if page == 7 {
            stop.stop();
        }
        Ok(Resolved::new(Pfn::new((1 << 20) + page), size, true))
    });
    set(&vm, 0, 0, 512, Arc::new(backing));
    let (mut mapping, mut walking) = (vcpu(&vm), vcpu(&vm));
    assert_eq!(touch(&mut mapping, 1), Outcome::Resume);
    scope(|s| {
        let walker = start(s, || touch(&mut walking, 7));
        gate.reached();
        large.store(true, Relaxed);
        assert_eq!(touch(&mut mapping, 9), Outcome::Resume);
        assert_eq!(vm.stats().pages_collapsed, 1);
        meanwhile(&vm);
        gate.open();
        assert_eq!(walker.join(), Outcome::Resume);
    });
    assert_eq!(mapped(&vm), [(0, 1 << 20, PageSize::Size2M)]);
    orderly(&vm);
    // Nobody walks it any more: the next top-up frees it.
    vcpu(&vm);
    assert_eq!(vm.stats().table_pages_retired, 0);
}

/// PROTOCOLS 4, T99c: a table that was unlinked is not reused while a section lasts that may have walked it.
#[test]
fn a_table_outlives_its_walkers() {
    a_table_goes_under_a_walker(|vm| {
        assert_eq!(vm.stats().table_pages_retired, 1);
        // A new vCPU fills its cache, and first collects what has passed its grace.
        vcpu(vm);
        assert_eq!(vm.stats().table_pages_retired, 1, "a table was reused under a walker");
    });
}

/// T95: the entries of a removed table are frozen, so that who saw one empty installs nothing into it.
#[test]
fn a_removed_table_takes_no_leaf() {
    a_table_goes_under_a_walker(|vm| assert_eq!(vm.stats().pages_4k, 0));
}

/// PROTOCOLS 4: what is unlinked from an invalid root is retired with a generation advanced after the unlink, not
/// with that of the shootdown before: a section announced in between keeps every page.
#[test]
fn tables_of_an_invalid_root_wait_for_sections_since_the_shootdown() {
    let host = TestHost::new();
    let vm = vm(&host);
    let (shot, inside) = (Gate::new(), Gate::new());
    let stop = inside.clone();
    let backing = Asked(move |page, _| {
        if page == 7 {
            stop.stop();
        }
        small(FIRST_FRAME + page)
    });
    set(&vm, 0, 0, 16, Arc::new(backing));
    let (mut mapping, mut walking) = (vcpu(&vm), vcpu(&vm));
    assert_eq!(touch(&mut mapping, 1), Outcome::Resume);
    let stop = shot.clone();
    host.on_trace.set(move |event| {
        if event == Event::RootsInvalidated {
            stop.stop();
        }
    });
    scope(|s| {
        let zap = start(s, || vm.zap_all().expect("alive"));
        shot.reached();
        let walker = start(s, || touch(&mut walking, 7));
        inside.reached();
        shot.open();
        zap.join();
        // The root, and a table at each of three levels.
        assert_eq!(vm.stats().table_pages_retired, 4, "a table was reused under a section");
        inside.open();
        assert_eq!(walker.join(), Outcome::Resume);
    });
    orderly(&vm);
    vm.zap_all().expect("alive");
    assert_eq!(vm.stats().table_pages_retired, 0);
    orderly(&vm);
}

/// T71: a fault that walked a root before it was invalidated maps nothing into it: here not even a table into the
/// root's own page, which nobody freezes.
#[test]
fn a_fault_maps_nothing_into_a_root_that_died() {
    let host = TestHost::new();
    let vm = vm(&host);
    let gate = Gate::new();
    let stop = gate.clone();
    let backing = Asked(move |page, _| {
        stop.stop();
        small((1 << 20) + page)
    });
    set(&vm, 0, 0, 16, Arc::new(backing));
    let mut faulting = vcpu(&vm);
    scope(|s| {
        let fault = start(s, || touch(&mut faulting, 3));
        gate.reached();
        let zap = start(s, || vm.zap_all().expect("alive"));
        assert!(zap.waits(), "`zap_all` returned while a fault was in the root");
        gate.open();
        assert_eq!(fault.join(), Outcome::Resume);
        zap.join();
    });
    assert_eq!(vm.stats().pf_fixed, 0);
    orderly(&vm);
}

/// M66: a guard is owed its end from the moment that its range is open. A host that panics in the middle leaves no
/// range open, whatever it was called for.
#[test]
fn a_panic_leaves_no_invalidation_open() {
    let invalidated = |event| assert!(!matches!(event, Event::Invalidated { .. }), "the host's own failure");
    let host = TestHost::new();
    let vm = vm(&host);
    changing(&vm, 16);
    let mut vcpu = vcpu(&vm);
    assert_eq!(touch(&mut vcpu, 3), Outcome::Resume);
    host.on_trace.set(invalidated);
    let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        drop(vm.invalidate(pages(3, 1)));
    }));
    assert!(failed.is_err());
    assert_eq!(vm.stats().invalidations_open, 0);
    assert_eq!(touch(&mut vcpu, 3), Outcome::Resume);
    assert_eq!(mapped(&vm), [(3, FIRST_FRAME + 3, PageSize::Size4K)]);
    // The thread may change slots: it holds no guard.
    set(&vm, 1, 64, 16, run(1 << 20, 16));
    orderly(&vm);
}

/// The same where the shootdown fails in the middle: a kick, with a vCPU in the guest.
#[test]
fn a_panic_in_a_kick_leaves_no_invalidation_open() {
    let host = TestHost::new();
    let vm = vm(&host);
    changing(&vm, 16);
    let (mut faulting, mut running) = (vcpu(&vm), vcpu(&vm));
    assert_eq!(touch(&mut faulting, 3), Outcome::Resume);
    let fails = AtomicBool::new(true);
    host.on_kick.set(move |_| assert!(!fails.swap(false, Relaxed), "the host's own failure"));
    let gate = Gate::new();
    scope(|s| {
        start(s, || {
            let mut cpu = vmmu::PhysCpu::new(vmmu::TagSet::asids(8, true));
            let entry = running.enter(&mut cpu).expect("prepared");
            gate.stop();
            entry.ran();
        });
        gate.reached();
        let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            drop(vm.invalidate(pages(3, 1)));
        }));
        gate.open();
        assert!(failed.is_err());
        assert_eq!(vm.stats().invalidations_open, 0);
        drop(vm.invalidate(pages(3, 1)).expect("alive"));
    });
    set(&vm, 1, 64, 16, run(1 << 20, 16));
    assert_eq!(touch(&mut faulting, 3), Outcome::Resume);
    orderly(&vm);
}

/// M79: a backing that panics, inside a section or with nothing held, leaves no section open: the VM goes on, and
/// invalidations do not wait for the dead.
#[test]
fn a_panic_in_a_backing_leaves_no_section_open() {
    for panics_where_it_may_wait in [true, false] {
        let host = TestHost::new();
        let vm = vm(&host);
        let fails = AtomicBool::new(true);
        let backing = Asked(move |page, request: vmmu::ResolveRequest| {
            if request.may_wait == panics_where_it_may_wait {
                assert!(!fails.swap(false, Relaxed), "the backing's own failure");
                return small(FIRST_FRAME + page);
            }
            Err(vmmu::ResolveError::WouldWait)
        });
        set(&vm, 0, 0, 16, Arc::new(backing));
        let mut vcpu = vcpu(&vm);
        let fault = npf(3, true);
        let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _ = vcpu.handle_fault(fault);
        }));
        assert!(failed.is_err());
        scope(|s| {
            start(s, || drop(vm.invalidate(pages(3, 1)).expect("alive"))).join();
            start(s, || vm.zap_all().expect("alive")).join();
        });
        assert_eq!(touch(&mut vcpu, 3), Outcome::Resume);
        assert_eq!(mapped(&vm).len(), 1);
        orderly(&vm);
    }
}

/// PROTOCOLS 4, M158: two vCPUs that find no free table at once do not take one shortage for two: under a limit of
/// one block both get theirs from it.
#[test]
fn two_grow_by_one_block() {
    let host = TestHost::new();
    let config = vmmu::Config::new(vmmu::TableFormat::Npt4, 48).memory_limit(256 << 10);
    let vm = Vm::new(Handle(host.clone()), config).expect("legal");
    let gate = Gate::new();
    let stop = gate.clone();
    host.on_alloc.set(move |()| stop.stop());
    let (mut a, mut b) = (vm.vcpu().expect("alive"), vm.vcpu().expect("alive"));
    let began = AtomicBool::new(false);
    scope(|s| {
        let first = start(s, || a.prepare());
        gate.reached();
        let second = start(s, || -> Result<(), Error> {
            began.store(true, Relaxed);
            b.prepare()
        });
        assert!(common::scene::comes_true(|| began.load(Relaxed)));
        // Time for the second to find the arena empty; it waits where no host sees it.
        std::thread::sleep(std::time::Duration::from_millis(50));
        gate.open();
        assert_eq!((first.join(), second.join()), (Ok(()), Ok(())));
    });
    assert_eq!((host.allocations(), host.blocks_out()), (1, 1));
    orderly(&vm);
}
