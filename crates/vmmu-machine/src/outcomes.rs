//! The set of outcomes that an access may have, and the choice of one.
//!
//! Invariant: a set belongs to one moment: once the processor did anything else, or an entry changed, it
//! chooses nothing any more.

use crate::access::AccessKind;
use crate::addr::Gva;
use crate::choose::{Follow, Mark, MemoryChanged, fault_removes};
use crate::hash::Choice;
use crate::memory::Memory;
use crate::outcome::Outcome;
use crate::processor::Processor;
use crate::provenance::Provenance;
use crate::search::{End, Graph};
use std::fmt;
use std::sync::Arc;

/// See the module. Made by [`Processor::access`].
#[must_use]
#[derive(Clone, Debug)]
pub struct Outcomes {
    pub(crate) graph: Graph,
    /// The linear address, if the access has one.
    pub(crate) gva: Option<Gva>,
    pub(crate) kind: Option<AccessKind>,
    /// [`Processor::changes`] when the search was made.
    pub(crate) changes: u64,
}

/// Why nothing was chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NotChosen {
    /// The processor did something since the search.
    ProcessorChanged,
    /// An entry changed since the search.
    MemoryChanged(MemoryChanged),
    /// The wanted outcome is not in the set.
    NotInSet,
}

impl fmt::Display for NotChosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ProcessorChanged => f.write_str("the processor did something since the search"),
            Self::MemoryChanged(changed) => changed.fmt(f),
            Self::NotInSet => f.write_str("the wanted outcome is not in the set"),
        }
    }
}

impl std::error::Error for NotChosen {}

impl Outcomes {
    fn ends(&self) -> impl Iterator<Item = (usize, &End)> {
        self.graph.ends.iter().enumerate()
    }

    /// Each outcome once.
    pub fn iter(&self) -> impl Iterator<Item = &Outcome> {
        self.ends()
            .filter(|&(at, end)| self.graph.ends[..at].iter().all(|other| other.outcome != end.outcome))
            .map(|(_, end)| &end.outcome)
    }

    /// Whether `outcome` is in the set.
    pub fn contains(&self, outcome: &Outcome) -> bool {
        self.ends().any(|(_, end)| end.outcome == *outcome)
    }

    /// The outcome, where there is but one.
    pub fn only(&self) -> Option<Outcome> {
        let mut all = self.iter();
        let first = all.next()?;
        if all.next().is_some() { None } else { Some(*first) }
    }

    /// Where an outcome comes from: a story for each TLB entry that gives it, and one for its walks. For the
    /// processor that made the set, while it has done nothing else.
    pub fn explain(&self, processor: &Processor, outcome: &Outcome) -> Vec<Arc<Provenance>> {
        if self.changes != processor.changes() {
            return Vec::new();
        }
        let (caches, regime) = (processor.caches(), processor.regime());
        self.ends()
            .filter(|(_, end)| end.outcome == *outcome)
            .map(|(_, end)| {
                let choice = Choice::new(0);
                Follow::new(&self.graph, caches, regime, processor.step(), false, self.gva, choice)
                    .explain(end)
            })
            .collect()
    }

    /// The accessed and dirty flags that an outcome sets, by the first of the ways to it, in the order of the
    /// walk; entries that have theirs are left out. A translation sets them all. A fault sets, in each
    /// stage, those down to an entry of the processor's choice, or none, and the dirty flag of a first stage's
    /// leaf or not. Asked of the processor that made the set; empty once it has done anything else, and for an outcome
    /// that is not of the set.
    pub fn marks(&self, processor: &Processor, outcome: &Outcome) -> Vec<Mark> {
        let Some(end) = self.graph.ends.iter().find(|end| end.outcome == *outcome) else { return Vec::new() };
        if self.changes != processor.changes() {
            return Vec::new();
        }
        let (caches, regime, choice) = (processor.caches(), processor.regime(), Choice::new(0));
        Follow::new(&self.graph, caches, regime, processor.step(), false, self.gva, choice)
            .marks(end, self.kind == Some(AccessKind::Write))
    }

    /// One outcome and one of the ways to it, by `seed`, with all that it does: accessed and dirty flags,
    /// what the caches learn, what a fault removes from them.
    pub fn choose(self, processor: &mut Processor, memory: &Memory, seed: u64) -> Result<Outcome, NotChosen> {
        let mut choice = Choice::new(seed);
        let pick = choice.below(self.iter().count());
        let Some(&outcome) = self.iter().nth(pick) else { return Err(NotChosen::NotInSet) };
        self.take(processor, memory, &outcome, choice)
    }

    /// Like [`Outcomes::choose`], but this outcome.
    pub fn choose_this(
        self,
        processor: &mut Processor,
        memory: &Memory,
        outcome: &Outcome,
        seed: u64,
    ) -> Result<Outcome, NotChosen> {
        self.take(processor, memory, outcome, Choice::new(seed))
    }

    fn take(
        self,
        processor: &mut Processor,
        memory: &Memory,
        outcome: &Outcome,
        mut choice: Choice,
    ) -> Result<Outcome, NotChosen> {
        if self.changes != processor.changes() {
            return Err(NotChosen::ProcessorChanged);
        }
        let same = |end: &&End| end.outcome == *outcome;
        let count = self.graph.ends.iter().filter(same).count();
        let pick = choice.below(count);
        let Some(end) = self.graph.ends.iter().filter(same).nth(pick) else {
            return Err(NotChosen::NotInSet);
        };
        let (caches, regime, step) = processor.parts_mut();
        let follow = Follow::new(&self.graph, caches, regime, step, false, self.gva, choice);
        let effects = follow.end(end, self.kind == Some(AccessKind::Write));
        effects.apply(memory, caches).map_err(NotChosen::MemoryChanged)?;
        fault_removes(caches, regime, self.gva, outcome);
        Ok(*outcome)
    }
}
