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

/// Turns that one task stays the favourite, about.
const FAVOUR: u64 = 64;
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
    holds_back: bool,
    /// The task that ran last waits, or is between two operations.
    waits: Cell<bool>,
    /// A task that would like to get through an operation.
    hurries: Cell<Option<usize>>,
}

impl Baton {
    /// Switches before one access in `switch`, and lets a store become visible before one in `drain`; with
    /// `drain` 0 stores are visible at once.
    pub(crate) fn new(random: Random, switch: u64, drain: u64) -> Rc<Self> {
        Rc::new(Self {
            current: Cell::new(0),
            tasks: Cell::new(0),
            yielder: RefCell::new(vec![std::ptr::null()]),
            random: RefCell::new(random),
            switch,
            drain,
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
        if self.current.get() != 0 && self.random.borrow_mut().one_in(self.switch) {
            self.pause();
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
        let baton = Rc::clone(&self.baton);
        let stack = DefaultStack::new(STACK).expect("memory for a stack");
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
        if self.baton.waits.take() || self.random.one_in(FAVOUR) {
            self.favourite = self.random.below(count as u64) as usize;
        }
        if let Some(task) = self.baton.hurries.take() {
            let place = self.alive.iter().position(|(number, _)| *number == task);
            self.favourite = place.unwrap_or(self.favourite);
        }
        let favoured = self.random.below(100) < self.bias;
        let any = self.random.below(count as u64) as usize;
        let at = if favoured { self.favourite % count } else { any };
        let (number, coroutine) = &mut self.alive[at];
        let number = *number;
        self.baton.current.set(number);
        let result = coroutine.resume(());
        self.baton.current.set(0);
        if let CoroutineResult::Return(()) = result {
            vmmu::instrument::drain(number);
            self.alive.swap_remove(at);
        }
        true
    }
}
