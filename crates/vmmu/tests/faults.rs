//! What a fault and an access come to when the host, the backing or the guest is difficult: memory that has run out,
//! transient failures, addresses that nobody has, frames in any order.

mod common;

use common::scene::{Asked, Gate, mapped, npf, orderly, pages, run, set, small, start, touch, vcpu, vm};
use common::{FIRST_FRAME, Handle, TestHost};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::scope;
use vmmu::trace::Event;
use vmmu::{
    Access, Backing, Config, Error, Fault, FetchError, Gfn, GfnRange, Gpa, Gva, Level, Outcome, PageSize,
    PagingState, Pfn, ResolveError, ResolveRequest, Resolved, Scattered, TableFormat, Vm, WalkError,
};

const GIB: u64 = 1 << 18;
const BLOCK: u64 = 256 << 10;

/// Frames from `first` on, each writable from the first request for a write on; and how many such requests came.
fn writable_on_demand(first: u64) -> (Arc<dyn Backing>, Arc<AtomicU64>) {
    let (written, writes) = (Mutex::new(BTreeSet::new()), Arc::new(AtomicU64::new(0)));
    let asked = writes.clone();
    let backing = Asked(move |page, request: ResolveRequest| {
        let mut written = written.lock().expect("not poisoned");
        if request.write {
            asked.fetch_add(1, Relaxed);
            written.insert(page);
        }
        Ok(Resolved::new(Pfn::new(first + page), PageSize::Size4K, written.contains(&page)))
    });
    (Arc::new(backing), writes)
}

/// A VM whose limit is one block of tables, with a slot of 256 GiB.
fn narrow() -> Vm<Handle> {
    let config = Config::new(TableFormat::Npt4, 48).memory_limit(BLOCK);
    let vm = Vm::new(Handle(TestHost::new()), config).expect("legal");
    set(&vm, 0, 0, 256 * GIB, writable_on_demand(1 << 30).0);
    vm
}

/// M158, T72: at the memory limit whatever needs no table goes on: spurious faults, pages of linked tables, upgrades,
/// devices, remembered or not. What needs one says so, and succeeds once there is memory.
#[test]
fn at_the_limit_only_what_needs_a_table_fails() {
    let vm = narrow();
    let mut vcpu = vcpu(&vm);
    // Holds eight prepared tables back.
    let other = common::scene::vcpu(&vm);
    let hole = 1 << 34;
    let mmio = |outcome| matches!(outcome, Ok(Outcome::Mmio(_)));
    assert!(mmio(vcpu.handle_fault(npf(hole, false))));
    assert_eq!(vm.stats().pf_mmio_spte_created, 1);
    assert_eq!(vcpu.handle_fault(npf(3, false)), Ok(Outcome::Resume));
    let full = (1..256)
        .map(|n| (n, vcpu.handle_fault(npf(n * GIB, true))))
        .find(|(_, outcome)| *outcome != Ok(Outcome::Resume));
    let (n, error) = full.expect("256 GiB, two tables for each, do not fit");
    assert_eq!(error, Err(Error::MemoryLimit { limit: BLOCK, used: BLOCK }));
    assert!(n > 10, "only {n} GiB had room");
    let before = vm.stats();
    for _ in 0..2 {
        assert_eq!(vcpu.handle_fault(npf(GIB, true)), Ok(Outcome::Resume), "spurious");
        assert_eq!(vcpu.handle_fault(npf(3, true)), Ok(Outcome::Resume), "an upgrade");
        assert_eq!(vcpu.handle_fault(npf(GIB + 1, true)), Ok(Outcome::Resume), "a linked table");
        assert!(mmio(vcpu.handle_fault(npf(hole, false))), "remembered");
        assert!(mmio(vcpu.handle_fault(npf(1 << 35, false))), "not remembered");
        assert!(matches!(vcpu.handle_fault(npf(n * GIB, true)), Err(Error::MemoryLimit { .. })));
    }
    let after = vm.stats();
    assert_eq!(after.pf_mmio_spte_created, 1);
    assert_eq!(after.pf_mmio_hit, before.pf_mmio_hit + 2);
    assert_eq!(after.pf_fixed, before.pf_fixed + 2);
    assert_eq!(after.pf_spurious, before.pf_spurious + 4);
    assert_eq!(after.table_bytes, BLOCK);
    orderly(&vm);
    drop(other);
    assert_eq!(vcpu.handle_fault(npf(n * GIB, true)), Ok(Outcome::Resume));
    assert_eq!(mapped(&vm).last(), Some(&(n * GIB, (1 << 30) + n * GIB, PageSize::Size4K)));
    orderly(&vm);
}

