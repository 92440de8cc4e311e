//! Slots under way (PROTOCOLS 5, T48, T73): what a change waits for, and what faults may do and remember while it is
//! in progress.

mod common;

use common::scene::{
    Asked, Gate, Running, mapped, npf, orderly, pages, run, set, small, start, touch, vcpu, vm,
};
use common::{Handle, TestHost};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{Scope, scope};
use vmmu::trace::Event;
use vmmu::{Gfn, Gpa, Outcome, PageSize, Region, SlotId, Vcpu, Vm};

const HOLE: u64 = 0x100;
const NEW: u64 = 0x200;

/// A VM with slot 0 at guest frame 0 in which the fault of page 7 stops at a gate, in its slot section.
struct Stage {
    vm: Vm<Handle>,
    gate: Arc<Gate>,
    reading: Vcpu<Handle>,
    other: Vcpu<Handle>,
}

impl Stage {
    fn new() -> Self {
        let host = TestHost::new();
        let vm = vm(&host);
        let gate = Gate::new();
        let stop = gate.clone();
        let backing = Arc::new(Asked(move |page, _| {
            if page == 7 {
                stop.stop();
            }
            small((1 << 20) + page)
        }));
        set(&vm, 0, 0, 16, backing);
        let (reading, other) = (vcpu(&vm), vcpu(&vm));
        Self { vm, gate, reading, other }
    }
}

/// Starts the fault that stops in its slot section.
fn reader<'s>(s: &'s Scope<'s, '_>, vcpu: &'s mut Vcpu<Handle>, gate: &Gate) -> Running<'s, Outcome> {
    let reader = start(s, || touch(vcpu, 7));
    gate.reached();
    reader
}

/// A write to `gfn` is a device's.
fn is_mmio(vcpu: &mut Vcpu<Handle>, gfn: u64) {
    let outcome = touch(vcpu, gfn);
    let Outcome::Mmio(access) = outcome else { panic!("guest frame {gfn:#x}: {outcome:?}") };
    assert_eq!((access.gpa, access.write), (Gpa::new(gfn << 12), true));
}

/// PROTOCOLS 5: a change waits for everybody who reads the set that it replaced, which is freed afterwards.
#[test]
fn a_change_waits_for_slot_readers() {
    let mut stage = Stage::new();
    let vm = &stage.vm;
    scope(|s| {
        let reader = reader(s, &mut stage.reading, &stage.gate);
        let change = start(s, || set(vm, 1, NEW, 16, run(1 << 21, 16)));
        assert!(change.waits(), "a slot set was replaced and freed under its reader");
        stage.gate.open();
        change.join();
        assert_eq!(reader.join(), Outcome::Resume);
    });
    orderly(vm);
}

/// PROTOCOLS 5, M21: so does a delete; what the reader mapped meanwhile is gone afterwards.
#[test]
fn a_delete_waits_for_slot_readers() {
    let mut stage = Stage::new();
    let vm = &stage.vm;
    scope(|s| {
        let reader = reader(s, &mut stage.reading, &stage.gate);
        let delete = start(s, || vm.delete_region(SlotId::new(0)).expect("there"));
        assert!(delete.waits(), "a backing was let go of under a fault in it");
        stage.gate.open();
        delete.join();
        assert_eq!(reader.join(), Outcome::Resume);
    });
    assert_eq!(mapped(vm), []);
    orderly(vm);
}

/// T71, PROTOCOLS 5: a fault whose slots changed since it looked maps nothing, not even for the moment until the
/// change acts on entries.
#[test]
fn a_fault_across_a_change_maps_nothing() {
    let mut stage = Stage::new();
    let vm = &stage.vm;
    scope(|s| {
        let reader = reader(s, &mut stage.reading, &stage.gate);
        let before = vm.stats();
        let delete = start(s, || vm.delete_region(SlotId::new(0)).expect("there"));
        assert!(delete.waits());
        stage.gate.open();
        assert_eq!(reader.join(), Outcome::Resume);
        delete.join();
        let after = vm.stats();
        assert_eq!((after.pf_fixed, after.pf_retry), (before.pf_fixed, before.pf_retry + 1));
    });
    orderly(vm);
}

