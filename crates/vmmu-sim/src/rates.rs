//! What differs between histories: how often each thing happens, and where.
//!
//! A seed draws its own rates, so that what is rare in one history is common in another; a scenario draws few and fixes
//! the others. Invariant: 0 means never, where a rate says "one in so many".

use crate::case::{Case, Part};
use crate::host::Failures;
use crate::random::Random;
use vmmu::Optimizations;

/// How many pages the vCPUs of a history use, and so how often they meet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Spread {
    /// Many, in slots at many places.
    Wide,
    /// Those, and many more that are no memory, each with tables of its own.
    Far,
    /// A few, in two slots.
    Narrow,
    /// One, in a slot that comes and goes.
    Spot,
}

/// The rates of one history, drawn from its seed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rates {
    /// Where everybody meets.
    pub spread: Spread,
    /// A switch before one atomic access in so many.
    pub switch: u64,
    /// A held-back store becomes visible before one access in so many; 0: stores are not held back.
    pub drain: u64,
    /// Before one access in so many a task stands still for long.
    pub doze: u64,
    /// About one compare-exchange of a vCPU in so many it stands still for long.
    pub contend: u64,
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
    /// Address spaces.
    pub spaces: u8,
    /// A vCPU changes to another once in so many turns.
    pub space_changes: u64,
    /// Five-level tables.
    pub five_levels: bool,
    /// Optimisations that are on.
    pub optimizations: Optimizations,
    /// Allocations of tables that fail.
    pub failures: Failures,
    /// The limit on tables, in blocks of 256 KiB; 0: none.
    pub limit: u64,
    /// A kick reaches its vCPU within so many accesses.
    pub kick_delay: u64,
    /// Accesses of an entry, at most.
    pub accesses: u64,
    /// One access in so many goes elsewhere than the last.
    pub away: u64,
    /// Accesses often go where another vCPU faulted last, or stands still.
    pub follows: bool,
    /// A vCPU that faults at one place again and again lets others go on in between.
    pub leaves_time: bool,
    /// A fault that was handled before is handled again once in so many turns.
    pub late: u64,
    /// One vCPU in so many tries to enter before it is prepared.
    pub unprepared: u64,
    /// One entry in so many lets its guest do nothing for a while.
    pub halts: u64,
    /// A slot is changed once in so many turns, and a place where none is gets one.
    pub slot_changes: u64,
    /// Likewise.
    pub empty: u64,
    /// Memory is moved once in so many turns of a mover.
    pub moves: u64,
    /// Everything is zapped once in so many turns.
    pub zaps: u64,
    /// Some vCPU, or every one, is kicked once in so many turns.
    pub kicks: u64,
    /// One access in so many goes anywhere, not to a slot; of those, one in so many beyond what processors can name.
    pub devices: u64,
    /// Likewise.
    pub beyond: u64,
    /// One access in so many goes to one of many places far from each other.
    pub far: u64,
    /// A vCPU reads by software instead of entering once in so many turns, and one such access in so many writes.
    pub software: u64,
    /// Likewise.
    pub writes: u64,
    /// Threads that are no vCPU and do nothing else.
    pub readers: u64,
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
    /// Before one fetch in so many the guest changes its tables.
    pub edits: u64,
    /// How many of the places for slots are used, and how many slots there are at most.
    pub places: usize,
    /// Likewise.
    pub slots: u16,
    /// Lengths that slots have, in pages.
    pub lengths: &'static [u64],
    /// One slot in so many is a page of 1 GiB.
    pub giants: u64,
    /// One block in so many that could be a large page is one.
    pub large: u64,
    /// One slot in so many is read-only, and one block.
    pub read_only: u64,
    /// One block in so many is read-only until it is written to.
    pub lazy: u64,
    /// One block in so many is refused by its backing.
    pub refused: u64,
    /// One block in so many is answered only to who may wait; then it takes up to so many turns.
    pub slow: u64,
    /// Likewise.
    pub delay: u64,
    /// One question to a backing that may wait in so many goes without an answer.
    pub hesitates: u64,
    /// Who moves memory.
    pub movers: u64,
    /// One move in so many of a large page moves one page of it, and makes the rest small where it is.
    pub splits: u64,
    /// One invalidation in so many changes nothing.
    pub idle: u64,
    /// One move in so many is instead an invalidation of any part, or of everything, that changes nothing.
    pub glances: u64,
}

