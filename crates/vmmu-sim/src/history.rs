//! One seeded history: a machine, a VM, its vCPUs and everybody who changes its memory, until a number of steps.
//!
//! A step is one guest access or one operation begun. Rates differ by seed. Invariants: every choice comes from
//! the seed, so a history repeats; at rest, every few hundred steps and at the end, everything is checked whole.

use crate::audits;
use crate::case::Case;
use crate::coverage::Coverage;
use crate::host::{self, SimHost};
use crate::kicks::{self, Kicks};
use crate::movers;
use crate::random::Random;
use crate::rates::Rates;
use crate::slots;
use crate::software;
use crate::story::{Story, Violation};
use crate::tasks::{Baton, Tasks};
use crate::vcpus;
use crate::world::{SharedWorld, World};
use std::cell::{Cell, RefCell};
use std::mem::ManuallyDrop;
use std::ops::Add;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use vmmu::instrument::{self, with_scheduler};
use vmmu::{AddressSpace, Config, GfnRange, PhysCpu, Stats, TableFormat, TagSet, Vm};
use vmmu_machine::{AccessKind, Features, Memory, PhysicalTag, Processor, Quirks};

std::thread_local! {
    /// The memory of this thread's last history: the system gives and takes memory slowly, for one thread at a time.
    static MEMORY: Cell<Option<Memory>> = const { Cell::new(None) };
}

/// Physical address bits of the simulated processors.
const PHYS_BITS: u8 = 46;
/// Steps between two looks at everything.
const REST_EVERY: u64 = 256;
/// Turns of tasks without a step, after which somebody is said to wait for ever.
const PATIENCE: u32 = 1_000_000;
/// Steps between two rests where guests leave only when they are kicked, and the steps for which nobody has to wait
/// there. Everything is looked at more often, while they stay.
const REST_EVERY_PATIENT: u64 = 1 << 14;
const PATIENT: u64 = 10_000;

/// A physical processor: its caches, and the library's tags for it.
pub(crate) struct Physical {
    pub(crate) model: RefCell<Processor>,
    pub(crate) tags: RefCell<PhysCpu>,
    /// The tag of the guest that it runs now.
    pub(crate) guest: Cell<Option<PhysicalTag>>,
}

/// What all tasks of a history share.
pub(crate) struct Stage {
    pub(crate) vm: Vm<SimHost>,
    pub(crate) host: SimHost,
    pub(crate) memory: Arc<Memory>,
    pub(crate) processors: Vec<Physical>,
    pub(crate) world: SharedWorld,
    pub(crate) baton: Rc<Baton>,
    pub(crate) rates: Rates,
    pub(crate) story: RefCell<Story>,
    pub(crate) steps: Cell<u64>,
    pub(crate) target: u64,
    /// Tasks are to come to rest.
    pub(crate) rest: Cell<bool>,
    /// Tasks that are at rest, or over.
    pub(crate) resting: Cell<usize>,
    pub(crate) accesses: Cell<Accesses>,
    /// The last fault, or that of who stands still.
    pub(crate) hot: Cell<(u64, AccessKind)>,
    /// Tasks that are in no operation of the library: between two, in the guest, or over.
    pub(crate) idle: Cell<usize>,
    /// Guest frames of which something changed, other than an entry, since the last audit of what changed.
    pub(crate) touched: RefCell<Vec<GfnRange>>,
    /// Roots that had been zapped by then.
    pub(crate) roots_gone: Cell<u64>,
    /// The step at which the last zap of everything began that is over.
    pub(crate) zapped: Cell<u64>,
    /// Operations on the VM.
    pub(crate) operations: Tally,
    /// Writes to guest memory by software.
    pub(crate) writes: Tally,
    /// For each vCPU, what kicks owe it.
    pub(crate) kicks: Kicks,
}

/// How many of something were begun, and how many of them are not over.
#[derive(Default)]
pub(crate) struct Tally {
    begun: Cell<u64>,
    open: Cell<u64>,
}

