//! Races by hand: threads that stop at a gate inside the library until the test lets them go on, operations that
//! are seen to wait, and the few verbs that scenarios are made of.
//!
//! A thread stops in a hook of the host or in its backing. Some of those places must not wait by their contract; a
//! thread that stops there stands for one that was preempted there. Invariant: nothing here waits longer than
//! [`PATIENCE`], so a scenario that goes wrong fails and does not hang.

use super::{Handle, TestHost};
use std::cell::RefCell;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::{Scope, ScopedJoinHandle, yield_now};
use std::time::{Duration, Instant};
use vmmu::{
    Backing, Config, Contiguous, Fault, Gfn, GfnRange, Gpa, Host, Outcome, PageSize, Pfn, Region,
    ResolveError, ResolveRequest, Resolved, SlotId, TableFormat, Vcpu, Vm,
};

/// Longer than anything takes that ends.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);
/// Calls of `relax` after which a thread is taken to wait.
const WAITS: u64 = 100;

/// Breaks the rule that `VMMU_MUTANT` names, in every test of this process: for the proof that tests notice.
pub(crate) fn activate_chosen_mutant() {
    #[cfg(feature = "mutants")]
    {
        use vmmu::mutants::{Mutant, activate};
        static CHOSEN: OnceLock<()> = OnceLock::new();
        CHOSEN.get_or_init(|| {
            let Ok(name) = std::env::var("VMMU_MUTANT") else { return };
            let mutant = Mutant::ALL.iter().find(|mutant| mutant.name() == name);
            activate(Some(*mutant.unwrap_or_else(|| panic!("there is no mutant {name}"))));
        });
    }
}

/// What a test does when the library calls a method of the host; nothing, unless it was set.
pub(crate) struct Hook<A>(OnceLock<Box<dyn Fn(A) + Send + Sync>>);

impl<A> Hook<A> {
    pub(crate) fn set(&self, hook: impl Fn(A) + Send + Sync + 'static) {
        assert!(self.0.set(Box::new(hook)).is_ok(), "a hook is set once");
    }
    pub(crate) fn call(&self, argument: A) {
        if let Some(hook) = self.0.get() {
            hook(argument);
        }
    }
}
impl<A> Default for Hook<A> {
    fn default() -> Self {
        Self(OnceLock::new())
    }
}
impl<A> fmt::Debug for Hook<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hook").field("set", &self.0.get().is_some()).finish()
    }
}

/// Polls until `condition` holds; false after [`PATIENCE`].
pub(crate) fn comes_true(mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        if Instant::now() > end {
            return false;
        }
        yield_now();
    }
    true
}

/// A place where threads stop until the test lets them go on.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    /// Somebody stopped; nobody stops any more.
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Gate {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }
    /// Stops the calling thread until the gate is opened.
    pub(crate) fn stop(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = true;
        self.changed.notify_all();
        let opened = self.changed.wait_timeout_while(state, PATIENCE, |state| !state.1);
        let open = opened.is_ok_and(|(state, _)| state.1);
        assert!(open, "the test gave up before it opened the gate");
    }
    /// Waits until a thread has stopped here.
    pub(crate) fn reached(&self) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let stopped = self.changed.wait_timeout_while(state, PATIENCE, |state| !state.0);
        let reached = stopped.is_ok_and(|(state, _)| state.0);
        assert!(reached, "nobody came to the gate");
    }
    /// Whether a thread has stopped.
    pub(crate) fn is_reached(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0
    }
    /// Lets everybody go on, now and later.
    pub(crate) fn open(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.changed.notify_all();
    }
}

struct OwnWaits {
    count: Arc<AtomicU64>,
    since: Instant,
}

std::thread_local! {
    static OWN_WAITS: RefCell<Option<OwnWaits>> = const { RefCell::new(None) };
}

/// A thread's part of a wait: counts it, ends one that has no end, and lets others see what it did before.
pub(crate) fn count_wait() {
    #[cfg(feature = "instrument")]
    vmmu::instrument::drain(0);
    let endless = OWN_WAITS.with_borrow(|own| {
        own.as_ref().is_some_and(|own| {
            own.count.fetch_add(1, Relaxed) % WAITS == 0 && own.since.elapsed() > 3 * PATIENCE
        })
    });
    assert!(!endless, "the operation waits for ever");
}

/// An operation on a thread of its own.
pub(crate) struct Running<'s, T> {
    handle: ScopedJoinHandle<'s, T>,
    waits: Arc<AtomicU64>,
}

/// Starts an operation on a thread of its own.
pub(crate) fn start<'s, T: Send + 's>(
    scope: &'s Scope<'s, '_>,
    work: impl FnOnce() -> T + Send + 's,
) -> Running<'s, T> {
    let waits = Arc::new(AtomicU64::new(0));
    let count = waits.clone();
    let handle = scope.spawn(move || {
        OWN_WAITS.set(Some(OwnWaits { count, since: Instant::now() }));
        work()
    });
    Running { handle, waits }
}

