//! Tasks on one thread: coroutines that may be switched at every atomic access of the library.
//!
//! The baton implements the library's [`Scheduler`]: a seed decides before each access whether another task goes
//! on, and when a store that is held back becomes visible. Invariants: one task runs at a time; task 0 is the
//! main loop, which is never switched away from.

use crate::random::Random;
use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use vmmu::instrument::Scheduler;

std::thread_local! {
    /// Stacks of tasks that are over: the system gives new ones slowly, and to one thread at a time.
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

/// Turns that one task stays the favourite, about.
const FAVOUR: u64 = 64;
/// A task that dozes stands still for 32 turns, doubled fewer times than this.
const LONGEST_DOZE: u64 = 7;
/// Stack of a task, in bytes.
const STACK: usize = 256 << 10;

/// Who runs, and how often that changes.
#[derive(Debug)]
pub(crate) struct Baton {
    current: Cell<usize>,
    tasks: Cell<usize>,
    yielder: RefCell<Vec<*const Yielder<(), ()>>>,
    random: RefCell<Random>,
    switch: u64,
    drain: u64,
    doze: u64,
    contend: u64,
    /// Tasks up to this number doze about compare-exchanges.
    contenders: Cell<usize>,
    holds_back: bool,
    /// The task that ran last waits, or is between two operations.
    waits: Cell<bool>,
    /// For how many turns each task stands still in the middle of something.
    asleep: RefCell<Vec<u64>>,
    /// How many do.
    dozers: Cell<usize>,
    /// In how many accesses the task that runs dozes; 0: it was not drawn.
    lingers: Cell<u64>,
    /// A task that would like to get through an operation.
    hurries: Cell<Option<usize>>,
}

impl Baton {
    /// Switches before one access in `switch`, and lets a store become visible before one in `drain`; with
    /// `drain` 0 stores are visible at once. Before one access in `doze` the task stands still for long, so that
    /// others get through whole operations meanwhile; those that contend do so also about one compare-exchange in
    /// `contend`, and before one look at an entry in eight times as many. 0: never.
    pub(crate) fn new(random: Random, switch: u64, drain: u64, doze: u64, contend: u64) -> Rc<Self> {
        Rc::new(Self {
            current: Cell::new(0),
            tasks: Cell::new(0),
            yielder: RefCell::new(vec![std::ptr::null()]),
            random: RefCell::new(random),
            switch,
            drain,
            doze,
            contend,
            contenders: Cell::new(0),
            asleep: RefCell::new(vec![0]),
            dozers: Cell::new(0),
            lingers: Cell::new(0),
            holds_back: drain != 0,
            waits: Cell::new(false),
            hurries: Cell::new(None),
        })
    }

    /// Lets others go on; this task has nothing to get through. Nobody's stores stay invisible for as long as one can
    /// wait.
    pub(crate) fn wait(&self) {
        self.waits.set(true);
        if self.random.borrow_mut().one_in(8) {
            vmmu::instrument::drain(self.current.get());
        }
        self.pause();
    }

    /// Tasks up to this number are those whose races are worth waiting for.
    pub(crate) fn set_contenders(&self, tasks: usize) {
        self.contenders.set(tasks);
    }

    fn is_prone(&self) -> bool {
        (1..=self.contenders.get()).contains(&self.current.get())
    }

    /// Lets others go on for long.
    fn doze(&self) {
        let turns = 32 << self.random.borrow_mut().below(LONGEST_DOZE);
        self.asleep.borrow_mut()[self.current.get()] = turns;
        self.dozers.set(self.dozers.get() + 1);
        self.lingers.set(0);
        self.pause();
    }

    /// Whether somebody stands still in the middle of something.
    pub(crate) fn has_dozer(&self) -> bool {
        self.dozers.get() != 0
    }

    /// So many turns are over.
    fn pass(&self, turns: u64) {
        if self.has_dozer() {
            let mut asleep = self.asleep.borrow_mut();
            asleep.iter_mut().for_each(|left| *left = left.saturating_sub(turns));
            self.dozers.set(asleep.iter().filter(|left| **left != 0).count());
        }
    }

    /// Makes this task the favourite.
    pub(crate) fn hurry(&self) {
        self.hurries.set(Some(self.current.get()));
    }

    /// Lets another task go on.
    pub(crate) fn pause(&self) {
        let yielder = self.yielder.borrow()[self.current.get()];
        if !yielder.is_null() {
            // SAFETY: the pointer is that of the running coroutine's own yielder, which lives on its stack.
            unsafe { &*yielder }.suspend(());
        }
    }
}

impl Scheduler for Baton {
    fn task(&self) -> usize {
        self.current.get()
    }
    fn step(&self) {
        if self.current.get() == 0 {
            return;
        }
        let mut random = self.random.borrow_mut();
        let lingers = self.lingers.get();
        self.lingers.set(lingers.saturating_sub(1));
        let doze = if self.current.get() <= self.contenders.get() { self.doze } else { 64 * self.doze };
        let awake = !self.has_dozer();
        // While one dozes, whoever runs gets far; another one only where they contend.
        if lingers == 1 || awake && random.one_in(doze) {
            drop(random);
            self.doze();
        } else if random.one_in(if awake { self.switch } else { 16 * self.switch }) {
            drop(random);
            self.pause();
        }
    }
    fn walk(&self) {
        if self.is_prone() && self.random.borrow_mut().one_in(8 * self.contend) {
            self.lingers.set(1);
        }
    }
    fn contend(&self) {
        let mut random = self.random.borrow_mut();
        if self.is_prone() && random.one_in(self.contend) {
            // Before it, or before the access after it.
            self.lingers.set(1 + random.below(2));
        }
    }
    fn relax(&self) {
        assert_ne!(self.current.get(), 0, "the main loop waits for a task: nobody will go on");
        self.wait();
    }
    fn drain(&self) -> Option<usize> {
        let mut random = self.random.borrow_mut();
        random.one_in(self.drain).then(|| 1 + random.below(self.tasks.get().max(1) as u64) as usize)
    }
    fn holds_back(&self) -> bool {
        self.holds_back && self.current.get() != 0
    }
}

/// The tasks of one history.
pub(crate) struct Tasks {
    baton: Rc<Baton>,
    alive: Vec<(usize, Coroutine<(), (), (), DefaultStack>)>,
    random: Random,
    /// Of a hundred turns, how many are the favourite's; it gets through whole operations while others stand still.
    bias: u64,
    favourite: usize,
}

impl std::fmt::Debug for Tasks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tasks").field("alive", &self.alive.len()).finish_non_exhaustive()
    }
}

