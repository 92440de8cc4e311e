//! Entries, tags and shootdowns (PROTOCOLS 3): what an entry flushes after each way in which the last one may have
//! ended, and who is kicked and awaited when a translation goes.

mod common;

use common::scene::{
    Asked, Gate, Running, comes_true, mapped, orderly, pages, run, set, start, touch, vcpu, vm,
};
use common::{FIRST_FRAME, Handle, TestHost};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{Scope, scope};
use vmmu::{
    AddressSpace, Config, EntryFlush, Outcome, PageSize, Pfn, PhysCpu, Resolved, SlotId, TableFormat, TagSet,
    Vcpu, Vm,
};

fn processor(tags: u32) -> PhysCpu {
    PhysCpu::new(TagSet::asids(tags + 1, true))
}

/// Tag and flush of an entry that runs.
fn ran(vcpu: &mut Vcpu<Handle>, cpu: &mut PhysCpu) -> (u32, EntryFlush) {
    let entry = vcpu.enter(cpu).expect("prepared");
    let chosen = (entry.tag(), entry.flush());
    entry.ran();
    chosen
}

/// Tag and flush of an entry that is dropped.
fn dropped(vcpu: &mut Vcpu<Handle>, cpu: &mut PhysCpu) -> (u32, EntryFlush) {
    let entry = vcpu.enter(cpu).expect("prepared");
    (entry.tag(), entry.flush())
}

/// A VM whose guest frames 0 to 15 are mapped by `mapping`.
fn machine() -> (Arc<TestHost>, Vm<Handle>, Vcpu<Handle>) {
    let host = TestHost::new();
    let vm = vm(&host);
    set(&vm, 0, 0, 16, run(FIRST_FRAME, 16));
    let mut mapping = vcpu(&vm);
    assert_eq!(touch(&mut mapping, 3), Outcome::Resume);
    (host, vm, mapping)
}

/// PROTOCOLS 3: an entry that was dropped did not run and flushed nothing; the next one owes the same, until one ran.
#[test]
fn a_dropped_entry_flushed_nothing() {
    let (_, vm, mut vcpu) = machine();
    let mut cpu = processor(8);
    let (tag, _) = ran(&mut vcpu, &mut cpu);
    assert_eq!(ran(&mut vcpu, &mut cpu), (tag, EntryFlush::None));
    drop(vm.invalidate(pages(3, 1)).expect("alive"));
    assert_eq!(dropped(&mut vcpu, &mut cpu), (tag, EntryFlush::Tag));
    assert_eq!(dropped(&mut vcpu, &mut cpu), (tag, EntryFlush::Tag), "stale translations are left");
    assert_eq!(ran(&mut vcpu, &mut cpu), (tag, EntryFlush::Tag));
    assert_eq!(ran(&mut vcpu, &mut cpu), (tag, EntryFlush::None));
}

/// PROTOCOLS 3: the flush of everything that a new processor, or a wrap of its tags, owes stays owed until an entry
/// that carried it ran.
#[test]
fn a_dropped_entry_pays_for_no_wrap() {
    let (_, vm, mut a) = machine();
    let mut b = vcpu(&vm);
    let mut cpu = processor(2);
    assert_eq!(dropped(&mut a, &mut cpu).1, EntryFlush::All);
    assert_eq!(dropped(&mut b, &mut cpu).1, EntryFlush::All);
    // Two tags are used up: this wraps.
    assert_eq!(dropped(&mut b, &mut cpu).1, EntryFlush::All);
    assert_eq!(ran(&mut a, &mut cpu).1, EntryFlush::All);
    assert_eq!(ran(&mut a, &mut cpu).1, EntryFlush::None);
    assert_eq!(dropped(&mut b, &mut cpu).1, EntryFlush::All, "this one wraps again");
    assert_eq!(dropped(&mut b, &mut cpu).1, EntryFlush::All);
}

/// PROTOCOLS 3: a vCPU trusts its note only under the processor that it ran under last: its tag is another's there.
#[test]
fn a_note_ends_with_the_processor() {
    let (_, vm, mut a) = machine();
    let mut b = vcpu(&vm);
    let (mut here, mut there) = (processor(8), processor(8));
    let (foreign, _) = ran(&mut b, &mut there);
    let (tag, _) = ran(&mut a, &mut here);
    assert_eq!(tag, foreign, "processors count alike, or this shows nothing");
    let (tag, flush) = ran(&mut a, &mut there);
    assert!(tag != foreign || flush != EntryFlush::None, "another vCPU's translations were used");
    // Back again: the note is from the other processor.
    let (tag, flush) = ran(&mut a, &mut here);
    assert!(tag != foreign || flush != EntryFlush::None, "the guest's own flushes there were lost here");
}

