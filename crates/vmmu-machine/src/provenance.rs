//! Where a translation comes from: the entries that were read, with the values that they had, so that a
//! failure can be told as a story.
//!
//! Shared, immutable records. Invariant: a chain ends at a root register, and is at most as long as a walk,
//! since what a cached table starts lies below that table.

use crate::addr::Hpa;
use std::fmt;
use std::sync::Arc;

/// Which tables.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Stage {
    /// Those of the linear address: CR3's.
    First,
    /// Those of the guest-physical address: nested or extended tables.
    Second,
}

/// One entry as a walker read it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EntryRead {
    /// Of which tables.
    pub stage: Stage,
    /// Of which level; 1 is the lowest.
    pub level: u8,
    /// Where in host memory.
    pub at: Hpa,
    /// Its value before the walker set accessed or dirty.
    pub value: u64,
}

/// What a record tells.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Event {
    /// The walk began at a root register.
    Root(Stage),
    /// It read an entry.
    Entry(EntryRead),
    /// The two stages were combined into one translation.
    Combined,
    /// There was no walk: paging is off, and an address is what it is.
    Identity,
}

/// A record. See the module.
#[derive(Debug)]
pub struct Provenance {
    /// The processor's step at that time.
    pub step: u64,
    /// By a speculative walk.
    pub speculative: bool,
    /// What happened.
    pub event: Event,
    /// The walk that led here.
    pub from: Option<Arc<Self>>,
    /// The second-stage walk that found the table, or, of a combined translation, the page.
    pub located_by: Option<Arc<Self>>,
}

impl Provenance {
    /// Every entry that it rests on, the last read first; those that located a table follow its entry.
    pub fn entries(&self) -> Vec<EntryRead> {
        let mut out = Vec::new();
        self.collect(&mut out);
        out
    }

    fn collect(&self, out: &mut Vec<EntryRead>) {
        if let Event::Entry(entry) = self.event {
            out.push(entry);
        }
        for before in [&self.located_by, &self.from].into_iter().flatten() {
            before.collect(out);
        }
    }

    fn tell(&self, f: &mut fmt::Formatter<'_>, indent: usize) -> fmt::Result {
        if let Some(from) = &self.from {
            from.tell(f, indent)?;
        }
        if let Some(by) = &self.located_by {
            by.tell(f, indent + 1)?;
        }
        let how = if self.speculative { ", speculatively" } else { "" };
        write!(f, "{:w$}step {}{how}: ", "", self.step, w = 2 * indent)?;
        match self.event {
            Event::Root(Stage::First) => writeln!(f, "started at CR3"),
            Event::Root(Stage::Second) => writeln!(f, "started at the second stage's root"),
            Event::Entry(EntryRead { stage, level, at, value }) => {
                let stage = match stage {
                    Stage::First => "first",
                    Stage::Second => "second",
                };
                writeln!(f, "{stage} stage, level {level}: the entry at {at} was {value:#x}")
            }
            Event::Combined => writeln!(f, "combined both stages"),
            Event::Identity => writeln!(f, "paging was off"),
        }
    }
}

impl fmt::Display for Provenance {
    /// The story, the first event first, a line each.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.tell(f, 0)
    }
}
