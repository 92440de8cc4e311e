//! A physical processor: its registers, the world that it is in, and its caches.
//!
//! | room | holds |
//! |---|---|
//! | here | accesses and speculation |
//! | `world` | entering a guest and leaving it: SVM and VMX |
//! | `control` | writes of control registers, and what they flush |
//! | `invalidate` | the flush instructions |
//!
//! Owns its caches; reaches memory only through the reference that each operation is given. Invariant: a
//! cached mapping goes only by an operation of these rooms; every operation that may change an answer
//! counts as a change.

mod control;
mod invalidate;
mod world;

pub use control::ControlFault;
pub use invalidate::{InvalidationRefused, Invept, Invpcid, Invvpid};
pub use world::{EntryRefused, EptContext, Guest, NestedTables, NptContext, TlbControl};

use crate::access::{Access, AccessKind};
use crate::addr::{Gpa, Gva};
use crate::cache::Caches;
use crate::choose::{Follow, MemoryChanged};
use crate::features::{Features, Quirks};
use crate::hash::Choice;
use crate::memory::Memory;
use crate::outcome::Outcome;
use crate::outcomes::{NotChosen, Outcomes};
use crate::regime::Regime;
use crate::registers::Registers;
use crate::search::{NodeId, Search};

/// See the module.
#[derive(Debug)]
pub struct Processor {
    features: Features,
    quirks: Quirks,
    host: Registers,
    /// The guest that it runs, if it does; its registers are the current ones.
    guest: Option<Guest>,
    regime: Regime,
    caches: Caches,
    step: u64,
    changes: u64,
}

impl Processor {
    /// A processor after reset: paging off, nothing held.
    pub fn new(features: Features, quirks: Quirks) -> Self {
        let regime = Regime::new(Registers::OFF, None, 0, &features, quirks);
        Self {
            features,
            quirks,
            host: Registers::OFF,
            guest: None,
            regime,
            caches: Caches::default(),
            step: 0,
            changes: 0,
        }
    }

    /// What it is.
    pub const fn features(&self) -> &Features {
        &self.features
    }

    /// How it departs from the manuals.
    pub const fn quirks(&self) -> &Quirks {
        &self.quirks
    }

    /// Whether it runs a guest, and which.
    pub const fn guest(&self) -> Option<&Guest> {
        self.guest.as_ref()
    }

    /// The registers of the world that it is in.
    pub const fn registers(&self) -> &Registers {
        &self.regime.registers
    }

    /// The time that provenance tells, counted by the embedder; see [`Processor::set_step`].
    pub const fn step(&self) -> u64 {
        self.step
    }

    /// Sets the time: whatever number makes a story readable.
    pub const fn set_step(&mut self, step: u64) {
        self.step = step;
    }

    pub(crate) const fn changes(&self) -> u64 {
        self.changes
    }

    pub(crate) const fn caches(&self) -> &Caches {
        &self.caches
    }

    pub(crate) const fn regime(&self) -> &Regime {
        &self.regime
    }

    /// The parts that a choice works on. Counts as a change.
    pub(crate) const fn parts_mut(&mut self) -> (&mut Caches, &Regime, u64) {
        self.changes += 1;
        (&mut self.caches, &self.regime, self.step)
    }

    /// Everything that an access to a linear address may come to now.
    pub fn access(&self, memory: &Memory, gva: Gva, access: Access) -> Outcomes {
        let gva = self.regime.linear_address(gva);
        let mut search = Search::new(memory, &self.caches, &self.regime);
        search.linear(gva, Some(access));
        Outcomes { graph: search.graph, gva: Some(gva), kind: Some(access.kind), changes: self.changes }
    }

    /// Everything that an access to a guest-physical address may come to now: an access that has no linear
    /// address, such as the load of PAE's page-directory-pointer entries. Without a second stage the
    /// address is a host-physical one.
    pub fn access_physical(&self, memory: &Memory, gpa: Gpa, kind: AccessKind) -> Outcomes {
        let mut search = Search::new(memory, &self.caches, &self.regime);
        search.physical(gpa, Some(kind));
        Outcomes { graph: search.graph, gva: None, kind: Some(kind), changes: self.changes }
    }

    /// Makes an access: searches and chooses, again if another thread changes an entry in between.
    pub fn touch(&mut self, memory: &Memory, gva: Gva, access: Access, seed: u64) -> Outcome {
        loop {
            match self.access(memory, gva, access).choose(self, memory, seed) {
                Ok(outcome) => return outcome,
                Err(NotChosen::MemoryChanged(_)) => {}
                Err(error @ (NotChosen::ProcessorChanged | NotChosen::NotInSet)) => {
                    unreachable!("a search that was just made has its own outcomes: {error}")
                }
            }
        }
    }

    /// Walks for `gva` ahead of any access, as a processor may at any time (SDM 4.10.2.3, 4.10.3; APM 5.5.3
    /// "Speculative Caching of Address Translations", "Caching of Upper Level Translation Table Entries"):
    /// no permission is checked, no dirty flag of a page set, no fault reported. It stops anywhere, by
    /// `seed`, and keeps what it learned: also tables that lead nowhere.
    pub fn speculate(&mut self, memory: &Memory, gva: Gva, seed: u64) -> Result<(), MemoryChanged> {
        let gva = self.regime.linear_address(gva);
        let mut search = Search::new(memory, &self.caches, &self.regime);
        search.linear(gva, None);
        let outcomes = Outcomes { graph: search.graph, gva: Some(gva), kind: None, changes: self.changes };
        self.stop_somewhere(memory, outcomes, seed)
    }

    /// Likewise, for a guest-physical address: guest tables of any content lead a speculative walk to it.
    pub fn speculate_physical(&mut self, memory: &Memory, gpa: Gpa, seed: u64) -> Result<(), MemoryChanged> {
        let mut search = Search::new(memory, &self.caches, &self.regime);
        search.physical(gpa, None);
        let outcomes = Outcomes { graph: search.graph, gva: None, kind: None, changes: self.changes };
        self.stop_somewhere(memory, outcomes, seed)
    }

    fn stop_somewhere(
        &mut self,
        memory: &Memory,
        outcomes: Outcomes,
        seed: u64,
    ) -> Result<(), MemoryChanged> {
        let mut choice = Choice::new(seed);
        let graph = &outcomes.graph;
        let complete: Vec<_> =
            graph.ends.iter().filter(|end| matches!(end.outcome, Outcome::Translated(_))).collect();
        let nodes: Vec<NodeId> = graph.node_ids().collect();
        // Half of the walks that can end in a translation do.
        let whole = !complete.is_empty() && (nodes.is_empty() || choice.below(2) == 0);
        let end = if whole { Some(complete[choice.below(complete.len())]) } else { None };
        let node = nodes.get(choice.below(nodes.len())).copied();
        let (caches, regime, step) = self.parts_mut();
        let follow = Follow::new(graph, caches, regime, step, true, outcomes.gva, choice);
        let effects = match (end, node) {
            (Some(end), _) => follow.end(end, false),
            (None, Some(node)) => follow.node(node),
            (None, None) => return Ok(()),
        };
        effects.apply(memory, caches)
    }

    /// Drops everything, as reset does.
    pub fn forget_everything(&mut self) {
        self.changes += 1;
        self.caches = Caches::default();
    }
}
