//! One seeded history: a machine, a VM, its vCPUs and everybody who changes its memory, until a number of steps.
//!
//! A step is one guest access or one operation begun. Rates differ by seed. Invariants: every choice comes from
//! the seed, so a history repeats; at rest, every few hundred steps and at the end, everything is checked whole.

use crate::actors;
use crate::case::{Case, Part};
use crate::host::SimHost;
use crate::oracle;
use crate::random::Random;
use crate::story::{Story, Violation};
use crate::tasks::{Baton, Tasks};
use crate::world::{SharedWorld, World};
use std::cell::{Cell, RefCell};
use std::mem::ManuallyDrop;
use std::ops::Add;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use vmmu::instrument::with_scheduler;
use vmmu::{Config, PhysCpu, Stats, TableFormat, TagSet, Vm};
use vmmu_machine::{Features, Memory, PhysicalTag, Processor, Quirks};

/// Physical address bits of the simulated processors.
const PHYS_BITS: u8 = 46;
/// Steps between two looks at everything.
const REST_EVERY: u64 = 256;
/// Turns of tasks without a step, after which somebody is said to wait for ever.
const PATIENCE: u32 = 200_000;
/// Steps between two looks where guests leave only when they are kicked, and the steps for which nobody has to wait
/// there.
const REST_EVERY_PATIENT: u64 = 1 << 14;
const PATIENT: u64 = 10_000;

/// The rates of one history, drawn from its seed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rates {
    /// A switch before one atomic access in so many.
    pub switch: u64,
    /// A held-back store becomes visible before one access in so many; 0: stores are not held back.
    pub drain: u64,
    /// Of a hundred turns, how many are those of one task for a while.
    pub bias: u64,
    /// Tags of each processor.
    pub tags: u32,
    /// Processors can flush one tag alone.
    pub flush_by_tag: bool,
    /// Physical processors, and vCPUs.
    pub processors: usize,
    /// Likewise.
    pub vcpus: usize,
    /// Five-level tables.
    pub five_levels: bool,
    /// One allocation of tables in so many fails; 0: none.
    pub fail: u64,
    /// Accesses of an entry, at most.
    pub accesses: u64,
    /// One access in so many goes elsewhere than the last.
    pub away: u64,
    /// A slot is changed once in so many turns.
    pub slot_changes: u64,
    /// Memory is moved once in so many turns of a mover.
    pub moves: u64,
    /// Everything is zapped once in so many turns.
    pub zaps: u64,
    /// One access in so many goes anywhere, not to a slot.
    pub devices: u64,
    /// A vCPU reads by software instead of entering once in so many turns.
    pub software: u64,
    /// One entry in so many is dropped without having run.
    pub dropped: u64,
    /// One entry in so many is forgotten.
    pub forgotten: u64,
    /// One access in so many has a walk ahead of it.
    pub speculation: u64,
    /// Guests leave only when they are kicked, or fault.
    pub patient: bool,
    /// A vCPU fetches instructions by the guest's own tables instead of entering once in so many turns.
    pub fetches: u64,
    /// How many of the places for slots are used, and how many slots there are at most.
    pub places: usize,
    /// Likewise.
    pub slots: u16,
    /// Lengths that slots have, in pages.
    pub lengths: &'static [u64],
    /// One block in so many that could be a large page is one.
    pub large: u64,
    /// One slot in so many is read-only, and one block.
    pub read_only: u64,
    /// One block in so many is answered only to who may wait; then it takes up to so many turns.
    pub slow: u64,
    /// Likewise.
    pub delay: u64,
    /// Who moves memory.
    pub movers: u64,
    /// One move in so many of a large page moves one page of it, and makes the rest small where it is.
    pub splits: u64,
    /// One invalidation in so many changes nothing.
    pub idle: u64,
}

impl Rates {
    pub(crate) fn draw(random: &mut Random) -> Self {
        Self {
            switch: random.pick(&[3, 8, 20, 60]),
            drain: random.pick(&[0, 4, 60, 1000]),
            bias: random.pick(&[0, 60, 95]),
            tags: random.pick(&[1, 2, 3, 8]),
            flush_by_tag: random.one_in(2),
            processors: 1 + random.below(3) as usize,
            vcpus: 1 + random.below(4) as usize,
            five_levels: random.one_in(4),
            fail: random.pick(&[0, 0, 3]),
            accesses: random.pick(&[4, 20, 80]),
            away: 2,
            slot_changes: random.pick(&[20, 100, 400]),
            moves: random.pick(&[6, 30, 150]),
            zaps: random.pick(&[50, 300, 1000]),
            devices: random.pick(&[12, 40]),
            software: 8,
            dropped: 32,
            forgotten: 32,
            speculation: 8,
            patient: random.one_in(8),
            fetches: 12,
            places: 6,
            slots: 4,
            lengths: &[4, 6, 512, 520],
            large: 2,
            read_only: 9,
            slow: 4,
            delay: random.pick(&[1, 4, 40]),
            movers: 2,
            splits: 4,
            idle: 8,
        }
    }

