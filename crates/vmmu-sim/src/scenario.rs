//! Scenes that bring a few rules together often, so that each of them is seen to matter on every seed.
//!
//! A scenario fixes some of the rates that a history otherwise draws; the rest is the seed's. Invariant: a scenario
//! is part of its case, so its line replays it.

use crate::rates::Rates;

macro_rules! scenarios {
    ($($(#[doc = $doc:literal])* $name:ident $text:literal { $($rate:ident: $value:expr),* $(,)? })*) => {
        /// A scene.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        pub enum Scenario {
            $($(#[doc = $doc])* $name,)*
        }

        impl Scenario {
            /// Every scenario.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Its name on a line.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }

            /// What it is about.
            pub const fn about(self) -> &'static str {
                match self {
                    $(Self::$name => concat!($($doc,)*),)*
                }
            }

            /// Sets the rates that are its own.
            pub(crate) fn direct(self, rates: &mut Rates) {
                match self {
                    $(Self::$name => { $(rates.$rate = $value;)* })*
                }
            }
        }
    };
}

scenarios! {
    /// Few pages that move all the time, under faults of several vCPUs.
    Moves "moves" {
        processors: 3, vcpus: 3, accesses: 4, moves: 1, slot_changes: 2000, zaps: 1000, places: 1,
        slots: 1, lengths: &[4, 6], patient: false, switch: 20, bias: 60,
    }
    /// The same with stores that become visible very late.
    LateStores "late-stores" {
        processors: 3, vcpus: 3, accesses: 4, moves: 1, slot_changes: 2000, zaps: 1000, places: 1,
        slots: 1, lengths: &[4, 6], patient: false, drain: 1000, switch: 20, bias: 60,
    }
    /// Faults against the zaps of one mover, with stores that become visible very late.
    Faults "faults" {
        processors: 4, vcpus: 4, accesses: 1, moves: 1, slot_changes: 4000, zaps: 4000, places: 1, slots: 1,
        lengths: &[4], patient: false, drain: 1000, switch: 8, bias: 60, movers: 1, slow: 0, idle: 0, software: 0,
        fetches: 0, devices: 0, dropped: 0, forgotten: 0,
    }
    /// Backings that answer late, while their pages move.
    LateAnswers "late-answers" {
        processors: 3, vcpus: 3, accesses: 4, moves: 1, slot_changes: 2000, zaps: 1000, places: 1,
        slots: 1, lengths: &[4, 6], patient: false, slow: 1, delay: 40,
    }
    /// Large pages that move whole and in pieces.
    LargePages "large-pages" {
        processors: 3, vcpus: 3, accesses: 8, moves: 1, slot_changes: 400, zaps: 1000, places: 1,
        slots: 1, lengths: &[512], patient: false, large: 1, splits: 2, idle: 3,
    }
    /// Slots that come and go.
    Slots "slots" {
        processors: 3, vcpus: 3, accesses: 4, moves: 100, slot_changes: 1, zaps: 1000, places: 2,
        slots: 2, lengths: &[4, 6], patient: false, switch: 20, bias: 60,
    }
    /// Everything zapped while faults in many places need tables.
    Roots "roots" {
        processors: 2, vcpus: 3, accesses: 1, moves: 400, slot_changes: 4000, zaps: 1, places: 6, slots: 4,
        lengths: &[4], patient: false, away: 1, software: 0, fetches: 0, slow: 0, switch: 400, bias: 95, movers: 0,
        devices: 0,
    }
    /// Guests that leave only when they are kicked, while everything is zapped.
    PatientZaps "patient-zaps" {
        processors: 3, vcpus: 2, switch: 20, moves: 0, slot_changes: 0, zaps: 3, places: 1, slots: 1,
        lengths: &[4], patient: true, away: 4000, read_only: 0, devices: 0, software: 0, fetches: 0,
    }
    /// Few tags, many entries, on processors that change.
    Entries "entries" {
        processors: 2, vcpus: 4, tags: 2, accesses: 3, moves: 4, slot_changes: 1000, zaps: 300, places: 1,
        slots: 1, lengths: &[4, 6], patient: false, dropped: 4, forgotten: 8, flush_by_tag: true,
    }
    /// Guests that leave only when they are kicked.
    Patient "patient" {
        processors: 3, vcpus: 2, moves: 3, slot_changes: 0, zaps: 0, places: 1, slots: 1, movers: 1,
        lengths: &[4], patient: true, away: 4000, read_only: 0, devices: 0, software: 0, fetches: 0,
    }
    /// Guests that leave only when somebody kicks them, or they fault.
    Kicks "kicks" {
        processors: 3, vcpus: 3, moves: 0, slot_changes: 0, zaps: 0, places: 1, slots: 1, lengths: &[4], patient: true,
        away: 4000, read_only: 0, devices: 0, software: 0, fetches: 0, kicks: 1,
    }
    /// One processor whose few vCPUs come back to what it remembers.
    Notes "notes" {
        processors: 1, vcpus: 2, tags: 8, accesses: 3, moves: 1, slot_changes: 4000, zaps: 4000, places: 1,
        slots: 1, lengths: &[4], patient: false, dropped: 0, forgotten: 0, movers: 1, bias: 95, slow: 0,
        software: 0, fetches: 0, devices: 0, drain: 60, switch: 20, flush_by_tag: true,
    }
    /// vCPUs that change between address spaces, and come back to what their processor remembers.
    Spaces "spaces" {
        processors: 1, vcpus: 2, tags: 8, accesses: 3, moves: 200, slot_changes: 4000, zaps: 4000, places: 1, slots: 1,
        lengths: &[4], patient: false, dropped: 0, forgotten: 0, movers: 1, slow: 0, software: 0, fetches: 0,
        devices: 0, spaces: 2, space_changes: 2,
    }
    /// Invalidations in large pages that change nothing: small leaves beside them, which large ones replace later.
    Collapses "collapses" {
        processors: 3, vcpus: 4, accesses: 4, moves: 1, slot_changes: 2000, zaps: 200, places: 2, slots: 2,
        lengths: &[512], patient: false, large: 1, splits: 0, idle: 1, slow: 0, software: 0, fetches: 0, switch: 8,
        bias: 95,
    }
    /// Software that reads and fetches while memory moves.
    Software "software" {
        processors: 1, vcpus: 4, accesses: 1, moves: 1, slot_changes: 4000, zaps: 4000, places: 1,
        slots: 1, lengths: &[4], patient: false, software: 2, fetches: 2, idle: 0, switch: 3,
    }
    /// Software that reads from backings that answer late, while memory moves.
    LateReads "late-reads" {
        processors: 1, vcpus: 4, accesses: 1, moves: 1, slot_changes: 4000, zaps: 4000, places: 1,
        slots: 1, lengths: &[4], patient: false, software: 1, fetches: 0, idle: 0, switch: 3, slow: 1, delay: 8,
        movers: 1,
    }
}
