//! One preemption, everywhere: an operation stops before its n-th atomic access, another runs until it ends or waits
//! for the first, and the first goes on; for every n. Once with memory as it is, once with the first operation's
//! stores held back until it executes a full fence or a read-modify-write, as a processor may.
//!
//! One pair of operations has two preemptions; more is the simulation's. Needs the `instrument` feature.
#![cfg(feature = "instrument")]

mod common;

use common::scene::{
    Asked, Gate, Running, count_wait, mapped, orderly, pages, run, set, small, start, touch, vcpu, vm, word,
};
use common::{FIRST_FRAME, Handle, TestHost};
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::{Scope, scope};
use vmmu::instrument::{Scheduler, with_scheduler};
use vmmu::{Backing, EntryFlush, Gpa, Outcome, PageSize, Pfn, PhysCpu, Resolved, SlotId, TagSet, Vcpu, Vm};

/// Calls `then` once, before the access that is `left` away.
struct Once<'a> {
    left: Cell<u64>,
    holds_back: bool,
    then: &'a dyn Fn(),
}

impl Scheduler for Once<'_> {
    fn task(&self) -> usize {
        0
    }
    fn step(&self) {
        let left = self.left.get();
        if left > 0 {
            self.left.set(left - 1);
            if left == 1 {
                (self.then)();
            }
        }
    }
    fn relax(&self) {
        count_wait();
        std::thread::yield_now();
    }
    fn drain(&self) -> Option<usize> {
        None
    }
    fn holds_back(&self) -> bool {
        self.holds_back
    }
}

/// Where an operation is preempted, and how its stores behave.
#[derive(Clone, Copy, Debug)]
struct At {
    access: u64,
    holds_back: bool,
}

impl At {
    /// Runs `work`, and `then` in the middle of it; says whether `work` came so far.
    fn run<R>(self, then: impl Fn(), work: impl FnOnce() -> R) -> (R, bool) {
        let once = Once { left: Cell::new(self.access), holds_back: self.holds_back, then: &then };
        let result = with_scheduler(&once, work);
        (result, once.left.get() == 0)
    }
}

/// Runs `scene` with a preemption before each access in turn, until it says that the operation ended before.
fn everywhere(mut scene: impl FnMut(At) -> bool) {
    for holds_back in [false, true] {
        let mut access = 1;
        while scene(At { access, holds_back }) {
            access += 1;
        }
        assert!(access > 5, "only {access} accesses");
    }
}

/// Starts an operation that is seen to wait also where it waits for a lock.
fn watched<'s, T: Send + 's>(s: &'s Scope<'s, '_>, work: impl FnOnce() -> T + Send + 's) -> Running<'s, T> {
    start(s, || At { access: 0, holds_back: false }.run(|| {}, work).0)
}

/// A slot of 2 MiB whose frames begin at `now`, in pages of the size that it has now.
#[derive(Clone, Default)]
struct Memory {
    now: Arc<AtomicU64>,
    large: Arc<AtomicBool>,
}

const OLD: u64 = 1 << 22;
const NEW: u64 = 1 << 23;
const HOLE: u64 = 1 << 20;

impl Memory {
    fn backing(&self) -> Arc<dyn Backing> {
        self.now.store(OLD, Relaxed);
        let Self { now, large } = self.clone();
        Arc::new(Asked(move |page, _| {
            let size = if large.load(Relaxed) { PageSize::Size2M } else { PageSize::Size4K };
            Ok(Resolved::new(Pfn::new(now.load(Relaxed) + page), size, true))
        }))
    }
    /// Whether every leaf leads where the slot's memory is now.
    fn is_mapped_truly(&self, vm: &Vm<Handle>) -> bool {
        mapped(vm).iter().all(|(gfn, pfn, _)| *pfn == self.now.load(Relaxed) + gfn)
    }
}

/// What runs in the middle of a fault.
type Other = fn(&Vm<Handle>, &Memory, &mut Vcpu<Handle>);

const OTHERS: [(&str, Other); 5] = [
    ("a move", |vm, memory, _| {
        let guard = vm.invalidate(pages(0, 512)).expect("alive");
        assert!(mapped(vm).is_empty(), "mapped under an open invalidation");
        memory.now.store(NEW, Relaxed);
        drop(guard);
    }),
    ("a zap of all", |vm, _, _| vm.zap_all().expect("alive")),
    ("a delete", |vm, _, _| {
        vm.delete_region(SlotId::new(0)).expect("there");
        assert!(mapped(vm).is_empty(), "mapped without a slot");
    }),
    ("a collapse", |_, memory, vcpu| {
        memory.large.store(true, Relaxed);
        assert_eq!(touch(vcpu, 9), Outcome::Resume);
    }),
    ("a new slot", |vm, _, _| set(vm, 1, HOLE, 16, run(OLD + HOLE, 16))),
];

