//! Coverage: what a history made the library do, counted by name, so that a campaign can tell what it never did.
//!
//! Only with the `instrument` feature, for the library's own proof; elsewhere `hit` and `transition` are nothing
//! at compile time. Counts belong to the thread. Two kinds of thing are counted: points of the code, each listed
//! here once with its name, and changes of entries, by level and by what the entry was and became. Invariants: a
//! change of an entry of a live table is counted where it is made; a change that [`Transition::ALL`] does not list is
//! one that no operation makes.

use crate::addr::Level;
use crate::arch::entry::{Entry, Writable};

macro_rules! points {
    ($($group:ident { $($name:ident = $text:literal,)* })*) => {
        /// A point of the code that a campaign must reach.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[allow(missing_docs)] // each variant has its name where it is listed
        pub enum Point {
            $($($name,)*)*
        }

        impl Point {
            /// Every point, group by group.
            pub const ALL: &'static [Self] = &[$($(Self::$name,)*)*];

            /// What kind of point it is.
            pub const fn group(self) -> Group {
                match self {
                    $($(Self::$name => Group::$group,)*)*
                }
            }

            /// What happens there, in a few words.
            pub const fn name(self) -> &'static str {
                match self {
                    $($(Self::$name => $text,)*)*
                }
            }
        }
    };
}

/// What is counted together.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Group {
    /// A change of an entry.
    Transition,
    /// What a fault came to.
    Outcome,
    /// Why the guest tries again.
    Retry,
    /// What a fault met on its way without ending there.
    Way,
    /// How entries into the guest end, and what they flush.
    Entry,
    /// Waits for others.
    Wait,
    /// Table pages and roots.
    Table,
    /// Accesses by software.
    Software,
}

impl Group {
    /// Every group, in the order of a report.
    pub const ALL: [Self; 8] = [
        Self::Transition,
        Self::Outcome,
        Self::Retry,
        Self::Way,
        Self::Entry,
        Self::Wait,
        Self::Table,
        Self::Software,
    ];

    /// Its name in a report.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Transition => "transitions",
            Self::Outcome => "outcomes",
            Self::Retry => "retry causes",
            Self::Way => "ways of a fault",
            Self::Entry => "entries",
            Self::Wait => "waits",
            Self::Table => "tables",
            Self::Software => "software accesses",
        }
    }
}