impl Rates {
    /// Those that a scenario starts from: what it does not set is common to all of them, or the seed's.
    pub(crate) fn plain(random: &mut Random) -> Self {
        Self {
            spread: Spread::Wide,
            switch: random.pick(&[3, 8, 20, 60]),
            drain: random.pick(&[0, 4, 60, 1000]),
            doze: 0,
            contend: 0,
            bias: random.pick(&[0, 60, 95]),
            tags: random.pick(&[1, 2, 3, 8]),
            flush_by_tag: random.one_in(2),
            processors: 1 + random.below(3) as usize,
            vcpus: 1 + random.below(4) as usize,
            spaces: 1,
            space_changes: 8,
            five_levels: random.one_in(4),
            optimizations: Optimizations::all(),
            failures: Failures::NONE,
            limit: 0,
            kick_delay: 1,
            accesses: random.pick(&[4, 20, 80]),
            away: 2,
            follows: false,
            leaves_time: false,
            late: 0,
            unprepared: 0,
            halts: 0,
            slot_changes: random.pick(&[20, 100, 400]),
            empty: 1,
            moves: random.pick(&[6, 30, 150]),
            zaps: random.pick(&[50, 300, 1000]),
            kicks: 0,
            devices: random.pick(&[12, 40]),
            beyond: 0,
            far: 0,
            software: 8,
            writes: 0,
            readers: 0,
            dropped: 32,
            forgotten: 32,
            speculation: 8,
            patient: random.one_in(8),
            fetches: 12,
            edits: 0,
            places: 6,
            slots: 4,
            lengths: &[4, 6, 512, 520],
            giants: 0,
            large: 2,
            read_only: 9,
            lazy: 0,
            refused: 0,
            slow: 4,
            delay: random.pick(&[1, 4, 40]),
            hesitates: 0,
            movers: 2,
            splits: 4,
            idle: 8,
            glances: 0,
        }
    }