/// PROTOCOLS 4: a top-up that meets the limit waits for retired tables before it gives up: after everything was
/// zapped there is room again.
#[test]
fn retired_tables_count_as_memory() {
    let vm = narrow();
    let mut vcpu = vcpu(&vm);
    let fill = |vcpu: &mut vmmu::Vcpu<Handle>| {
        (0..256).take_while(|n| vcpu.handle_fault(npf(n * GIB, true)) == Ok(Outcome::Resume)).count()
    };
    let room = fill(&mut vcpu);
    assert!((20..40).contains(&room), "{room} GiB had room");
    for _ in 0..3 {
        vm.zap_all().expect("alive");
        vcpu.prepare().expect("what was zapped is free");
        assert_eq!(fill(&mut vcpu), room);
        orderly(&vm);
    }
}

/// PROTOCOLS 4: where those tables have not passed their grace, the top-up waits for it, holding nothing, instead of
/// reporting that memory has run out.
#[test]
fn a_top_up_waits_for_retired_tables() {
    let host = TestHost::new();
    let vm = Vm::new(Handle(host.clone()), Config::new(TableFormat::Npt4, 48).memory_limit(BLOCK));
    let vm = vm.expect("legal");
    let (shot, inside) = (Gate::new(), Gate::new());
    let (at_shootdown, in_section) = (shot.clone(), inside.clone());
    host.on_trace.set(move |event| {
        if event == Event::RootsInvalidated {
            at_shootdown.stop();
        }
    });
    let backing = Asked(move |page, _| {
        if page == 7 {
            in_section.stop();
        }
        small((1 << 30) + page)
    });
    set(&vm, 0, 0, 256 * GIB, Arc::new(backing));
    let (mut filling, mut walking) = (vcpu(&vm), vcpu(&vm));
    let full = (0..256).map(|n| filling.handle_fault(npf(n * GIB, true))).find(Result::is_err);
    assert_eq!(full, Some(Err(Error::MemoryLimit { limit: BLOCK, used: BLOCK })));
    scope(|s| {
        // A section that is announced after the shootdown and before the tables are unlinked holds them up.
        let zap = start(s, || vm.zap_all().expect("alive"));
        shot.reached();
        let walker = start(s, || touch(&mut walking, 7));
        inside.reached();
        shot.open();
        zap.join();
        assert!(vm.stats().table_pages_retired > 20);
        let prepares = start(s, || filling.prepare());
        assert!(prepares.waits(), "tables that wait for their grace were not waited for");
        inside.open();
        assert_eq!(prepares.join(), Ok(()));
        assert_eq!(walker.join(), Outcome::Resume);
    });
    orderly(&vm);
}

/// T87: a fault is counted once, however often its backing is asked; and the backing is asked to wait only after it
/// could not answer at once.
#[test]
fn a_fault_that_waits_is_one_fault() {
    let vm = vm(&TestHost::new());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = asked.clone();
    let backing = Asked(move |page, request: ResolveRequest| {
        seen.lock().expect("not poisoned").push((page, request.may_wait));
        if request.may_wait { small((1 << 20) + page) } else { Err(ResolveError::WouldWait) }
    });
    set(&vm, 0, 0, 16, Arc::new(backing));
    assert_eq!(touch(&mut vcpu(&vm), 3), Outcome::Resume);
    let stats = vm.stats();
    assert_eq!((stats.pf_taken, stats.pf_fixed, stats.pf_retry), (1, 1, 0));
    assert_eq!(*asked.lock().expect("not poisoned"), [(3, false), (3, true)]);
}