/// T71, PROTOCOLS 2, 4, 5: a fault, whatever happens in the middle of it, leaves only leaves that are true, and books
/// that agree.
#[test]
fn a_fault_is_preempted() {
    for (name, other) in OTHERS {
        for (gfn, touched) in [(3, true), (3, false), (HOLE + 3, true)] {
            everywhere(|at| {
                let vm = vm(&TestHost::new());
                let memory = Memory::default();
                set(&vm, 0, 0, 512, memory.backing());
                let (mut faulting, mut second) = (vcpu(&vm), vcpu(&vm));
                if touched {
                    assert_eq!(touch(&mut faulting, 1), Outcome::Resume);
                }
                let reached = scope(|s| {
                    let running = RefCell::new(None);
                    let second = RefCell::new(Some(&mut second));
                    let then = || {
                        let (vm, memory, second) = (&vm, &memory, second.take().expect("once"));
                        let operation = watched(s, move || other(vm, memory, second));
                        operation.waits();
                        running.replace(Some(operation));
                    };
                    let (_, reached) = at.run(then, || touch(&mut faulting, gfn));
                    if let Some(operation) = running.take() {
                        operation.join();
                    }
                    reached
                });
                assert!(memory.is_mapped_truly(&vm), "{name} at {at:?}: {:x?}", mapped(&vm));
                orderly(&vm);
                if gfn >= HOLE && name == "a new slot" && reached {
                    assert_eq!(touch(&mut faulting, gfn), Outcome::Resume, "{name} at {at:?}: a stale entry");
                }
                reached
            });
        }
    }
}

/// T99c, PROTOCOLS 4: a fault that finds its answer in a table rechecks nothing, so grace alone keeps the table what it
/// was. In the middle of the fault its table gives way to a large page, and every table that may be used by then gets
/// entries that say "no slot"; none of them answers the fault.
#[test]
fn a_removed_table_answers_no_fault() {
    const TABLES: u64 = 64;
    everywhere(|at| {
        let vm = vm(&TestHost::new());
        let memory = Memory::default();
        set(&vm, 0, 0, 512, memory.backing());
        let (mut faulting, mut second) = (vcpu(&vm), vcpu(&vm));
        assert_eq!(touch(&mut faulting, 1), Outcome::Resume);
        let second = RefCell::new(&mut second);
        let then = || {
            let second = &mut **second.borrow_mut();
            memory.large.store(true, Relaxed);
            scope(|s| {
                let other = start(s, || {
                    assert_eq!(touch(second, 9), Outcome::Resume);
                    for table in 1..=TABLES {
                        let outcome = touch(second, table * 512 + 3);
                        assert!(matches!(outcome, Outcome::Mmio(_)), "{outcome:?}");
                    }
                });
                other.join();
            });
        };
        let (outcome, reached) = at.run(then, || touch(&mut faulting, 3));
        assert_eq!(outcome, Outcome::Resume, "memory became a device's, at {at:?}");
        assert!(memory.is_mapped_truly(&vm), "at {at:?}: {:x?}", mapped(&vm));
        orderly(&vm);
        reached
    });
}

/// PROTOCOLS 4: the range is open before anything is zapped: no fault in the middle of an invalidation leaves
/// anything in it.
#[test]
fn an_invalidation_is_preempted() {
    everywhere(|at| {
        let vm = vm(&TestHost::new());
        let memory = Memory::default();
        set(&vm, 0, 0, 512, memory.backing());
        let mut faulting = vcpu(&vm);
        assert_eq!(touch(&mut faulting, 3), Outcome::Resume);
        scope(|s| {
            let running = RefCell::new(None);
            let faulting = RefCell::new(Some(&mut faulting));
            let then = || {
                let faulting = faulting.take().expect("once");
                let operation = watched(s, move || touch(faulting, 3));
                operation.waits();
                running.replace(Some(operation));
            };
            let (guard, reached) = at.run(then, || vm.invalidate(pages(3, 1)).expect("alive"));
            if let Some(operation) = running.take() {
                assert_eq!(operation.join(), Outcome::Resume);
            }
            assert!(mapped(&vm).is_empty(), "mapped under an open invalidation, at {at:?}");
            drop(guard);
            orderly(&vm);
            reached
        })
    });
}

