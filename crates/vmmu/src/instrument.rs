//! A scheduler between the library and memory: for simulation, with the `instrument` feature only.
//!
//! The simulation runs many tasks on one thread. Before each atomic access of the library its [`Scheduler`] may
//! switch tasks; stores go through a buffer of the task's first, as on x86 processors, and become visible when
//! the scheduler says so, in order, or when the task executes a full fence or a read-modify-write. So a fence
//! that is missing shows. A thread without a scheduler is not affected. Invariant: stores of one task become
//! visible in the order in which it made them.

use crate::addr::{Gfn, Level};
use crate::arch::entry::Entry;
use core::cell::{Cell, RefCell};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::collections::VecDeque;
use std::vec::Vec;

/// What decides about tasks. All methods are called on the thread of [`with_scheduler`].
pub trait Scheduler {
    /// The number of the task that runs; small, since state is kept by it.
    fn task(&self) -> usize;
    /// Called before each atomic access: may switch tasks.
    fn step(&self);
    /// Called before a compare-exchange, ahead of [`Scheduler::step`]: a good moment for somebody else to be first.
    fn contend(&self) {}
    /// Called before an entry of a table is read, likewise: a good moment for the table to go away.
    fn walk(&self) {}
    /// Called where a task waits for another: must switch, or nobody gets on.
    fn relax(&self);
    /// Whose oldest store becomes visible now, if anybody's; asked until it says nobody.
    fn drain(&self) -> Option<usize>;
    /// Whether stores of the current task are held back at all.
    fn holds_back(&self) -> bool;
}

/// A store that is not visible yet.
#[derive(Clone, Copy, Debug)]
struct Pending {
    at: NonNull<u8>,
    width: usize,
    value: u64,
}

impl Pending {
    /// Makes it visible.
    fn commit(self) {
        // SAFETY: the place belongs to an atomic of this width on which the library called `store`. The library
        // frees such memory only after a read-modify-write or fence of the task that stored (a lock, a retirement),
        // by which the store had become visible; the simulation drains every buffer before it drops a VM.
        unsafe {
            match self.width {
                1 => self.at.cast::<AtomicBool>().as_ref().store(self.value != 0, Ordering::Release),
                4 => self.at.cast::<AtomicU32>().as_ref().store(self.value as u32, Ordering::Release),
                _ => self.at.cast::<AtomicU64>().as_ref().store(self.value, Ordering::Release),
            }
        }
    }
}

/// An entry of a live table that was changed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Changed {
    /// A guest frame that it covers.
    pub gfn: Gfn,
    /// The level of its table.
    pub level: Level,
    /// What lies below it was made with it: a table in place of a large page.
    pub with_table: bool,
}

std::thread_local! {
    static CHANGED: RefCell<Vec<Changed>> = const { RefCell::new(Vec::new()) };
    static SCHEDULER: Cell<Option<NonNull<dyn Scheduler>>> = const { Cell::new(None) };
    static BUFFERS: RefCell<Vec<VecDeque<Pending>>> = const { RefCell::new(Vec::new()) };
}

fn scheduler<R>(ask: impl FnOnce(&dyn Scheduler) -> R) -> Option<R> {
    // SAFETY: the pointer is set by `with_scheduler` for as long as its borrow lasts.
    SCHEDULER.get().map(|scheduler| ask(unsafe { scheduler.as_ref() }))
}

/// Runs `work` with `scheduler` deciding about every task that it starts on this thread; afterwards every store
/// is visible.
pub fn with_scheduler<R>(scheduler: &dyn Scheduler, work: impl FnOnce() -> R) -> R {
    /// Puts back what was there, also where `work` panics.
    struct Restore(Option<NonNull<dyn Scheduler>>);
    impl Drop for Restore {
        fn drop(&mut self) {
            SCHEDULER.set(self.0);
            BUFFERS.with_borrow_mut(|buffers| buffers.iter_mut().for_each(commit_all));
        }
    }
    let pointer = NonNull::from(scheduler);
    // SAFETY: only the lifetime changes; `Restore` takes the pointer away before the borrow ends.
    let pointer = unsafe {
        core::mem::transmute::<NonNull<dyn Scheduler + '_>, NonNull<dyn Scheduler + 'static>>(pointer)
    };
    let _restore = Restore(SCHEDULER.replace(Some(pointer)));
    work()
}