/// M79, M104: what a backing says comes out as what the host can act on, and maps nothing.
#[test]
fn a_backing_that_has_no_page() {
    let gfn = Gfn::new(3);
    for (why, waits) in [
        (ResolveError::OutOfMemory, false),
        (ResolveError::Interrupted, false),
        (ResolveError::Unbacked, false),
        (ResolveError::Poisoned, true),
    ] {
        let vm = vm(&TestHost::new());
        let backing = Asked(move |_, request: ResolveRequest| {
            Err(if waits && !request.may_wait { ResolveError::WouldWait } else { why })
        });
        set(&vm, 0, 0, 16, Arc::new(backing));
        let mut vcpu = vcpu(&vm);
        let outcome = vcpu.handle_fault(npf(3, true));
        if matches!(why, ResolveError::OutOfMemory | ResolveError::Interrupted) {
            assert_eq!(outcome, Err(Error::Backing { gfn, why }));
        } else {
            let Ok(Outcome::MemoryFault(fault)) = outcome else { panic!("{why}: {outcome:?}") };
            assert_eq!((fault.gpa, fault.write, fault.why), (gfn.gpa(), true, why));
        }
        assert_eq!(vcpu.read(gfn.gpa(), &mut [0]), Err(Error::Backing { gfn, why }));
        assert_eq!(mapped(&vm), []);
        orderly(&vm);
    }
}

/// S38, S47: a table that is not there is a page fault of the guest's; one that the host could not supply just now
/// is not, and neither is half an instruction.
#[test]
fn a_host_failure_is_no_guest_fault() {
    let host = TestHost::new();
    let vm = vm(&host);
    // The page that fails, and how.
    let fails = Arc::new(Mutex::new(None));
    let failing = fails.clone();
    let backing = Asked(move |page, _| match *failing.lock().expect("not poisoned") {
        Some((failed, why)) if page == failed => Err(why),
        _ => small(FIRST_FRAME + page),
    });
    set(&vm, 0, 0, 16, Arc::new(backing));
    let mut vcpu = vcpu(&vm);
    let mut entry = |page: u64, index: u64, value: u64| {
        vcpu.write(Gpa::new(page << 12 | index * 8), &value.to_le_bytes()).expect("backed");
    };
    for level in 1..4 {
        entry(level, 0, (level + 1) << 12 | 0x63);
    }
    for page in 6..8 {
        entry(4, page, page << 12 | 0x63);
    }
    vcpu.set_paging(PagingState::new(0x8001_0001, 0x1000, 0x20, 0xD00, 48));
    let gva = Gva::new(0x6FF8);
    assert_eq!(vcpu.fetch_instruction(gva).expect("mapped").len(), 16);
    for why in [ResolveError::OutOfMemory, ResolveError::Interrupted, ResolveError::Poisoned] {
        for table in 1..=4 {
            *fails.lock().expect("not poisoned") = Some((table, why));
            let at = Gpa::new(table << 12 | if table == 4 { 6 * 8 } else { 0 });
            let error = WalkError::Host { at, why: Error::Backing { gfn: Gfn::new(table), why } };
            assert_eq!(vcpu.translate(gva, Access::READ), Err(error));
            let mut bytes = [0; 16];
            assert_eq!(vcpu.fetch(gva, &mut bytes), Err(FetchError::Walk(error)));
        }
        // The second page of the instruction: the guest gets none of it.
        *fails.lock().expect("not poisoned") = Some((7, why));
        let error = WalkError::Host { at: Gpa::new(0x7000), why: Error::Backing { gfn: Gfn::new(7), why } };
        assert_eq!(vcpu.fetch(gva, &mut [0; 16]), Err(FetchError::Walk(error)));
    }
    // Nothing behind a table, or no slot: not present.
    *fails.lock().expect("not poisoned") = Some((2, ResolveError::Unbacked));
    assert!(matches!(vcpu.translate(gva, Access::READ), Err(WalkError::Guest(_))));
    *fails.lock().expect("not poisoned") = None;
    vcpu.paging_mut().cr3 = 0x100_0000;
    assert!(matches!(vcpu.translate(gva, Access::READ), Err(WalkError::Guest(_))));
    vcpu.paging_mut().cr3 = 0x1000;
    assert_eq!(vcpu.translate(gva, Access::READ).expect("mapped").gpa, Gpa::new(0x6FF8));
    // A second page without memory: the guest gets what there is.
    *fails.lock().expect("not poisoned") = Some((7, ResolveError::Unbacked));
    assert_eq!(vcpu.fetch(gva, &mut [0; 16]), Ok(8));
}