/// One that is not over.
pub(crate) struct Open<'a>(&'a Tally);

impl Tally {
    /// Begins one, until what this returns is dropped.
    pub(crate) fn begin(&self) -> Open<'_> {
        self.begun.set(self.begun.get() + 1);
        self.open.set(self.open.get() + 1);
        Open(self)
    }
    /// While this is the same, there is none; `None` where there is one.
    pub(crate) fn quiet(&self) -> Option<u64> {
        (self.open.get() == 0).then(|| self.begun.get())
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
    }
}

/// What accesses came to.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Accesses {
    /// Reached memory.
    pub translated: u64,
    /// Faulted.
    pub faulted: u64,
    /// Faults that the library answered with another try.
    pub resumed: u64,
    /// Faults that came to a device.
    pub devices: u64,
    /// Faults that came to a write of read-only memory.
    pub read_only: u64,
    /// Faults that the backing had no memory for.
    pub refused: u64,
    /// Reads and writes by software.
    pub software: u64,
    /// Instructions fetched by the guest's tables.
    pub fetched: u64,
}

impl Add for Accesses {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            translated: self.translated + other.translated,
            faulted: self.faulted + other.faulted,
            resumed: self.resumed + other.resumed,
            devices: self.devices + other.devices,
            read_only: self.read_only + other.read_only,
            refused: self.refused + other.refused,
            software: self.software + other.software,
            fetched: self.fetched + other.fetched,
        }
    }
}

impl Stage {
    /// Begins a step; false where the history is over.
    pub(crate) fn step(&self) -> bool {
        if self.over() {
            return false;
        }
        let step = self.steps.get() + 1;
        self.steps.set(step);
        let every = if self.rates.patient { REST_EVERY_PATIENT } else { REST_EVERY };
        if step.is_multiple_of(every) {
            self.rest.set(true);
        }
        true
    }
    /// Begins a step that is an operation on the VM; half of them hurry.
    pub(crate) fn begin(&self, random: &mut Random) -> bool {
        if random.one_in(2) {
            self.baton.hurry();
        }
        self.step()
    }
    /// Whether the history has all its steps, or a violation.
    pub(crate) fn over(&self) -> bool {
        self.steps.get() >= self.target || self.story.borrow().violation.is_some()
    }
    /// An operation that began at step `began` is over: no guest may have held it up for long.
    pub(crate) fn returned(&self, what: &str, began: u64) {
        let steps = self.steps.get() - began;
        if self.rates.patient && steps > PATIENT {
            self.violate(Violation::new(format!("{what} took {steps} steps: a guest was not kicked")));
        }
    }
    /// The word at `at` of each page that may be behind `gfn` in `space` now.
    pub(crate) fn words(&self, space: AddressSpace, gfn: u64, at: u64) -> Vec<u64> {
        self.world.borrow().allowed(space, gfn).map(|(pfn, _)| self.host.word(pfn, at as usize)).collect()
    }
    /// One of the address spaces.
    pub(crate) fn some_space(&self, random: &mut Random) -> AddressSpace {
        if random.below(u64::from(self.rates.spaces)) == 0 { AddressSpace::NORMAL } else { AddressSpace::SMM }
    }
    /// Tells what a task does.
    pub(crate) fn tell(&self, who: &str, what: impl FnOnce() -> String) {
        self.story.borrow_mut().tell(self.steps.get(), who, what());
    }
    /// Ends the history with what is wrong.
    pub(crate) fn violate(&self, violation: Violation) {
        self.story.borrow_mut().violate(violation);
    }
    /// Lets others go on while this task is in no operation of the library.
    pub(crate) fn idly(&self, pause: impl FnOnce()) {
        self.idle.set(self.idle.get() + 1);
        pause();
        self.idle.set(self.idle.get() - 1);
    }
    /// Notes that something changed behind these guest frames.
    pub(crate) fn touch(&self, gfn: u64, pages: u64) {
        let range = GfnRange::with_len(vmmu::Gfn::new(gfn), pages).unwrap_or(GfnRange::ALL);
        self.touched.borrow_mut().push(range);
    }
    /// Between two operations: lets others go on, and rests while everything is looked at.
    pub(crate) fn boundary(&self) {
        self.idly(|| self.between());
    }
    fn between(&self) {
        self.baton.wait();
        if self.rest.get() {
            self.resting.set(self.resting.get() + 1);
            while self.rest.get() && !self.over() {
                self.baton.wait();
            }
            self.resting.set(self.resting.get() - 1);
        }
    }
}

