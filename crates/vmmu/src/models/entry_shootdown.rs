//! Entry beside shootdown, and beside a request (PROTOCOLS 3).
//!
//! A vCPU enters twice. Its processor keeps what it has walked to, under the entry's tag, until an entry flushes
//! that; in the guest it uses what it holds, or walks. Another thread removes the page's leaf under Exclusive and
//! takes the frame after the shootdown alone, without the wait for sections by which `Vm::invalidate` would cover for
//! it. Beside a request the vCPU enters once and stays: the entry has seen the request, or the vCPU is kicked. Shipped
//! code: `Vcpu::enter`, `Entry::ran`, `Tdp::unmap`, `Tlb::shootdown`, `Vm::kick_all`. At most three preemptions beside
//! the shootdown; no bound beside the request.

use super::machine::{prepared, vm, walk};
use super::{Model, RACE, checks};
use crate::addr::{Gfn, GfnRange};
use crate::tdp::zap::Removed;
use crate::tlb::tag::{EntryFlush, PhysCpu, TagSet};
use core::sync::atomic::Ordering::Relaxed;
use loom::thread;
use std::collections::BTreeMap;

const FRAME: u64 = 1;
const LOST: &str = "a request was lost";

const SHOOTDOWN: Model = Model {
    preemptions: Some(3),
    run: || {
        let (vm, _) = vm();
        let mut vcpu = prepared(&vm, 0);
        let frames = vm.host().frames.clone();
        let guest = thread::spawn(move || {
            let mut cpu = PhysCpu::new(TagSet::asids(16, true));
            let mut held = BTreeMap::new();
            for _ in 0..2 {
                let Ok(entry) = vcpu.enter(&mut cpu) else { continue };
                match entry.flush() {
                    EntryFlush::None => {}
                    EntryFlush::Tag => drop(held.remove(&entry.tag())),
                    EntryFlush::All => held.clear(),
                }
                let walked = held.get(&entry.tag()).copied().or_else(|| walk(entry.root(), 0));
                if let Some(leaf) = walked {
                    held.insert(entry.tag(), leaf);
                    frames.used(leaf.pfn.raw());
                }
                entry.ran();
            }
            vcpu
        });
        let inner = &*vm.inner;
        let line = inner.tlb.readers.take(None);
        let mut removed = Removed::new(&inner.tlb);
        let exclusive = inner.tlb.lock.exclusive(&inner.tlb, line, &inner.host);
        let page = GfnRange::with_len(Gfn::new(0), 1).expect("no wrap");
        assert!(inner.tdp.unmap(inner.env(), &exclusive, page, &mut removed).is_none());
        drop(exclusive);
        let (_, debt) = removed.into_parts();
        debt.pay(line, &inner.host);
        inner.host.frames.taken(FRAME);
        drop(guest.join().expect("no panic"));
        line.give_back();
    },
};

const REQUEST: Model = Model {
    preemptions: None,
    run: || {
        let (vm, _) = vm();
        let mut vcpu = prepared(&vm, 0);
        let guest = thread::spawn(move || {
            let mut cpu = PhysCpu::new(TagSet::asids(16, true));
            // Forgotten, not dropped: the vCPU stays in the guest.
            let entered = vcpu.enter(&mut cpu).map(core::mem::forget).is_ok();
            (vcpu, entered)
        });
        vm.kick_all();
        let (vcpu, entered) = guest.join().expect("no panic");
        assert!(!entered || vm.host().kicks.load(Relaxed) != 0, "{LOST}");
        drop(vcpu);
    },
};

mod of_a_shootdown {
    use super::*;

    checks! { SHOOTDOWN: holds }
    checks! {
        SHOOTDOWN catches
        no_fence_guest: NoFenceGuest => RACE,
        generation_before_announce: GenerationBeforeAnnounce => RACE,
        no_fence_advance: NoFenceAdvance => RACE,
        relaxed_scan: RelaxedScan => RACE,
        no_shootdown_wait: NoShootdownWait => RACE,
        newer_before: NewerBefore => RACE,
        old_note_no_flush: OldNoteNoFlush => RACE,
        note_is_now: NoteIsNow => RACE,
    }
}

mod of_a_request {
    use super::*;

    checks! { REQUEST: holds }
    checks! {
        REQUEST catches
        no_fence_guest: NoFenceGuest => LOST,
        no_request_look: NoRequestLook => LOST,
    }
}