/// Notes that an entry was changed, for [`take_changed`].
pub(crate) fn changed(gfn: Gfn, level: Level, old: Entry, new: Entry) {
    let with_table = matches!((old, new), (Entry::Leaf(_), Entry::Link(_)));
    if SCHEDULER.get().is_some() {
        CHANGED.with_borrow_mut(|all| all.push(Changed { gfn, level, with_table }));
    }
}

/// The entries of live tables that tasks of this thread changed since this was last called, in order.
pub fn take_changed() -> Vec<Changed> {
    CHANGED.take()
}

/// Whether some task's store is not visible yet.
pub fn holds_back_any() -> bool {
    BUFFERS.with_borrow(|buffers| buffers.iter().any(|buffer| !buffer.is_empty()))
}

fn commit_all(buffer: &mut VecDeque<Pending>) {
    buffer.drain(..).for_each(Pending::commit);
}

fn with_buffer<R>(task: usize, look: impl FnOnce(&mut VecDeque<Pending>) -> R) -> R {
    BUFFERS.with_borrow_mut(|buffers| {
        if buffers.len() <= task {
            buffers.resize_with(task + 1, VecDeque::new);
        }
        look(&mut buffers[task])
    })
}

/// Makes every store of `task` visible: for a task that ends, or enters a guest whose accesses do not go through
/// the library.
pub fn drain(task: usize) {
    with_buffer(task, commit_all);
}

/// The task that runs; 0 without a scheduler.
#[cfg(debug_assertions)]
pub(crate) fn task() -> usize {
    scheduler(|s| s.task()).unwrap_or(0)
}

/// Before an access; hosts may call it where theirs take time.
pub fn step() {
    scheduler(|s| {
        s.step();
        while let Some(task) = s.drain() {
            if let Some(pending) = with_buffer(task, VecDeque::pop_front) {
                pending.commit();
            }
        }
    });
}

/// Before a load: the task's own newest store to that place, if it is still held back.
pub(crate) fn load(at: *const u8, width: usize) -> Option<u64> {
    step();
    let task = scheduler(|s| s.task())?;
    with_buffer(task, |buffer| {
        let same = |p: &&Pending| core::ptr::eq(p.at.as_ptr(), at) && p.width == width;
        buffer.iter().rev().find(same).map(|p| p.value)
    })
}

/// Instead of a store: true where it is held back.
pub(crate) fn store(at: *const u8, width: usize, value: u64) -> bool {
    step();
    let Some(task) = scheduler(|s| s.holds_back().then(|| s.task())).flatten() else { return false };
    let Some(at) = NonNull::new(at.cast_mut()) else { return false };
    with_buffer(task, |buffer| buffer.push_back(Pending { at, width, value }));
    true
}

/// Before a read-modify-write, which makes the task's stores visible.
pub(crate) fn read_modify_write() {
    step();
    fence_only();
}

/// Before a compare-exchange: what [`read_modify_write`] is before others.
pub(crate) fn compare_exchange() {
    scheduler(|s| s.contend());
    read_modify_write();
}

/// Before an entry of a table is read.
pub(crate) fn walk() {
    scheduler(|s| s.walk());
}

/// A full fence.
pub(crate) fn fence() {
    step();
    fence_only();
}

fn fence_only() {
    if let Some(task) = scheduler(|s| s.task()) {
        drain(task);
    }
}

/// Where a task waits; false without a scheduler.
pub(crate) fn relax() -> bool {
    step();
    scheduler(|s| s.relax()).is_some()
}