/// T75, M26: whatever order frames come in, the guest gets those of its slot and no others: a block that is
/// consecutive but not aligned in the host is no large page, wherever its neighbours lie.
#[test]
fn scattered_frames_are_the_slots_own() {
    let blocks = [0x10_0000, 0x20_0100, 0x20_0300, 0x30_0001, 0x40_0000, 0x50_01FF];
    for first in [0, 1, 0x100, 0x200, 0x3FF] {
        let vm = vm(&TestHost::new());
        let builder = blocks.iter().fold(Scattered::builder(), |b, frame| b.huge(Pfn::new(*frame)));
        let last = [Pfn::new(0x60_0005), Pfn::new(0x60_0003)];
        // SAFETY: nobody reads or writes through these frames.
        let backing = unsafe { builder.pages(&last).build() };
        let count = backing.pages();
        let own: Vec<u64> =
            blocks.iter().flat_map(|b| *b..*b + 512).chain(last.iter().map(|p| p.raw())).collect();
        assert_eq!(own.len() as u64, count);
        set(&vm, 0, first, count, Arc::new(backing));
        let mut vcpu = vcpu(&vm);
        for page in (0..count).step_by(37).chain([count - 2, count - 1]) {
            assert_eq!(touch(&mut vcpu, first + page), Outcome::Resume);
        }
        let mut seen = BTreeSet::new();
        for (gfn, pfn, size) in mapped(&vm) {
            for n in 0..size.pages() {
                let page = (gfn + n).checked_sub(first).expect("inside the slot") as usize;
                assert_eq!(Some(&(pfn + n)), own.get(page), "{size:?} at guest frame {gfn:#x}");
                assert!(seen.insert(page));
            }
        }
        let large = vm.stats().pages_2m;
        assert_eq!(large, if first.is_multiple_of(512) { 2 } else { 0 }, "slot at {first:#x}");
        orderly(&vm);
    }
}

/// T5, M118: guests choose any address, and none of 64 bits is too high for a fault, an access or a walk.
#[test]
fn addresses_at_the_end_of_the_space() {
    for (format, bits) in [(TableFormat::Npt4, 48), (TableFormat::Npt5, 52), (TableFormat::Npt4, 32)] {
        let vm = Vm::new(Handle(TestHost::new()), Config::new(format, bits)).expect("legal");
        let reach = 1u64 << (bits.min(if format == TableFormat::Npt5 { 52 } else { 48 }) - 12);
        set(&vm, 0, reach - 16, 16, run(1 << 18, 16));
        let mut vcpu = vcpu(&vm);
        let mut reader = vm.reader().expect("alive");
        assert_eq!(touch(&mut vcpu, reach - 1), Outcome::Resume);
        let ends = [reach << 12, 1 << 48, 1 << 52, 1 << 63, u64::MAX - 4096, u64::MAX - 7, u64::MAX];
        for raw in ends.into_iter().filter(|raw| *raw >= reach << 12) {
            let gpa = Gpa::new(raw);
            for code in [0x1_0000_0006, 0x1_0000_0014, 0x1_0000_000D, u64::MAX] {
                let outcome = vcpu.handle_fault(Fault::npf(gpa, code)).expect("no error");
                assert!(matches!(outcome, Outcome::Mmio(access) if access.gpa == gpa), "{outcome:?}");
            }
            let refused = |bytes: u64| match raw.checked_add(bytes - 1) {
                Some(_) => Err(Error::NoSlot { gpa }),
                None => Err(Error::Wrap { gpa, bytes }),
            };
            assert_eq!(vcpu.read(gpa, &mut [0]), refused(1));
            assert_eq!(reader.write(gpa, &[0; 8]), refused(8));
            assert_eq!(reader.read(gpa, &mut [0; 8192]), refused(8192));
            vcpu.set_paging(PagingState::new(0x8001_0001, raw, 0x20, 0xD00, 52));
            assert!(vcpu.translate(Gva::new(raw), Access::READ).is_err());
            assert!(vcpu.fetch_instruction(Gva::new(raw)).is_err());
        }
        assert_eq!(vm.stats().pf_mmio_spte_created, 0, "T5: no entry beyond the reach of the tables");
        orderly(&vm);
    }
}