/// PROTOCOLS 2, 4, with two preemptions: an invalidation, its stores held back, stops anywhere; a fault begins and
/// stops anywhere; the invalidation goes on until it ends or waits; then the fault does. Whichever was overlooked by
/// the other, Shared or Exclusive, would leave a leaf in the open range.
#[test]
fn an_invalidation_and_a_fault_are_preempted() {
    let (mut outer, mut inner, mut scenes) = (1, 1, 0);
    loop {
        scenes += 1;
        match both_stop(outer, inner) {
            // A fault that waits has accesses without end.
            (_, true) if inner < 60 => inner += 1,
            (true, _) => (outer, inner) = (outer + 1, 1),
            (false, _) => break,
        }
    }
    assert!(outer > 20 && scenes > 300, "{outer} by {scenes}");
}

/// The invalidation stops before access `outer`, the fault before access `inner`; returns which of them did.
fn both_stop(outer: u64, inner: u64) -> (bool, bool) {
    let vm = vm(&TestHost::new());
    let memory = Memory::default();
    set(&vm, 0, 0, 512, memory.backing());
    let mut faulting = vcpu(&vm);
    assert_eq!(touch(&mut faulting, 3), Outcome::Resume);
    let (vm, gate) = (&vm, &Gate::new());
    scope(|s| {
        let invalidation = start(s, move || {
            let running = RefCell::new(None);
            let faulting = RefCell::new(Some(faulting));
            let then = || {
                let mut faulting = faulting.take().expect("once");
                let fault = start(s, move || {
                    let at = At { access: inner, holds_back: false };
                    at.run(|| gate.stop(), || touch(&mut faulting, 4)).1
                });
                fault.waits_or(|| gate.is_reached());
                running.replace(Some(fault));
            };
            let at = At { access: outer, holds_back: true };
            let (guard, reached) = at.run(then, || vm.invalidate(pages(3, 2)).expect("alive"));
            gate.open();
            let inner_reached = running.take().is_some_and(Running::join);
            assert!(mapped(vm).is_empty(), "mapped under an open invalidation, at {outer} and {inner}");
            drop(guard);
            (reached, inner_reached)
        });
        invalidation.waits();
        gate.open();
        let stopped = invalidation.join();
        orderly(vm);
        stopped
    })
}

/// M71, PROTOCOLS 4: a recheck reads the range before the sequence: wherever the end of an invalidation falls in a
/// fault, a frame from before it is not mapped.
#[test]
fn an_end_in_the_middle_of_a_fault() {
    everywhere(|at| {
        let vm = vm(&TestHost::new());
        let memory = Memory::default();
        set(&vm, 0, 0, 512, memory.backing());
        let mut faulting = vcpu(&vm);
        let holds = Gate::new();
        let reached = scope(|s| {
            let holder = watched(s, || {
                let guard = vm.invalidate(pages(3, 1)).expect("alive");
                holds.stop();
                memory.now.store(NEW, Relaxed);
                drop(guard);
            });
            holds.reached();
            let then = || {
                holds.open();
                holder.waits();
            };
            let (_, reached) = at.run(then, || touch(&mut faulting, 3));
            holds.open();
            holder.join();
            reached
        });
        assert!(memory.is_mapped_truly(&vm), "at {at:?}: {:x?}", mapped(&vm));
        orderly(&vm);
        reached
    });
}

/// The same for a read by software, which sees the count in no other way: wherever the end falls, a frame that was
/// given back, and is another's by now, is not read.
#[test]
fn an_end_in_the_middle_of_a_read() {
    const TAKEN: u64 = 0xDEAD;
    for access in 1..80 {
        for holds_back in [false, true] {
            let host = TestHost::new();
            let vm = vm(&host);
            let now = Arc::new(AtomicU64::new(FIRST_FRAME));
            let current = now.clone();
            set(&vm, 0, 0, 16, Arc::new(Asked(move |page, _| small(current.load(Relaxed) + page))));
            let mut reader = vm.reader().expect("alive");
            let holds = Gate::new();
            let word = scope(|s| {
                let holder = watched(s, || {
                    let guard = vm.invalidate(pages(3, 1)).expect("alive");
                    holds.stop();
                    now.store(FIRST_FRAME + 100, Relaxed);
                    drop(guard);
                    // The frame is another's now.
                    word(&host, FIRST_FRAME + 3, 0).store(TAKEN, Relaxed);
                });
                holds.reached();
                let then = || {
                    holds.open();
                    holder.waits();
                };
                let mut bytes = [0; 8];
                let at = At { access, holds_back };
                let (read, _) = at.run(then, || reader.read(Gpa::new(0x3000), &mut bytes));
                holder.join();
                read.expect("backed");
                u64::from_le_bytes(bytes)
            });
            assert_ne!(word, TAKEN, "a frame was read that was given back, at {access}");
        }
    }
}