/// PROTOCOLS 3: a wrap ends every note on its processor.
#[test]
fn a_note_ends_with_a_wrap() {
    let (_, vm, mut a) = machine();
    let (mut b, mut c) = (vcpu(&vm), vcpu(&vm));
    let mut cpu = processor(2);
    let (first, _) = ran(&mut a, &mut cpu);
    ran(&mut b, &mut cpu);
    assert_eq!(ran(&mut c, &mut cpu), (first, EntryFlush::All), "this one wraps");
    let (tag, flush) = ran(&mut a, &mut cpu);
    assert!(tag != first || flush == EntryFlush::All, "another vCPU's translations were used");
}

/// PROTOCOLS 3: and with the root, here with the address space, although nothing was flushed in between.
#[test]
fn a_note_ends_with_the_root() {
    let config = Config::new(TableFormat::Npt4, 48).address_spaces(2);
    let vm = Vm::new(Handle(TestHost::new()), config).expect("legal");
    let mut vcpu = vcpu(&vm);
    let mut cpu = processor(8);
    let mut last = ran(&mut vcpu, &mut cpu);
    for space in [AddressSpace::SMM, AddressSpace::NORMAL] {
        vcpu.set_address_space(space).expect("there are two");
        vcpu.prepare().expect("memory");
        let chosen = ran(&mut vcpu, &mut cpu);
        let trusted = chosen.0 == last.0 && chosen.1 == EntryFlush::None;
        assert!(!trusted, "translations of the other address space were used");
        last = chosen;
    }
}

/// PROTOCOLS 3: a forgotten entry may have run, under a tag of which nothing is known now: a fresh tag, or a flush.
#[test]
fn after_a_forgotten_entry_the_tag_is_fresh() {
    let (_, vm, mut vcpu) = machine();
    let mut cpu = processor(8);
    let (tag, _) = ran(&mut vcpu, &mut cpu);
    std::mem::forget(vcpu.enter(&mut cpu).expect("prepared"));
    let chosen = ran(&mut vcpu, &mut cpu);
    let trusted = chosen.0 == tag && chosen.1 == EntryFlush::None;
    assert!(!trusted, "the guest may have flushed nothing of what it changed under this tag");
    assert_eq!(vm.stats().entry_age, 0);
}

/// PROTOCOLS 3: a request that came after `prepare` turns the entry away, once.
#[test]
fn a_request_turns_an_entry_away() {
    let (host, vm, mut vcpu) = machine();
    let mut cpu = processor(8);
    ran(&mut vcpu, &mut cpu);
    vm.kick(vcpu.id());
    assert_eq!(host.kicks.load(Relaxed), 0, "it is out: there is nothing to force");
    assert!(vcpu.enter(&mut cpu).is_err(), "a request was overlooked");
    vcpu.prepare().expect("memory");
    ran(&mut vcpu, &mut cpu);
}

/// Lets `vcpu` run once, so that it has a note, and then stay in the guest until the gate opens. Returns both entries'
/// choice and that of the next.
fn in_guest<'s>(
    s: &'s Scope<'s, '_>,
    vcpu: &'s mut Vcpu<Handle>,
    gate: &'s Gate,
) -> Running<'s, [(u32, EntryFlush); 3]> {
    let running = start(s, || {
        let mut cpu = processor(8);
        let first = ran(vcpu, &mut cpu);
        let entry = vcpu.enter(&mut cpu).expect("prepared");
        let second = (entry.tag(), entry.flush());
        gate.stop();
        entry.ran();
        loop {
            vcpu.prepare().expect("memory");
            // The operation that took it out may ask for it once more.
            if let Ok(entry) = vcpu.enter(&mut cpu) {
                return [first, second, (entry.tag(), entry.flush())];
            }
        }
    });
    gate.reached();
    running
}

/// Whether `vcpu` is kicked, soon.
fn is_kicked(host: &TestHost, vcpu: u32) -> bool {
    comes_true(|| host.kicked.load(Relaxed) & 1 << vcpu != 0)
}

