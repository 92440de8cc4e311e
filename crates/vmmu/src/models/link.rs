//! Linking: a fault prepares tables and links them, beside a walk that gets into them (T154).
//!
//! One thread walks in one section, announced before the tables are written, until it comes to the leaf. What is in a
//! table is written without atomics before it is linked, so loom reports a walk that reads an entry without having
//! seen that. Shipped code: `Vcpu::prepare` and `Vcpu::handle_fault`, whole; `Line::walk` and `Tdp::walk`. At most
//! three preemptions.

use super::machine::{Kept, fault, prepared, vm};
use super::{Model, RACE, checks};
use crate::addr::{Gfn, Level};
use crate::memory::Region;
use crate::names::{AddressSpace, SlotId};
use crate::sync::relax;
use loom::thread;

/// A page whose tables are not there at first.
const PAGE: u64 = 16;

const MODEL: Model = Model {
    preemptions: Some(3),
    run: || {
        let (vm, backing) = vm();
        vm.set_region(SlotId::new(1), Region::new(Gfn::new(PAGE), 1, backing)).expect("valid");
        let here = prepared(&vm, 0);
        let mut there = Kept::new(vm.vcpu().expect("alive"));
        let linking = thread::spawn(move || {
            there.prepare().expect("memory");
            fault(&mut there, PAGE);
            there
        });
        let inner = &*vm.inner;
        let root = inner.tdp.roots.find(AddressSpace::NORMAL).expect("made");
        let line = inner.tlb.readers.take(None);
        let walking = line.walk(&inner.tlb);
        let there_yet = || {
            let at = inner.tdp.walk(inner.env(), &root, Gfn::new(PAGE), Level::L1, &walking);
            at.level == Level::L1
        };
        while !there_yet() {
            relax();
        }
        drop(walking);
        line.give_back();
        drop((linking.join().expect("no panic"), here));
    },
};

checks! { MODEL: holds }
checks! {
    MODEL catches
    relaxed_entry: RelaxedEntry => RACE,
}