/// PROTOCOLS 4: an end raises the sequence before it lowers the count: wherever a fault goes on in the middle of an
/// end, a frame that it was given before is not mapped.
#[test]
fn a_fault_in_the_middle_of_an_end() {
    everywhere(|at| {
        let vm = vm(&TestHost::new());
        let gate = Gate::new();
        let stop = gate.clone();
        let now = Arc::new(AtomicU64::new(OLD));
        let current = now.clone();
        let backing = Asked(move |page, _| {
            let answer = current.load(Relaxed) + page;
            stop.stop();
            small(answer)
        });
        set(&vm, 0, 0, 16, Arc::new(backing));
        let mut faulting = vcpu(&vm);
        let reached = scope(|s| {
            let guard = vm.invalidate(pages(3, 1)).expect("alive");
            let fault = start(s, || touch(&mut faulting, 3));
            gate.reached();
            now.store(NEW, Relaxed);
            let then = || {
                gate.open();
                fault.waits();
            };
            let ((), reached) = at.run(then, || drop(guard));
            gate.open();
            assert_eq!(fault.join(), Outcome::Resume);
            reached
        });
        assert_eq!(mapped(&vm), [], "a frame was mapped that was given back, at {at:?}");
        orderly(&vm);
        reached
    });
}

/// PROTOCOLS 3: wherever a shootdown falls in an entry, either it waits for the guest, or the entry flushes.
#[test]
fn an_entry_is_preempted() {
    everywhere(|at| {
        let vm = vm(&TestHost::new());
        let memory = Memory::default();
        set(&vm, 0, 0, 512, memory.backing());
        let mut entering = vcpu(&vm);
        let mut cpu = PhysCpu::new(TagSet::asids(8, true));
        assert_eq!(touch(&mut entering, 3), Outcome::Resume);
        entering.enter(&mut cpu).expect("prepared").ran();
        scope(|s| {
            let (running, awaited) = (RefCell::new(None), Cell::new(false));
            let then = || {
                let vm = &vm;
                let operation = watched(s, move || drop(vm.invalidate(pages(3, 1)).expect("alive")));
                awaited.set(operation.waits());
                running.replace(Some(operation));
            };
            let (entry, reached) = at.run(then, || entering.enter(&mut cpu));
            let entry = entry.expect("no request came");
            let flushed = entry.flush() != EntryFlush::None;
            assert!(!reached || flushed || awaited.get(), "stale translations in the guest, at {at:?}");
            entry.ran();
            if let Some(operation) = running.take() {
                operation.join();
            }
            entering.prepare().expect("memory");
            let next = entering.enter(&mut cpu).expect("prepared").flush() != EntryFlush::None;
            assert!(!reached || flushed || next, "stale translations in the next entry, at {at:?}");
            reached
        })
    });
}

/// PROTOCOLS 1, 4: whoever has a frame in its hands is seen, with stores held back as well.
#[test]
fn an_access_is_preempted() {
    for holds_back in [false, true] {
        let host = TestHost::new();
        let vm = vm(&host);
        set(&vm, 0, 0, 16, run(FIRST_FRAME, 16));
        let mut reader = vm.reader().expect("alive");
        let gate = Gate::new();
        let stop = gate.clone();
        host.on_frame.set(move |_| stop.stop());
        scope(|s| {
            let read = start(s, || {
                At { access: 0, holds_back }.run(|| {}, || reader.read(Gpa::new(0x3000), &mut [0; 8])).0
            });
            gate.reached();
            let invalidation = watched(s, || drop(vm.invalidate(pages(3, 1)).expect("alive")));
            assert!(invalidation.waits(), "a frame was given back while it was read ({holds_back})");
            gate.open();
            assert_eq!(read.join(), Ok(()));
            invalidation.join();
        });
        orderly(&vm);
    }
}
