//! Grace: a walk beside the replacement of a table, and its reuse (PROTOCOLS 1 and 4).
//!
//! One thread walks to an entry, takes and ends Shared inside the walking section, and reads the entry again. The
//! other puts a large leaf in the place of that entry's table, which unlinks, freezes, flushes and retires it, frees
//! what has passed its grace, and prepares the next free page as another table. That page is written over without
//! atomics, so loom reports a walk that is still in it. Shipped code: `Line`, `Tdp::walk`, `Tdp::map`, and of `Inner`
//! `settle_removed` and `collect`. At most four preemptions.

use super::machine::{format, prepared, vm};
use super::{Model, RACE, checks};
use crate::addr::{Gfn, Level, Pfn};
use crate::arch::entry::{NestedAccess, Writable};
use crate::names::AddressSpace;
use crate::table::cache::{Cache, PreparedPage};
use crate::tdp::map::{Mapped, Wanted};
use loom::thread;

const MODEL: Model = Model {
    preemptions: Some(4),
    run: || {
        let (vm, _) = vm();
        let vcpu = prepared(&vm, 1);
        let inner = vm.inner.clone();
        let root = inner.tdp.roots.find(AddressSpace::NORMAL).expect("made");
        let line = inner.tlb.readers.take(None);
        let (its_inner, its_root) = (inner.clone(), root.clone());
        let walker = thread::spawn(move || {
            let inner = &*its_inner;
            let line = inner.tlb.readers.take(None);
            let walking = line.walk(&inner.tlb);
            let at = inner.tdp.walk(inner.env(), &its_root, Gfn::new(1), Level::L1, &walking);
            drop(inner.tlb.lock.shared(&inner.tlb, line, &inner.host));
            at.cell.load();
            drop(walking);
            line.give_back();
        });
        let shared = inner.tlb.lock.shared(&inner.tlb, line, &inner.host);
        let want = Wanted {
            gfn: Gfn::new(0),
            pfn: Pfn::new(0),
            level: Level::L2,
            writable: Writable::Yes,
            access: NestedAccess::WRITE,
        };
        let at = inner.tdp.walk(inner.env(), &root, want.gfn, want.level, &shared);
        match inner.tdp.map(inner.env(), &shared, &root, at, want, &mut Cache::default()) {
            Mapped::Collapsed(_, removed) => inner.settle_removed(line, removed),
            other => panic!("a table is there to be replaced, and yet {other:?}"),
        }
        drop(shared);
        inner.collect();
        let page = inner.tables().alloc_free().expect("a block is there");
        inner.tables().free(PreparedPage::new(&inner.tables(), &format(), page).into_inner());
        walker.join().expect("no panic");
        line.give_back();
        drop(vcpu);
    },
};

checks! { MODEL: holds }
checks! {
    MODEL catches
    no_grace: NoGrace => RACE,
    no_fence_walk: NoFenceWalk => RACE,
    no_fence_advance: NoFenceAdvance => RACE,
    nest_new_generation: NestNewGeneration => RACE,
    nest_end_out: NestEndOut => RACE,
}
