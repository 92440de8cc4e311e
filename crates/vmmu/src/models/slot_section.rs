//! The slot section: a reader of slots beside their change, and a fault beside the deletion of its slot (PROTOCOLS 5).
//!
//! First: one thread finds a slot in the published set, the other publishes a set without it and then has the old
//! set's memory to itself. Shipped code: `Line::walk_with_slots`, `Slots::read`, `SlotsWriter::publish` with the wait
//! of `Tlb::wait_for_slot_readers`. No bound on preemptions. Second: a fault, the guest's run, and `Vm::delete_region`,
//! all whole; the frames are the host's when that returns, and no table may lead to one. At most two preemptions;
//! one where the vCPU prepares before, and so may get a root that is newer than the deletion's.

use super::machine::{Machine, Things, fault, prepared, vm, walk};
use super::{Model, RACE, checks};
use crate::addr::Gfn;
use crate::memory::Region;
use crate::memory::slots::{Change, Hint, Slots};
use crate::names::{AddressSpace, SlotId};
use crate::tlb::Tlb;
use crate::tlb::tag::{PhysCpu, TagSet};
use loom::thread;
use std::sync::Arc;

const SLOT: SlotId = SlotId::new(0);
/// What stands for the memory of the old set.
const OLD_SET: u64 = 0;
const FRAME: u64 = 1;
const MAPPED: &str = "memory of a deleted slot is mapped";

const SETS: Model = Model {
    preemptions: None,
    run: || {
        let (tlb, slots, things) =
            (Arc::new(Tlb::new()), Arc::new(Slots::new(1, Gfn::new(15))), Things::new());
        let (machine, (_, backing)) = (Machine::new(), vm());
        let mut writer = slots.write();
        let region = Region::new(Gfn::new(0), 4, backing);
        let Ok(Change::Create(slot)) = writer.plan(SLOT, region) else { panic!("a new slot") };
        drop(writer.publish(&tlb, &machine, SLOT, Some(slot), || {}));
        drop(writer);
        let (its_tlb, its_slots, its_things) = (tlb.clone(), slots.clone(), things.clone());
        let reader = thread::spawn(move || {
            let line = its_tlb.readers.take(None);
            let (walking, section) = line.walk_with_slots(&its_tlb);
            let set = its_slots.read(AddressSpace::NORMAL, &section);
            if set.find(Gfn::new(1), &mut Hint::default()).is_some() {
                its_things.used(OLD_SET);
            }
            drop((section, walking));
            line.give_back();
        });
        let mut writer = slots.write();
        let old = writer.publish(&tlb, &machine, SLOT, None, || {});
        things.taken(OLD_SET);
        drop(writer);
        reader.join().expect("no panic");
        // Only now: a mutant would have the reader in memory that is gone.
        drop(old);
    },
};

/// The deletion beside a guest that faults, and, where it is to prepare first, gets the new root for it.
fn deletion(prepares: bool) {
    let (vm, _) = vm();
    let mut vcpu = prepared(&vm, 1);
    let frames = vm.host().frames.clone();
    let guest = thread::spawn(move || {
        if prepares {
            vcpu.prepare().expect("memory");
        }
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
    vm.delete_region(SLOT).expect("it is there");
    vm.host().frames.taken(FRAME);
    let mut vcpu = guest.join().expect("no panic");
    vcpu.prepare().expect("memory");
    let mut cpu = PhysCpu::new(TagSet::asids(16, true));
    let entry = vcpu.enter(&mut cpu).expect("no request");
    assert_eq!(walk(entry.root(), 0), None, "{MAPPED}");
}

const DELETION: Model = Model { preemptions: Some(2), run: || deletion(false) };
const DELETION_AND_ROOT: Model = Model { preemptions: Some(1), run: || deletion(true) };

mod of_sets {
    use super::*;

    checks! { SETS: holds }
    checks! {
        SETS catches
        no_slot_reader_wait: NoSlotReaderWait => RACE,
        no_fence_walk: NoFenceWalk => RACE,
        no_fence_advance: NoFenceAdvance => RACE,
    }
}

mod of_a_deletion {
    use super::*;

    checks! { DELETION: holds }
    checks! { DELETION_AND_ROOT: holds_with_a_new_root }
    checks! {
        DELETION_AND_ROOT catches
        changing_ignored: ChangingIgnored => MAPPED,
        zap_before_withdraw: ZapBeforeWithdraw => MAPPED,
    }
}
