//! Memory taken away: `invalidate` beside a fault and beside a read by software (PROTOCOLS 4).
//!
//! One thread invalidates a page, takes its frame, gives the backing another, and ends the invalidation. The other
//! faults on the page and lets its guest run; or reads it. The old frame must not be used once `invalidate` has
//! returned, and no table may lead to it at the end. Shipped code: `Vm::invalidate`, `Vcpu::handle_fault`,
//! `Vcpu::enter`, `Vcpu::read`, whole. At most three preemptions beside a fault, five beside a read.

use super::machine::{Kept, Machine, Moving, fault, prepared, vm, walk};
use super::{Model, RACE, checks};
use crate::addr::{Gfn, GfnRange, Gpa};
use crate::tlb::tag::{PhysCpu, TagSet};
use crate::vcpu::Vcpu;
use crate::vm::Vm;
use loom::thread;

const OLD: u64 = 1;
const NEW: u64 = 2;
const REFUSED: &str = "an old frame is mapped";

/// Takes the frame of page 0 away from under whoever uses it.
fn move_page(vm: &Vm<Machine>, backing: &Moving) {
    let page = GfnRange::with_len(Gfn::new(0), 1).expect("no wrap");
    let invalidation = vm.invalidate(page).expect("alive");
    vm.host().frames.taken(OLD);
    backing.to(NEW);
    drop(invalidation);
}

/// Demands that page 0 is the new frame or nothing, by entering with nothing cached.
fn nothing_old_is_mapped(vcpu: &mut Vcpu<Machine>) {
    vcpu.prepare().expect("memory");
    let mut cpu = PhysCpu::new(TagSet::asids(16, true));
    let entry = vcpu.enter(&mut cpu).expect("no request");
    assert!(walk(entry.root(), 0).is_none_or(|leaf| leaf.pfn.raw() == NEW), "{REFUSED}");
}

const FAULT: Model = Model {
    preemptions: Some(3),
    run: || {
        let (vm, backing) = vm();
        let mut vcpu = prepared(&vm, 1);
        let frames = vm.host().frames.clone();
        let guest = thread::spawn(move || {
            fault(&mut vcpu, 0);
            let mut cpu = PhysCpu::new(TagSet::asids(16, true));
            if let Ok(entry) = vcpu.enter(&mut cpu) {
                if let Some(leaf) = walk(entry.root(), 0) {
                    frames.used(leaf.pfn.raw());
                }
                entry.ran();
            }
            vcpu
        });
        move_page(&vm, &backing);
        nothing_old_is_mapped(&mut guest.join().expect("no panic"));
    },
};

/// The same, explored less far: enough for each mutant.
const BROKEN_FAULT: Model = Model { preemptions: Some(2), ..FAULT };

const READ: Model = Model {
    preemptions: Some(5),
    run: || {
        let (vm, backing) = vm();
        let mut reader = Kept::new(vm.reader().expect("alive"));
        let other = thread::spawn(move || reader.read(Gpa::new(0), &mut [0; 8]).expect("memory"));
        move_page(&vm, &backing);
        other.join().expect("no panic");
    },
};

mod of_a_fault {
    use super::*;

    checks! { FAULT: holds }
    checks! {
        BROKEN_FAULT catches
        no_sequence_recheck: NoSequenceRecheck => RACE,
        no_sequence_bump: NoSequenceBump => RACE,
        no_range_recheck: NoRangeRecheck => RACE,
        zap_before_begin: ZapBeforeBegin => REFUSED,
        snapshot_after_resolve: SnapshotAfterResolve => RACE,
        count_before_sequence: CountBeforeSequence => RACE,
        no_fence_shared: NoFenceShared => RACE,
        no_fence_flag: NoFenceFlag => RACE,
    }
}

mod of_a_read {
    use super::*;

    checks! { READ: holds }
    checks! {
        READ catches
        access_no_recheck: AccessNoRecheck => RACE,
        relaxed_scan: RelaxedScan => RACE,
        no_settle: NoSettle => RACE,
        skip_if_empty: SkipIfEmpty => RACE,
        newer_before: NewerBefore => RACE,
        no_fence_walk: NoFenceWalk => RACE,
        no_fence_advance: NoFenceAdvance => RACE,
        sequence_first: SequenceFirst => RACE,
        count_before_sequence: CountBeforeSequence => RACE,
    }
}