points! {
    Outcome {
        LeafMapped = "resume: a leaf installed or upgraded",
        SpuriousAtWalk = "resume: the walk found the access allowed",
        SpuriousUnderShared = "resume: allowed by the time of Shared",
        WaitsStill = "resume: a backing would wait although it may",
        DeviceBeyond = "device: beyond the greatest frame",
        DeviceHit = "device: by an MMIO entry",
        DeviceMarked = "device: an MMIO entry made",
        DeviceNoTable = "device: not cached, no table prepared",
        DeviceUncached = "device: not cached, slots are changing or entries are off",
        ReadOnlySlot = "read-only write: by the slot",
        ReadOnlyBacking = "read-only write: by the backing",
        FaultUnbacked = "memory fault: unbacked",
        FaultPoisoned = "memory fault: poisoned",
        ErrorOutOfMemory = "error: the host has no memory for tables",
        ErrorMemoryLimit = "error: the limit on tables is reached",
        ErrorBackingMemory = "error: the backing has run out of memory",
        ErrorBackingInterrupted = "error: the backing was interrupted",
        ErrorReservedBits = "error: reserved bits in a live entry",
        ErrorDead = "error: an invariant is broken",
    }
    Retry {
        RetryNoRoot = "no valid root at the start",
        RetryFrozen = "a frozen entry met",
        RetryReserved = "reserved bits reported, entry gone since",
        RetryChanging = "the slot is being deleted or moved",
        RetryRangeOpen = "recheck: the page is being invalidated",
        RetryRoot = "recheck: the root died",
        RetrySequence = "recheck: the sequence of invalidations",
        RetrySlots = "recheck: the slots changed",
        RetryDeviceRoot = "device recheck: the root died",
        RetryDeviceSlots = "device recheck: the slots changed",
        RetryDeviceTaken = "device: something else stands there by now",
        RetryReadOnly = "read-only write: the answer is out of date",
        RetryRefusalAtOnce = "refusal: the answer is out of date",
        RetryRefusalWaited = "refusal after a wait: the answer is out of date",
        RetryLostLink = "compare-exchange lost: a link",
        RetryLostInstall = "compare-exchange lost: a leaf in an empty entry",
        RetryLostReplace = "compare-exchange lost: a leaf in place of something",
        RetryLostSplit = "compare-exchange lost: a split",
        RetryLostDevice = "compare-exchange lost: an MMIO entry",
    }
    Way {
        RangeOverlaps = "an answer refused by the range of an open invalidation",
        SequenceMoved = "an answer refused by the sequence of invalidations",
        BesideRange = "mapped smaller, beside an open invalidation",
        AskedToWait = "a backing asked with nothing announced",
        AnswerOutdated = "an answer for a slot set before this one",
        NoTablePrepared = "a table needed, none prepared",
        DeviceOutdated = "an MMIO entry of an older generation",
        LeafUpgraded = "a leaf met that does not allow the access",
    }
    Entry {
        AgainNoRoot = "again: no root",
        AgainRequested = "again: a request waits",
        AgainRootDied = "again: the root died",
        EntryRan = "ran",
        EntryDropped = "dropped, did not run",
        EntryForgotten = "forgotten, may have run",
        FlushNothing = "flushes nothing, tag known",
        FlushFreshTag = "flushes nothing, fresh tag",
        FlushTag = "flushes its tag",
        FlushAll = "flushes everything",
        TagsWrapped = "tags wrap",
        CameOut = "prepares after a request",
    }
    Wait {
        SharedWaits = "Shared waits for Exclusive",
        ExclusiveWaits = "Exclusive waits for Shared",
        ShootdownAlone = "a shootdown finds nobody in the guest",
        ShootdownKicks = "a shootdown kicks",
        ShootdownWaits = "a shootdown waits",
        SettleWaits = "a removal waits for sections",
        SlotReadersAwaited = "a slot change waits for readers",
        InvalidationPieced = "an invalidation in pieces",
        ZapPieced = "a zap of a root in pieces",
        ZapsAwaited = "a zap waits for another's",
    }
    Table {
        TablePrepared = "prepared",
        TableRetired = "retired",
        TableFreed = "freed after its grace",
        TableReused = "freed and used again",
        TableGraceLasts = "not freed yet, somebody may use it",
        BlockTaken = "a block from the host",
        BlockGivenBack = "a block back to the host",
        TopUpOutOfMemory = "none to be had: the host has no memory",
        TopUpLimit = "none to be had: the limit",
        GraceAwaited = "none to be had: grace awaited",
        LaggardKicked = "a vCPU kicked that holds up reuse",
        RootMade = "a root made",
        RootFound = "a root found",
        RootRaced = "a root made by somebody else meanwhile",
        RootZapped = "a root zapped and retired",
    }
    Software {
        SoftwareDone = "done",
        SoftwareNoSlot = "no slot",
        SoftwareReadOnly = "read-only",
        SoftwareChanging = "waits: the slot is being deleted or moved",
        SoftwareOutdated = "waits: the answer is out of date",
        SoftwareAskedToWait = "a backing asked with nothing announced",
        SoftwareRefused = "the backing has nothing",
        SoftwareUnreachable = "a frame that the host cannot reach",
        WalkRemembered = "a walk remembered",
        WalkNotRemembered = "a walk not remembered, things were changing",
        WalkRecalled = "a remembered walk used",
        WalkOutdated = "a remembered walk refused: slots or backings changed",
        WalkEntryChanged = "a remembered walk refused: the guest changed an entry",
    }
}

/// What an entry holds, as far as coverage tells kinds apart.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// Nothing.
    Empty,
    /// Frozen.
    Frozen,
    /// "No slot".
    Mmio,
    /// A link to a table.
    Table,
    /// A leaf that the guest may not write to.
    ReadOnly,
    /// A leaf that the guest may write to.
    Writable,
}

/// Kinds of entries.
const KINDS: usize = 6;
/// Levels of tables.
const LEVELS: usize = 5;

impl Kind {
    /// Its name in a report.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Frozen => "frozen",
            Self::Mmio => "device",
            Self::Table => "table",
            Self::ReadOnly => "read-only page",
            Self::Writable => "writable page",
        }
    }

    fn of(entry: Entry) -> Self {
        match entry {
            Entry::Empty => Self::Empty,
            Entry::Frozen => Self::Frozen,
            Entry::Mmio(_) => Self::Mmio,
            Entry::Link(_) => Self::Table,
            Entry::Leaf(leaf) if leaf.writable == Writable::Yes => Self::Writable,
            Entry::Leaf(_) => Self::ReadOnly,
        }
    }
}

/// A change of an entry.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Transition {
    /// The level of its table: 1 maps 4 KiB, 2 maps 2 MiB, 3 maps 1 GiB.
    pub level: u8,
    /// What it held.
    pub from: Kind,
    /// What it holds.
    pub to: Kind,
}

macro_rules! transitions {
    ($($level:literal: $from:ident => $($to:ident)*;)*) => {
        &[$($(Transition { level: $level, from: Kind::$from, to: Kind::$to },)*)*]
    };
}

impl Transition {
    /// Every change that the library makes.
    pub const ALL: &'static [Self] = transitions! {
        1: Empty => Mmio ReadOnly Writable Frozen;
        1: Mmio => Mmio ReadOnly Writable Frozen;
        1: ReadOnly => Empty Writable Frozen;
        1: Writable => Empty Frozen;
        2: Empty => Table ReadOnly Writable Frozen;
        2: Table => Empty ReadOnly Writable Frozen;
        2: ReadOnly => Empty Table Writable Frozen;
        2: Writable => Empty Frozen;
        3: Empty => Table ReadOnly Writable Frozen;
        3: Table => Empty ReadOnly Writable;
        3: ReadOnly => Empty Table Writable;
        3: Writable => Empty;
        4: Empty => Table Frozen;
        4: Table => Empty;
        5: Empty => Table;
        5: Table => Empty;
    };
}