    /// Those of a seed without a scenario: most of what can be rare is common in some of them.
    pub(crate) fn draw(random: &mut Random) -> Self {
        let (spread, starved) = match random.below(24) {
            0..=4 => (Spread::Narrow, false),
            5 | 6 => (Spread::Spot, false),
            7..=9 => (Spread::Far, true),
            10..=16 => (Spread::Far, false),
            _ => (Spread::Wide, false),
        };
        let narrow = matches!(spread, Spread::Narrow | Spread::Spot);
        let far = spread == Spread::Far;
        // Whoever removes memory keeps faults apart: they meet more often without.
        let calm = narrow && !random.one_in(3);
        let plain = Self::plain(random);
        Self {
            spread,
            doze: random.pick(if spread == Spread::Spot { &[60, 300] } else { &[0, 60, 500] }),
            contend: random.pick(match spread {
                Spread::Wide | Spread::Far => &[0, 6, 30],
                Spread::Narrow => &[1, 2, 6],
                Spread::Spot => &[1, 3],
            }),
            processors: if starved { 3 } else { plain.processors },
            vcpus: match () {
                () if starved => 4,
                () if narrow => 2 + random.below(3) as usize,
                () => plain.vcpus,
            },
            failures: match random.below(8) {
                _ if starved => Failures { one_in: 0, nth: 2, then: 1000 },
                0 | 1 => Failures { one_in: 3, ..Failures::NONE },
                2 | 3 => Failures { nth: 1 + random.below(6), then: random.pick(&[0, 0, 3, 40]), one_in: 0 },
                _ => Failures::NONE,
            },
            limit: match () {
                () if starved => random.below(2),
                () if far => 0,
                () => random.pick(&[0, 0, 0, 1, 2, 3]),
            },
            spaces: if narrow { 1 } else { random.pick(&[1, 1, 1, 2]) },
            space_changes: random.pick(&[4, 20]),
            optimizations: match random.below(12) {
                0 => Optimizations::all() - Optimizations::LARGE_PAGES,
                1 => Optimizations::all() - Optimizations::MMIO_ENTRIES,
                2 => Optimizations::all() - Optimizations::RESOLVE_AT_ONCE,
                _ => Optimizations::all(),
            },
            kick_delay: random.pick(&[1, 1, 6, 30]),
            accesses: if starved { 80 } else { plain.accesses },
            away: 4,
            follows: true,
            leaves_time: true,
            late: 16,
            unprepared: 2,
            halts: random.pick(if starved { &[4] } else { &[0, 20] }),
            slot_changes: random.pick(match () {
                () if calm => &[6, 20, 200],
                () if narrow => &[4, 12, 100],
                () if far => &[800],
                () => &[40, 150, 500],
            }),
            empty: match spread {
                Spread::Wide | Spread::Far => 1,
                Spread::Narrow => 6,
                Spread::Spot => 10,
            },
            moves: if calm || far { random.pick(&[0, 300]) } else { random.pick(&[20, 60, 250]) },
            zaps: random.pick(match spread {
                _ if calm => &[0, 1000],
                Spread::Spot => &[6, 20],
                Spread::Far if starved => &[200, 1000],
                Spread::Far => &[40, 150],
                _ => &[10, 50, 300, 1000],
            }),
            kicks: random.pick(&[0, 0, 40, 200]),
            devices: random.pick(&[16, 60]),
            beyond: 8,
            far: if far { 2 } else { 0 },
            writes: 4,
            readers: random.below(2),
            patient: spread == Spread::Wide && plain.patient,
            fetches: random.pick(&[0, 8, 24]),
            edits: 4,
            places: if spread == Spread::Spot { 1 } else { 6 },
            slots: match spread {
                Spread::Wide | Spread::Far => 4,
                Spread::Narrow => 2,
                Spread::Spot => 1,
            },
            lengths: if narrow { &[6, 512, 512, 520] } else { &[4, 6, 512, 520] },
            giants: if spread == Spread::Spot { 0 } else { random.pick(&[0, 1, 2, 2]) },
            large: random.pick(&[1, 1, 1, 2]),
            lazy: random.pick(if narrow { &[1, 2] } else { &[0, 0, 0, 1, 3] }),
            refused: random.pick(&[0, 12, 60]),
            hesitates: random.pick(&[0, 4, 15]),
            idle: 2,
            glances: 2,
            ..plain
        }
    }

    /// Leaves out what the case leaves out.
    pub(crate) fn limit(&mut self, case: &Case) {
        self.vcpus = self.vcpus.min(case.vcpus.max(1));
        self.processors = self.processors.min(case.processors.max(1));
        for part in &case.without {
            *match part {
                Part::Failures => {
                    (self.failures, self.limit) = (Failures::NONE, 0);
                    continue;
                }
                Part::Delays => &mut self.kick_delay,
                Part::Dozes => {
                    self.contend = 0;
                    &mut self.doze
                }
                Part::Refusals => {
                    self.hesitates = 0;
                    &mut self.refused
                }
                Part::Lazy => &mut self.lazy,
                Part::Giants => &mut self.giants,
                Part::Forgotten => &mut self.forgotten,
                Part::Dropped => &mut self.dropped,
                Part::Software => {
                    self.readers = 0;
                    &mut self.software
                }
                Part::Zaps => &mut self.zaps,
                Part::SlotChanges => &mut self.slot_changes,
                Part::Moves => &mut self.moves,
                Part::Speculation => &mut self.speculation,
                Part::LateStores => &mut self.drain,
                Part::Fetches => &mut self.fetches,
                Part::Splits => &mut self.splits,
                Part::Kicks => &mut self.kicks,
            } = 0;
        }
    }
}