impl<T> Running<'_, T> {
    /// Whether the operation waits for somebody: true once it has asked the host to relax many times, false where
    /// it returned instead.
    pub(crate) fn waits(&self) -> bool {
        self.waits_or(|| false)
    }
    /// The same; false also where `other` holds first.
    pub(crate) fn waits_or(&self, other: impl Fn() -> bool) -> bool {
        let before = self.waits.load(Relaxed);
        let mut waits = false;
        let decided = comes_true(|| {
            waits = self.waits.load(Relaxed) >= before + WAITS;
            waits || self.handle.is_finished() || other()
        });
        assert!(decided, "the operation neither returns nor waits for anything that the host sees");
        waits
    }
    /// Its result, when it has returned.
    pub(crate) fn join(self) -> T {
        self.handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// A backing that asks the test for each answer. Audits ask too.
pub(crate) struct Asked<F>(pub(crate) F);

// SAFETY: frames that tests answer are the host's own for guests, or nobody reads or writes through them.
unsafe impl<F> Backing for Asked<F>
where
    F: Fn(u64, ResolveRequest) -> Result<Resolved, ResolveError> + Send + Sync,
{
    fn resolve(&self, page: u64, request: ResolveRequest) -> Result<Resolved, ResolveError> {
        (self.0)(page, request)
    }
}

/// A writable page of 4 KiB.
#[allow(clippy::unnecessary_wraps)] // it is the whole answer of a backing
pub(crate) fn small(frame: u64) -> Result<Resolved, ResolveError> {
    Ok(Resolved::new(Pfn::new(frame), PageSize::Size4K, true))
}

/// Consecutive frames from `first`, 4 KiB each.
pub(crate) fn run(first: u64, pages: u64) -> Arc<dyn Backing> {
    // SAFETY: the first frames are the host's own for guests; nobody reads or writes through the others.
    Arc::new(unsafe { Contiguous::new(Pfn::new(first), pages) }.max_size(PageSize::Size4K))
}

/// A VM with 4 levels and 48 physical address bits.
pub(crate) fn vm(host: &Arc<TestHost>) -> Vm<Handle> {
    Vm::new(Handle(host.clone()), Config::new(TableFormat::Npt4, 48)).expect("legal")
}

/// Makes slot `id`.
pub(crate) fn set(vm: &Vm<Handle>, id: u16, first: u64, pages: u64, backing: Arc<dyn Backing>) {
    vm.set_region(SlotId::new(id), Region::new(Gfn::new(first), pages, backing)).expect("valid");
}

/// A vCPU that may enter and fault.
pub(crate) fn vcpu(vm: &Vm<Handle>) -> Vcpu<Handle> {
    let mut vcpu = vm.vcpu().expect("alive");
    vcpu.prepare().expect("memory");
    vcpu
}

/// The guest frames from `start` on.
pub(crate) fn pages(start: u64, count: u64) -> GfnRange {
    GfnRange::with_len(Gfn::new(start), count).expect("no wrap")
}

/// A word of one of the host's frames.
pub(crate) fn word(host: &Arc<TestHost>, frame: u64, index: usize) -> &AtomicU64 {
    let at = Handle(host.clone()).frame_ptr(Pfn::new(frame)).expect("a real frame");
    // SAFETY: inside one page of the host's memory, which lives as long as the host; aligned; accessed atomically.
    unsafe { at.add(index * 8).cast::<AtomicU64>().as_ref() }
}

/// The fault of a guest's access to a page.
pub(crate) fn npf(gfn: u64, write: bool) -> Fault {
    Fault::npf(Gpa::new(gfn << 12), 1 << 32 | 4 | u64::from(write) << 1)
}

/// Prepares, and handles the fault of a write.
pub(crate) fn touch(vcpu: &mut Vcpu<Handle>, gfn: u64) -> Outcome {
    vcpu.prepare().expect("memory");
    vcpu.handle_fault(npf(gfn, true)).expect("no error")
}

/// Every leaf: guest frame, host frame, size.
pub(crate) fn mapped(vm: &Vm<Handle>) -> Vec<(u64, u64, PageSize)> {
    let mut all = Vec::new();
    vm.for_each_mapping(|m| all.push((m.gfn.raw(), m.pfn.raw(), m.size))).expect("alive");
    all
}

/// The audit, and every table page in one place. No operation may be under way.
pub(crate) fn orderly(vm: &Vm<Handle>) {
    let report = vm.audit().unwrap_or_else(|broken| panic!("{broken}"));
    let held = report.roots + report.tables + report.free + report.cached + report.retired;
    assert_eq!(held, report.pages, "every table page is in one place: {report:?}");
}