#[cfg(feature = "instrument")]
mod active {
    use super::{Entry, KINDS, Kind, LEVELS, Level, Point, Transition};
    use core::cell::Cell;

    type Points = [u64; Point::ALL.len()];
    type Transitions = [[[u64; KINDS]; KINDS]; LEVELS];

    std::thread_local! {
        static POINTS: [Cell<u64>; Point::ALL.len()] = const { [const { Cell::new(0) }; Point::ALL.len()] };
        static TRANSITIONS: [Cell<u64>; LEVELS * KINDS * KINDS] =
            const { [const { Cell::new(0) }; LEVELS * KINDS * KINDS] };
    }

    fn add(cell: &Cell<u64>, n: u64) {
        cell.set(cell.get() + n);
    }

    /// Counts a point.
    pub(crate) fn hit(point: Point) {
        hits(point, 1);
    }

    /// Counts a point several times.
    pub(crate) fn hits(point: Point, times: u64) {
        POINTS.with(|points| add(&points[point as usize], times));
    }

    /// Counts a change of an entry.
    pub(crate) fn transition(level: Level, from: Entry, to: Entry) {
        let (level, from, to) =
            (usize::from(level.number()) - 1, Kind::of(from) as usize, Kind::of(to) as usize);
        TRANSITIONS.with(|counts| add(&counts[(level * KINDS + from) * KINDS + to], 1));
    }

    /// How often each thing happened.
    #[derive(Clone, PartialEq, Eq, Debug)]
    pub struct Coverage {
        points: Points,
        transitions: Transitions,
    }

    impl Default for Coverage {
        fn default() -> Self {
            Self { points: [0; Point::ALL.len()], transitions: [[[0; KINDS]; KINDS]; LEVELS] }
        }
    }

    impl Coverage {
        /// What was counted on this thread since it was last taken.
        pub fn take() -> Self {
            Self::read(Cell::take)
        }

        /// The same, which stays counted.
        pub fn so_far() -> Self {
            Self::read(Cell::get)
        }

        fn read(look: impl Fn(&Cell<u64>) -> u64) -> Self {
            let mut read = Self::default();
            POINTS.with(|points| {
                for (count, cell) in read.points.iter_mut().zip(points) {
                    *count = look(cell);
                }
            });
            TRANSITIONS.with(|counts| {
                let places = read.transitions.iter_mut().flatten().flatten();
                for (count, cell) in places.zip(counts) {
                    *count = look(cell);
                }
            });
            read
        }

        /// Adds what was counted elsewhere.
        pub fn add(&mut self, other: &Self) {
            for (count, more) in self.points.iter_mut().zip(other.points) {
                *count += more;
            }
            let more = other.transitions.iter().flatten().flatten();
            for (count, more) in self.transitions.iter_mut().flatten().flatten().zip(more) {
                *count += more;
            }
        }

        /// How often `point` was reached.
        pub const fn point(&self, point: Point) -> u64 {
            self.points[point as usize]
        }

        /// How often an entry changed so.
        pub const fn transition(&self, Transition { level, from, to }: Transition) -> u64 {
            self.transitions[level as usize - 1][from as usize][to as usize]
        }

        /// A change that happened although [`Transition::ALL`] does not list it.
        pub fn unlisted(&self) -> Option<Transition> {
            const KIND: [Kind; KINDS] =
                [Kind::Empty, Kind::Frozen, Kind::Mmio, Kind::Table, Kind::ReadOnly, Kind::Writable];
            (1..=LEVELS as u8)
                .flat_map(|level| KIND.map(|from| KIND.map(|to| Transition { level, from, to })))
                .flatten()
                .find(|change| self.transition(*change) != 0 && !Transition::ALL.contains(change))
        }
    }
}

#[cfg(feature = "instrument")]
pub use active::Coverage;
#[cfg(feature = "instrument")]
pub(crate) use active::{hit, hits, transition};

/// Counts a point: nothing in this build.
#[cfg(not(feature = "instrument"))]
#[inline(always)]
pub(crate) const fn hit(_: Point) {}

/// Counts a point several times: nothing in this build.
#[cfg(not(feature = "instrument"))]
#[inline(always)]
pub(crate) const fn hits(_: Point, _: u64) {}

/// Counts a change of an entry: nothing in this build.
#[cfg(not(feature = "instrument"))]
#[inline(always)]
pub(crate) const fn transition(_: Level, _: Entry, _: Entry) {}

impl core::fmt::Display for Transition {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "level {}: {} to {}", self.level, self.from.name(), self.to.name())
    }
}
