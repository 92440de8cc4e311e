//! One history as a line can name it: a seed, a number of steps, and what is left out; and how a failing one is
//! made smaller.
//!
//! Invariant: the same case is the same history, to the last step.

use crate::history::{Ended, run};
use crate::scenario::Scenario;
use std::fmt;

/// What a history can be without.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Part {
    /// Allocations of tables that fail, and the limit on them.
    Failures,
    /// Entries that are forgotten, not dropped.
    Forgotten,
    /// Entries that are dropped without having run.
    Dropped,
    /// Reads by software.
    Software,
    /// Fetches by the guest's tables.
    Fetches,
    /// Zaps of everything.
    Zaps,
    /// Moves and deletions of slots.
    SlotChanges,
    /// Memory taken away and given back elsewhere.
    Moves,
    /// Walks ahead of any access.
    Speculation,
    /// Large pages that are made small in place.
    Splits,
    /// Kicks that somebody asks for.
    Kicks,
    /// Backings that refuse, or do not answer.
    Refusals,
    /// Backings that are read-only until they are written to.
    Lazy,
    /// Pages of 1 GiB.
    Giants,
    /// Kicks that take their time.
    Delays,
    /// Tasks that stand still for long in the middle of something.
    Dozes,
    /// Stores that become visible late.
    LateStores,
}

impl Part {
    /// Every part, the least likely to matter first.
    pub const ALL: [Self; 17] = [
        Self::Failures,
        Self::Forgotten,
        Self::Dropped,
        Self::Software,
        Self::Fetches,
        Self::Splits,
        Self::Kicks,
        Self::Zaps,
        Self::SlotChanges,
        Self::Moves,
        Self::Speculation,
        Self::Refusals,
        Self::Lazy,
        Self::Giants,
        Self::Delays,
        Self::Dozes,
        Self::LateStores,
    ];

    /// Its name on a line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Failures => "failures",
            Self::Forgotten => "forgotten",
            Self::Dropped => "dropped",
            Self::Software => "software",
            Self::Fetches => "fetches",
            Self::Splits => "splits",
            Self::Kicks => "kicks",
            Self::Zaps => "zaps",
            Self::SlotChanges => "slot-changes",
            Self::Moves => "moves",
            Self::Speculation => "speculation",
            Self::Refusals => "refusals",
            Self::Lazy => "lazy",
            Self::Giants => "giants",
            Self::Delays => "delays",
            Self::Dozes => "dozes",
            Self::LateStores => "late-stores",
        }
    }
}

/// One history.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Case {
    /// What every choice comes from.
    pub seed: u64,
    /// Where it takes place; none: every rate is drawn.
    pub scenario: Option<Scenario>,
    /// Where it ends.
    pub steps: u64,
    /// What is left out.
    pub without: Vec<Part>,
    /// At most so many vCPUs.
    pub vcpus: usize,
    /// At most so many physical processors.
    pub processors: usize,
}

impl Case {
    /// The history of a seed with everything in it.
    pub const fn new(seed: u64, steps: u64) -> Self {
        Self { seed, scenario: None, steps, without: Vec::new(), vcpus: usize::MAX, processors: usize::MAX }
    }

    /// The smallest history found that still fails, from this one, which fails: what can be left out is, one part
    /// after the other, and it ends where it fails.
    pub fn shrunk(&self) -> (Self, Ended) {
        let mut best = (self.clone(), run(self));
        let attempt = |best: &mut (Self, Ended), change: &dyn Fn(&mut Self)| {
            let mut case = best.0.clone();
            change(&mut case);
            if case == best.0 {
                return;
            }
            let ended = run(&case);
            if ended.violation.is_some() {
                case.steps = ended.steps;
                *best = (case, ended);
            }
        };
        for count in 1..4 {
            attempt(&mut best, &|case| case.vcpus = case.vcpus.min(count));
            attempt(&mut best, &|case| case.processors = case.processors.min(count));
        }
        for part in Part::ALL {
            attempt(&mut best, &|case| case.without.push(part));
        }
        let ends = best.1.steps;
        attempt(&mut best, &|case| case.steps = ends);
        best
    }
}

/// The words that name it on a line.
impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(scenario) = self.scenario {
            write!(f, "--scenario {} ", scenario.name())?;
        }
        write!(f, "--seed {} --steps {}", self.seed, self.steps)?;
        for part in &self.without {
            write!(f, " --without {}", part.name())?;
        }
        if self.vcpus != usize::MAX {
            write!(f, " --vcpus {}", self.vcpus)?;
        }
        if self.processors != usize::MAX {
            write!(f, " --processors {}", self.processors)?;
        }
        Ok(())
    }
}