impl Tasks {
    /// No tasks yet.
    pub(crate) fn new(baton: Rc<Baton>, random: Random, bias: u64) -> Self {
        Self { baton, alive: Vec::new(), random, bias, favourite: 0 }
    }

    /// Starts a task; it runs when the loop first chooses it.
    ///
    /// # Panics
    /// If no stack can be had.
    pub(crate) fn spawn(&mut self, body: impl FnOnce() + 'static) {
        let number = self.baton.tasks.get() + 1;
        self.baton.tasks.set(number);
        self.baton.yielder.borrow_mut().push(std::ptr::null());
        self.baton.asleep.borrow_mut().push(0);
        let baton = Rc::clone(&self.baton);
        let stack = STACKS.with_borrow_mut(Vec::pop);
        let stack = stack.unwrap_or_else(|| DefaultStack::new(STACK).expect("memory for a stack"));
        let coroutine = Coroutine::with_stack(stack, move |yielder: &Yielder<(), ()>, ()| {
            baton.yielder.borrow_mut()[number] = yielder;
            body();
            baton.yielder.borrow_mut()[number] = std::ptr::null();
        });
        self.alive.push((number, coroutine));
    }

    /// Lets one task go on until it is switched; false where none is left.
    pub(crate) fn run_one(&mut self) -> bool {
        if self.alive.is_empty() {
            return false;
        }
        let count = self.alive.len();
        let waits = self.baton.waits.take();
        // Where others only wait, they wait for whoever dozes.
        self.baton.pass(if waits { 2 } else { 1 });
        if waits || self.random.one_in(FAVOUR) {
            self.favourite = self.random.below(count as u64) as usize;
        }
        if let Some(task) = self.baton.hurries.take() {
            let place = self.alive.iter().position(|(number, _)| *number == task);
            self.favourite = place.unwrap_or(self.favourite);
        }
        let favoured = self.random.below(100) < self.bias;
        let any = self.random.below(count as u64) as usize;
        let mut at = if favoured { self.favourite % count } else { any };
        if self.baton.has_dozer() {
            let asleep = self.baton.asleep.borrow();
            let awake = (0..count).map(|n| (at + n) % count).find(|at| asleep[self.alive[*at].0] == 0);
            at = awake.unwrap_or(at);
        }
        let (number, coroutine) = &mut self.alive[at];
        let number = *number;
        self.baton.current.set(number);
        let result = coroutine.resume(());
        self.baton.current.set(0);
        if let CoroutineResult::Return(()) = result {
            vmmu::instrument::drain(number);
            let (_, coroutine) = self.alive.swap_remove(at);
            STACKS.with_borrow_mut(|stacks| stacks.push(coroutine.into_stack()));
        }
        true
    }
}