/// How a history ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ended {
    /// Its rates.
    pub rates: Rates,
    /// Steps that it made.
    pub steps: u64,
    /// What the library counted; nothing where something is wrong.
    pub stats: Stats,
    /// What guest accesses came to.
    pub accesses: Accesses,
    /// What the library was made to do.
    pub coverage: Coverage,
    /// What was wrong, with the last steps.
    pub violation: Option<String>,
}

/// Runs one history to its end, or to the first thing that is wrong.
///
/// # Panics
/// If the host of this program has no memory for the stacks of its tasks.
pub fn run(case: &Case) -> Ended {
    let mut random = Random::new(case.seed);
    let mut rates = match case.scenario {
        None => Rates::draw(&mut random),
        Some(scenario) => {
            let mut rates = Rates::plain(&mut random);
            scenario.direct(&mut rates);
            rates
        }
    };
    rates.limit(case);
    let memory = Arc::new(MEMORY.take().unwrap_or_default());
    let (failures, delay) = (rates.failures, rates.kick_delay);
    let host = SimHost::new(Arc::clone(&memory), Random::new(random.bits()), failures, delay);
    let format = if rates.five_levels { TableFormat::Npt5 } else { TableFormat::Npt4 };
    let limit = if rates.limit == 0 { u64::MAX } else { rates.limit * host::BLOCK };
    let config = Config::new(format, PHYS_BITS)
        .memory_limit(limit)
        .address_spaces(rates.spaces)
        .optimizations(rates.optimizations);
    let vm = Vm::new(host.clone(), config).expect("a legal configuration");
    // What an earlier history of this thread left behind is not this one's.
    drop((Coverage::take(), instrument::take_changed()));
    let processors = (0..rates.processors)
        .map(|_| Physical {
            model: RefCell::new(Processor::new(Features::amd(PHYS_BITS), Quirks::NONE)),
            tags: RefCell::new(PhysCpu::new(TagSet::asids(64, rates.flush_by_tag).limited_to(rates.tags))),
            guest: Cell::new(None),
        })
        .collect();
    let baton = Baton::new(Random::new(random.bits()), rates.switch, rates.drain, rates.doze, rates.contend);
    let stage = Rc::new(Stage {
        vm,
        host,
        memory,
        processors,
        world: Rc::new(RefCell::new(World::new(1 << 21))),
        baton: Rc::clone(&baton),
        rates,
        story: RefCell::new(Story::new()),
        steps: Cell::new(0),
        target: case.steps,
        rest: Cell::new(false),
        resting: Cell::new(0),
        accesses: Cell::new(Accesses::default()),
        hot: Cell::new((0, AccessKind::Write)),
        idle: Cell::new(0),
        touched: RefCell::default(),
        roots_gone: Cell::new(0),
        zapped: Cell::new(0),
        operations: Tally::default(),
        writes: Tally::default(),
        kicks: Kicks::default(),
    });
    let performed =
        catch_unwind(AssertUnwindSafe(|| with_scheduler(&*baton, || perform(&stage, &mut random))));
    if let Err(panic) = performed {
        let said = panic.downcast_ref::<String>().map(String::as_str);
        let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("something");
        stage.violate(Violation::new(format!("a panic: {said}")));
    }
    let coverage = Coverage::take();
    if let Some(change) = coverage.unlisted() {
        stage.violate(Violation::new(format!("an entry changed as no operation changes it: {change}")));
    }
    let (steps, accesses, violation) = (stage.steps.get(), stage.accesses.get(), stage.story.borrow().told());
    // Where something is wrong, tasks stand where they are, and may hold what the counters are under.
    let stats = if violation.is_none() { stage.vm.stats() } else { Stats::default() };
    let violation = match (violation, Rc::try_unwrap(stage)) {
        (None, Ok(stage)) => {
            let (host, memory) = (stage.host.clone(), Arc::clone(&stage.memory));
            drop(stage);
            let lost = host.blocks_out();
            drop(host);
            if let Ok(mut memory) = Arc::try_unwrap(memory) {
                memory.clear();
                MEMORY.set(Some(memory));
            }
            (lost != 0).then(|| format!("wrong: {lost} blocks of tables were not given back"))
        }
        (None, Err(_)) => unreachable!("every task is over"),
        // Whatever is broken may not come apart in order.
        (violation, stage) => {
            std::mem::forget(stage);
            violation
        }
    };
    Ended { rates, steps, stats, accesses, coverage, violation }
}