    /// Leaves out what the case leaves out.
    fn limit(&mut self, case: &Case) {
        self.vcpus = self.vcpus.min(case.vcpus.max(1));
        self.processors = self.processors.min(case.processors.max(1));
        for part in &case.without {
            *match part {
                Part::Failures => &mut self.fail,
                Part::Forgotten => &mut self.forgotten,
                Part::Dropped => &mut self.dropped,
                Part::Software => &mut self.software,
                Part::Zaps => &mut self.zaps,
                Part::SlotChanges => &mut self.slot_changes,
                Part::Moves => &mut self.moves,
                Part::Speculation => &mut self.speculation,
                Part::LateStores => &mut self.drain,
                Part::Fetches => &mut self.fetches,
                Part::Splits => &mut self.splits,
            } = 0;
        }
    }
}

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
    /// The step at which the last zap of everything began that is over.
    pub(crate) zapped: Cell<u64>,
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
    /// Reads by software.
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
    /// Tells what a task does.
    pub(crate) fn tell(&self, who: &str, what: impl FnOnce() -> String) {
        self.story.borrow_mut().tell(self.steps.get(), who, what());
    }
    /// Ends the history with what is wrong.
    pub(crate) fn violate(&self, violation: Violation) {
        self.story.borrow_mut().violate(violation);
    }
    /// Between two operations: lets others go on, and rests while everything is looked at.
    pub(crate) fn boundary(&self) {
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
    /// What was wrong, with the last steps.
    pub violation: Option<String>,
}

/// Runs one history to its end, or to the first thing that is wrong.
///
/// # Panics
/// If the host of this program has no memory for the stacks of its tasks.
pub fn run(case: &Case) -> Ended {
    let mut random = Random::new(case.seed);
    let mut rates = Rates::draw(&mut random);
    if let Some(scenario) = case.scenario {
        scenario.direct(&mut rates);
    }
    rates.limit(case);
    let memory = Arc::new(Memory::new());
    let host = SimHost::new(Arc::clone(&memory), Random::new(random.bits()), rates.fail);
    let format = if rates.five_levels { TableFormat::Npt5 } else { TableFormat::Npt4 };
    let vm = Vm::new(host.clone(), Config::new(format, PHYS_BITS)).expect("a legal configuration");
    let processors = (0..rates.processors)
        .map(|_| Physical {
            model: RefCell::new(Processor::new(Features::amd(PHYS_BITS), Quirks::NONE)),
            tags: RefCell::new(PhysCpu::new(TagSet::asids(64, rates.flush_by_tag).limited_to(rates.tags))),
            guest: Cell::new(None),
        })
        .collect();
    let baton = Baton::new(Random::new(random.bits()), rates.switch, rates.drain);
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
        zapped: Cell::new(0),
    });
    let performed =
        catch_unwind(AssertUnwindSafe(|| with_scheduler(&*baton, || perform(&stage, &mut random))));
    if let Err(panic) = performed {
        let said = panic.downcast_ref::<String>().map(String::as_str);
        let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("something");
        stage.violate(Violation::new(format!("a panic: {said}")));
    }
    let (steps, accesses, violation) = (stage.steps.get(), stage.accesses.get(), stage.story.borrow().told());
    // Where something is wrong, tasks stand where they are, and may hold what the counters are under.
    let stats = if violation.is_none() { stage.vm.stats() } else { Stats::default() };
    let violation = match (violation, Rc::try_unwrap(stage)) {
        (None, Ok(stage)) => {
            let host = stage.host.clone();
            drop(stage);
            let lost = host.blocks_out();
            (lost != 0).then(|| format!("wrong: {lost} blocks of tables were not given back"))
        }
        (None, Err(_)) => unreachable!("every task is over"),
        // Whatever is broken may not come apart in order.
        (violation, stage) => {
            std::mem::forget(stage);
            violation
        }
    };
    Ended { rates, steps, stats, accesses, violation }
}

/// Lets tasks go on until the history is over, or something is wrong: then they stay where they are.
fn perform(stage: &Rc<Stage>, random: &mut Random) {
    let mut tasks =
        ManuallyDrop::new(Tasks::new(Rc::clone(&stage.baton), Random::new(random.bits()), stage.rates.bias));
    let mut count = 0;
    let mut spawn = |body: fn(&Stage, Random), number: u64| {
        let (stage, random) = (Rc::clone(stage), Random::new(random.bits() ^ number));
        tasks.spawn(move || {
            body(&stage, random);
            // Over is at rest for good.
            stage.resting.set(stage.resting.get() + 1);
        });
        count += 1;
    };
    for number in 0..stage.rates.vcpus as u64 {
        spawn(actors::vcpu, number);
    }
    for number in 0..stage.rates.movers {
        spawn(actors::mover, 200 + number);
    }
    spawn(actors::slots, 102);
    spawn(actors::zapper, 103);
    let (mut turns, mut seen) = (0, 0);
    while tasks.run_one() {
        if stage.story.borrow().violation.is_some() {
            return;
        }
        if stage.rest.get() && stage.resting.get() == count {
            // Nobody is in the middle of anything: every store is visible, every invariant holds.
            for task in 1..=count {
                vmmu::instrument::drain(task);
            }
            if let Err(violation) = oracle::everything(stage) {
                stage.violate(violation);
                return;
            }
            stage.rest.set(false);
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
    if let Err(violation) = oracle::everything(stage) {
        stage.violate(violation);
    }
    ManuallyDrop::into_inner(tasks);
}
