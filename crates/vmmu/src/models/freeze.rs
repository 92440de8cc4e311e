//! Freeze: a fault that needs a table, beside the removal of the table in which it would be linked (T95, PROTOCOLS 4).
//!
//! First: one vCPU's fault needs a table below one of level 2, and another's fault puts a large leaf in the place of
//! that one. Second: a fault needs tables right below the root, and `Vm::zap_all` takes the root away. In both nothing
//! may be linked where nobody looks any more: the audit must be clean, and the end of the VM must find every table.
//! Shipped code: `Vcpu::handle_fault` and `Vm::zap_all`, whole. At most three preemptions; two beside `zap_all`.

use super::machine::{Kept, Machine, fault};
use super::{Model, checks};
use crate::addr::{Gfn, PageSize, Pfn};
use crate::error::ResolveError;
use crate::host::{Backing, ResolveRequest, Resolved};
use crate::memory::Region;
use crate::names::SlotId;
use crate::vcpu::Vcpu;
use crate::vm::Vm;
use crate::vm::config::{Config, TableFormat};
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use loom::thread;
use std::sync::Arc;

/// A page whose table of leaves is there.
const MAPPED: u64 = 0;
/// One that needs a table of leaves in the same table of level 2.
const BESIDE: u64 = PageSize::Size2M.pages();
/// One for which the backing has a page as large as that table.
const LARGE: u64 = 2 * PageSize::Size2M.pages();
/// One that needs tables right below the root.
const FAR: u64 = 4 * PageSize::Size1G.pages();
/// What the audit says where a table is no root's any more.
const LOST: &str = "T-inv 3: tables below roots";

/// A backing whose frames have their pages' numbers, and whose page at [`LARGE`] is large; later all that follow too.
#[derive(Default)]
struct Flat {
    /// Whether they are by now. No step of the model.
    grown: AtomicBool,
}

// SAFETY: nobody reads or writes through these frames.
unsafe impl Backing for Flat {
    fn resolve(&self, page: u64, _: ResolveRequest) -> Result<Resolved, ResolveError> {
        let large = page == LARGE || self.grown.load(Relaxed);
        let max_size = if large { PageSize::Size1G } else { PageSize::Size4K };
        Ok(Resolved { pfn: Pfn::new(page), max_size, writable: true })
    }
}

fn vm() -> (Kept<Vm<Machine>>, Arc<Flat>) {
    let vm = Vm::new(Machine::new(), Config::new(TableFormat::Npt4, 48)).expect("legal");
    let flat = Arc::new(Flat::default());
    vm.set_region(SlotId::new(0), Region::new(Gfn::new(0), FAR + 1, flat.clone())).expect("valid");
    (Kept::new(vm), flat)
}

fn vcpu(vm: &Vm<Machine>) -> Kept<Vcpu<Machine>> {
    let mut vcpu = vm.vcpu().expect("alive");
    vcpu.prepare().expect("memory");
    Kept::new(vcpu)
}

const COLLAPSE: Model = Model {
    preemptions: Some(3),
    run: || {
        let (vm, flat) = vm();
        let (mut one, mut other) = (vcpu(&vm), vcpu(&vm));
        fault(&mut one, MAPPED);
        let small = thread::spawn(move || {
            fault(&mut one, BESIDE);
            one
        });
        fault(&mut other, LARGE);
        drop((small.join().expect("no panic"), other));
        flat.grown.store(true, Relaxed);
        vm.audit().unwrap_or_else(|broken| panic!("{broken}"));
    },
};

const ZAP: Model = Model {
    preemptions: Some(2),
    run: || {
        let (vm, _) = vm();
        let mut vcpu = vcpu(&vm);
        fault(&mut vcpu, MAPPED);
        let faulting = thread::spawn(move || {
            fault(&mut vcpu, FAR);
            vcpu
        });
        vm.zap_all().expect("alive");
        drop(faulting.join().expect("no panic"));
        vm.audit().unwrap_or_else(|broken| panic!("{broken}"));
    },
};

mod beside_a_collapse {
    use super::*;

    checks! { COLLAPSE: holds }
    checks! {
        COLLAPSE catches
        emptied_not_frozen: EmptiedNotFrozen => LOST,
    }
}

mod beside_a_zap {
    use super::*;

    checks! { ZAP: holds }
    checks! {
        ZAP catches
        no_root_recheck: NoRootRecheck => LOST,
    }
}