/// M66: any range may be taken away: none at all, the last frame, more than the guest can have, everything.
#[test]
fn ranges_at_the_end_of_the_space() {
    let vm = vm(&TestHost::new());
    let last = (1 << 36) - 1;
    set(&vm, 0, last - 15, 16, run(1 << 20, 16));
    set(&vm, 1, 0, 16, run(1 << 21, 16));
    let mut vcpu = vcpu(&vm);
    let top = Gpa::new(u64::MAX).gfn().raw();
    for (range, kept) in [
        (GfnRange::EMPTY, vec![3, last]),
        (pages(last, 1), vec![3]),
        (pages(last + 1, 1), vec![3, last]),
        (pages(top, 1), vec![3, last]),
        (GfnRange::block(Gfn::new(last), Level::L5), vec![]),
        (pages(4, u64::MAX - 4), vec![3]),
        (GfnRange::new(Gfn::new(0), Gfn::new(u64::MAX)).expect("ordered"), vec![]),
        (GfnRange::ALL, vec![]),
    ] {
        for gfn in [3, last] {
            assert_eq!(touch(&mut vcpu, gfn), Outcome::Resume);
        }
        assert_eq!(mapped(&vm).len(), 2);
        let guard = vm.invalidate(range).expect("alive");
        assert_eq!(guard.range(), range);
        for gfn in [3, last] {
            // What is open stays away, what is not stays there.
            assert_eq!(touch(&mut vcpu, gfn), Outcome::Resume);
        }
        let left: Vec<u64> = mapped(&vm).into_iter().map(|(gfn, ..)| gfn).collect();
        assert_eq!(left, kept, "{range:?}");
        drop(guard);
        orderly(&vm);
    }
}

/// A guest whose frames the host cannot reach runs all the same; only the library's own accesses fail.
#[test]
fn frames_out_of_the_hosts_reach() {
    let vm = vm(&TestHost::new());
    set(&vm, 0, 0, 16, run(FIRST_FRAME, 8));
    set(&vm, 1, 64, 16, run(1 << 24, 16));
    let mut vcpu = vcpu(&vm);
    assert_eq!(touch(&mut vcpu, 64), Outcome::Resume);
    let error = Error::Unreachable { gfn: Gfn::new(64), pfn: Pfn::new(1 << 24) };
    assert_eq!(vcpu.read(Gpa::new(64 << 12), &mut [0]), Err(error));
    // An access that ends in memory that is not there has done what comes before.
    let bytes = [7; 2 * 4096];
    let error = vcpu.write(Gpa::new(7 << 12), &bytes);
    assert_eq!(error, Err(Error::Backing { gfn: Gfn::new(8), why: ResolveError::Unbacked }));
    let mut first = [0; 4096];
    vcpu.read(Gpa::new(7 << 12), &mut first).expect("backed");
    assert!(first.iter().all(|byte| *byte == 7));
}

/// T84: an upgrade keeps what the leaf had; the backing is asked for writes only by writes (M86).
#[test]
fn a_write_upgrades_the_leaf() {
    let vm = vm(&TestHost::new());
    let (backing, writes) = writable_on_demand(1 << 20);
    set(&vm, 0, 0, 16, backing);
    let mut vcpu = vcpu(&vm);
    let mut writable = Vec::new();
    let mut fault = |write| {
        assert_eq!(vcpu.handle_fault(npf(3, write)), Ok(Outcome::Resume));
        vm.for_each_mapping(|m| writable.push(m.writable)).expect("alive");
    };
    for write in [false, false, true, false] {
        fault(write);
    }
    assert_eq!(writable, [false, false, true, true]);
    assert_eq!(writes.load(Relaxed), 1);
    let stats = vm.stats();
    assert_eq!((stats.pf_taken, stats.pf_fixed, stats.pf_spurious), (4, 2, 2));
    orderly(&vm);
}