/// T73, PROTOCOLS 5: a slot that is being deleted or moved is published as such before its translations go, so that
/// a fault right after that zap makes none anew. Nor is the access a device's: memory is still there.
#[test]
fn a_fault_in_a_slot_that_goes_tries_again() {
    for moves in [false, true] {
        let host = TestHost::new();
        let vm = vm(&host);
        let backing = run(1 << 20, 16);
        set(&vm, 0, 0, 16, backing.clone());
        let mut vcpu = vcpu(&vm);
        assert_eq!(touch(&mut vcpu, 3), Outcome::Resume);
        let gate = Gate::new();
        let stop = gate.clone();
        host.on_trace.set(move |event| {
            if matches!(event, Event::RootZapped { .. }) {
                stop.stop();
            }
        });
        scope(|s| {
            let change = start(s, || {
                if moves {
                    set(&vm, 0, NEW, 16, backing.clone());
                } else {
                    vm.delete_region(SlotId::new(0)).expect("there");
                }
            });
            gate.reached();
            assert_eq!(touch(&mut vcpu, 3), Outcome::Resume);
            gate.open();
            change.join();
        });
        assert_eq!(mapped(&vm), [], "guest frame 3 leads to memory that is the host's (moved: {moves})");
        orderly(&vm);
        is_mmio(&mut vcpu, 3);
        if moves {
            assert_eq!(touch(&mut vcpu, NEW + 3), Outcome::Resume);
            assert_eq!(mapped(&vm), [(NEW + 3, (1 << 20) + 3, PageSize::Size4K)]);
        }
    }
}

/// PROTOCOLS 4: `delete_region` returns only after every section announced before: a thread that reads the slot's
/// memory has a frame of it in its hands.
#[test]
fn a_delete_waits_for_software() {
    let host = TestHost::new();
    let vm = vm(&host);
    set(&vm, 0, 0, 16, run(common::FIRST_FRAME, 16));
    let gate = Gate::new();
    let stop = gate.clone();
    host.on_frame.set(move |_| stop.stop());
    scope(|s| {
        let reader = start(s, || vm.reader().expect("alive").read(Gpa::new(0x3000), &mut [0; 8]));
        gate.reached();
        let delete = start(s, || vm.delete_region(SlotId::new(0)).expect("there"));
        assert!(delete.waits(), "a frame was given back while it was read");
        gate.open();
        assert_eq!(reader.join(), Ok(()));
        delete.join();
    });
    orderly(&vm);
}

/// T48, PROTOCOLS 5: while a generation is in progress an access without a slot is a device's, and nothing is
/// remembered of it: the entry would be taken for one of the set before.
#[test]
fn nothing_is_cached_in_progress() {
    let mut stage = Stage::new();
    let vm = &stage.vm;
    scope(|s| {
        let reader = reader(s, &mut stage.reading, &stage.gate);
        let change = start(s, || set(vm, 1, NEW, 16, run(1 << 21, 16)));
        assert!(change.waits());
        is_mmio(&mut stage.other, HOLE);
        assert_eq!(vm.stats().pf_mmio_spte_created, 0, "an MMIO entry was made while in progress");
        stage.gate.open();
        change.join();
        reader.join();
    });
    is_mmio(&mut stage.other, HOLE);
    assert_eq!(vm.stats().pf_mmio_spte_created, 1);
    is_mmio(&mut stage.other, HOLE);
    assert_eq!(vm.stats().pf_mmio_hit, 1);
    orderly(vm);
}