/// Lets tasks go on until the history is over, or something is wrong: then they stay where they are.
fn perform(stage: &Rc<Stage>, random: &mut Random) {
    let mut tasks =
        ManuallyDrop::new(Tasks::new(Rc::clone(&stage.baton), Random::new(random.bits()), stage.rates.bias));
    let mut count = 0;
    let mut spawn = |body: fn(&Stage, Random), number: u64| {
        let (stage, random) = (Rc::clone(stage), Random::new(random.bits() ^ number));
        tasks.spawn(move || {
            stage.idle.set(stage.idle.get() - 1);
            body(&stage, random);
            stage.idle.set(stage.idle.get() + 1);
            // Over is at rest for good.
            stage.resting.set(stage.resting.get() + 1);
        });
        count += 1;
    };
    stage.baton.set_contenders(stage.rates.vcpus);
    for number in 0..stage.rates.vcpus as u64 {
        spawn(vcpus::vcpu, number);
    }
    for number in 0..stage.rates.movers {
        spawn(movers::mover, 200 + number);
    }
    spawn(slots::slots, 102);
    spawn(slots::zapper, 103);
    spawn(kicks::kicker, 104);
    for number in 0..stage.rates.readers {
        spawn(software::reader, 300 + number);
    }
    stage.idle.set(count);
    let (mut turns, mut seen, mut looked) = (0, 0, 0);
    while tasks.run_one() {
        if stage.story.borrow().violation.is_some() {
            return;
        }
        if stage.rest.get() && stage.resting.get() == count {
            // Nobody is in the middle of anything: every store is visible, every invariant holds.
            for task in 1..=count {
                instrument::drain(task);
            }
            if let Err(violation) = audits::whole(stage) {
                stage.violate(violation);
                return;
            }
            stage.rest.set(false);
        } else if stage.idle.get() == count && !instrument::holds_back_any() {
            // Nor here, though guests may run.
            let due = stage.rates.patient && stage.steps.get() - looked >= REST_EVERY;
            looked = if due { stage.steps.get() } else { looked };
            if let Err(violation) = if due { audits::whole(stage) } else { audits::changed(stage) } {
                stage.violate(violation);
                return;
            }
        }
        turns = if stage.steps.get() == seen { turns + 1 } else { 0 };
        seen = stage.steps.get();
        if turns == PATIENCE {
            stage.violate(Violation::new(format!(
                "nobody got on for {PATIENCE} turns: somebody waits for ever"
            )));
            return;
        }
    }
    if let Err(violation) = audits::whole(stage) {
        stage.violate(violation);
    }
    ManuallyDrop::into_inner(tasks);
}