/// PROTOCOLS 3, T148g, T104: whatever takes translations away kicks who is in the guest, waits until it has left,
/// and its next entry flushes what it may have cached until then.
fn takes_away(operation: impl FnOnce(&Vm<Handle>) + Send) {
    let (host, vm, _mapping) = machine();
    let mut running = vcpu(&vm);
    let gate = Gate::new();
    scope(|s| {
        let guest = in_guest(s, &mut running, &gate);
        let operation = start(s, || operation(&vm));
        assert!(is_kicked(&host, 1), "a vCPU that may use the translation was not kicked");
        assert!(operation.waits(), "the operation returned while the guest could use the translation");
        gate.open();
        operation.join();
        let [first, second, next] = guest.join();
        assert_eq!(second, (first.0, EntryFlush::None));
        let trusted = next.0 == first.0 && next.1 == EntryFlush::None;
        assert!(!trusted, "what the guest cached before the shootdown is used after it");
    });
    orderly(&vm);
}

#[test]
fn an_invalidation_kicks_waits_and_flushes() {
    takes_away(|vm| drop(vm.invalidate(pages(3, 1)).expect("alive")));
}

#[test]
fn a_zap_of_all_kicks_waits_and_flushes() {
    takes_away(|vm| vm.zap_all().expect("alive"));
}

#[test]
fn a_delete_kicks_waits_and_flushes() {
    takes_away(|vm| vm.delete_region(SlotId::new(0)).expect("there"));
}

/// T99b, T148h: a large leaf that takes a table's place: translations below the table, and the table itself in the
/// processor's caches, are flushed before the fault is over.
#[test]
fn a_collapse_kicks_waits_and_flushes() {
    let host = TestHost::new();
    let vm = vm(&host);
    let large = Arc::new(AtomicBool::new(false));
    let grown = large.clone();
    let backing = Asked(move |page, _| {
        let size = if grown.load(Relaxed) { PageSize::Size2M } else { PageSize::Size4K };
        Ok(Resolved::new(Pfn::new((1 << 20) + page), size, true))
    });
    set(&vm, 0, 0, 512, Arc::new(backing));
    let (mut mapping, mut running) = (vcpu(&vm), vcpu(&vm));
    assert_eq!(touch(&mut mapping, 3), Outcome::Resume);
    let gate = Gate::new();
    scope(|s| {
        let guest = in_guest(s, &mut running, &gate);
        large.store(true, Relaxed);
        let collapse = start(s, || touch(&mut mapping, 9));
        assert!(is_kicked(&host, 1), "a vCPU that may use the table was not kicked");
        assert!(collapse.waits(), "the fault returned while the guest could use the table");
        gate.open();
        assert_eq!(collapse.join(), Outcome::Resume);
        let [first, second, next] = guest.join();
        assert_eq!((second, next), ((first.0, EntryFlush::None), (first.0, EntryFlush::Tag)));
    });
    assert_eq!(mapped(&vm), [(0, 1 << 20, PageSize::Size2M)]);
    orderly(&vm);
}

/// PROTOCOLS 3: the entries are stored before the generation advances: a vCPU that a kick takes out, and that enters
/// anew with what it flushes then, finds the translation gone.
#[test]
fn a_kick_comes_after_the_zap() {
    let (host, vm, _mapping) = machine();
    let mut running = vcpu(&vm);
    let gate = Gate::new();
    scope(|s| {
        let guest = in_guest(s, &mut running, &gate);
        let invalidation = start(s, || drop(vm.invalidate(pages(3, 1)).expect("alive")));
        assert!(is_kicked(&host, 1));
        let left = vm.stats().pages_4k;
        gate.open();
        invalidation.join();
        guest.join();
        assert_eq!(left, 0, "the guest was kicked, and could cache the translation again");
    });
}

/// PROTOCOLS 2, 3: vCPUs that are out cost a shootdown neither a kick nor a wait, and one that entered since its
/// advance is in nobody's way.
#[test]
fn only_old_guests_are_kicked() {
    let (host, vm, _mapping) = machine();
    let (mut idle, mut running) = (vcpu(&vm), vcpu(&vm));
    idle.prepare().expect("memory");
    let gate = Gate::new();
    drop(vm.invalidate(pages(3, 1)).expect("alive"));
    scope(|s| {
        let guest = in_guest(s, &mut running, &gate);
        let invalidation = start(s, || drop(vm.invalidate(pages(3, 1)).expect("alive")));
        assert!(is_kicked(&host, 2));
        gate.open();
        invalidation.join();
        guest.join();
    });
    drop(vm.invalidate(pages(3, 1)).expect("alive"));
    assert_eq!(host.kicked.load(Relaxed), 1 << 2);
    assert_eq!(host.kicks.load(Relaxed), 1);
}