/// T48: nor does an entry from before answer then: there may be a slot by now.
#[test]
fn no_mmio_entry_answers_in_progress() {
    let mut stage = Stage::new();
    let vm = &stage.vm;
    for gfn in [HOLE, NEW] {
        is_mmio(&mut stage.other, gfn);
    }
    assert_eq!(vm.stats().pf_mmio_spte_created, 2);
    scope(|s| {
        let reader = reader(s, &mut stage.reading, &stage.gate);
        let change = start(s, || set(vm, 1, NEW, 16, run(1 << 21, 16)));
        assert!(change.waits());
        assert_eq!(touch(&mut stage.other, NEW), Outcome::Resume, "there is memory");
        is_mmio(&mut stage.other, HOLE);
        assert_eq!(vm.stats().pf_mmio_hit, 0, "an MMIO entry answered while in progress");
        stage.gate.open();
        change.join();
        reader.join();
    });
    assert!(mapped(vm).contains(&(NEW, 1 << 21, PageSize::Size4K)));
    orderly(vm);
}

/// PROTOCOLS 5: the slot section is dropped while a backing waits: a change does not wait for it. The answer is for
/// slots that are no more, and is dropped, also where a new slot is in the same place.
#[test]
fn an_answer_for_other_slots_is_dropped() {
    let host = TestHost::new();
    let vm = vm(&host);
    let gate = Gate::new();
    let stop = gate.clone();
    let backing = Asked(move |page, request: vmmu::ResolveRequest| {
        if !request.may_wait {
            return Err(vmmu::ResolveError::WouldWait);
        }
        stop.stop();
        small((1 << 20) + page)
    });
    set(&vm, 0, 0, 16, Arc::new(backing));
    let mut faulting = vcpu(&vm);
    scope(|s| {
        let fault = start(s, || touch(&mut faulting, 3));
        gate.reached();
        let change = start(s, || {
            vm.delete_region(SlotId::new(0)).expect("there");
            set(&vm, 0, 0, 16, run(1 << 21, 16));
        });
        change.join();
        gate.open();
        assert_eq!(fault.join(), Outcome::Resume);
    });
    assert!(mapped(&vm).iter().all(|leaf| *leaf == (3, (1 << 21) + 3, PageSize::Size4K)));
    assert_eq!(touch(&mut faulting, 3), Outcome::Resume);
    assert_eq!(mapped(&vm).len(), 1);
    orderly(&vm);
}

/// M6, PROTOCOLS 5: the last fault that asks a backing keeps it; the slot's user has its frames back before.
#[test]
fn a_backing_lives_as_long_as_its_last_question() {
    struct Tell(Arc<AtomicBool>);
    impl Drop for Tell {
        fn drop(&mut self) {
            self.0.store(true, Relaxed);
        }
    }
    let host = TestHost::new();
    let vm = vm(&host);
    let (gate, gone) = (Gate::new(), Arc::new(AtomicBool::new(false)));
    let (stop, tell) = (gate.clone(), Tell(gone.clone()));
    let backing = Asked(move |page, request: vmmu::ResolveRequest| {
        let _kept = &tell;
        if !request.may_wait {
            return Err(vmmu::ResolveError::WouldWait);
        }
        stop.stop();
        small((1 << 20) + page)
    });
    let id = SlotId::new(0);
    vm.set_region(id, Region::new(Gfn::new(0), 16, Arc::new(backing))).expect("valid");
    let mut faulting = vcpu(&vm);
    scope(|s| {
        let fault = start(s, || faulting.handle_fault(npf(3, true)).expect("no error"));
        gate.reached();
        vm.delete_region(id).expect("there");
        drop(vm.invalidate(pages(0, 16)).expect("alive"));
        assert!(!gone.load(Relaxed));
        gate.open();
        assert_eq!(fault.join(), Outcome::Resume, "the slot is gone: it tries again");
    });
    assert!(gone.load(Relaxed));
    assert_eq!(mapped(&vm), []);
    orderly(&vm);
}
