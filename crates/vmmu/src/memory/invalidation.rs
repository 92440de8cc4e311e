//! The invalidation sequence: which guest frames are being taken away by the host, and how a fault in flight
//! notices (M66–M73, PROTOCOLS 4).
//!
//! Invariants: the range only grows until no invalidation is open; an end raises the sequence before it lowers
//! the count, and a recheck reads the count (with the range) before the sequence, so no fault can miss both.

use crate::addr::{Gfn, GfnRange, Level};
use crate::coverage::{Point, hit};
use crate::mutants::Mutant::{
    CountBeforeSequence, NoRangeRecheck, NoSequenceBump, NoSequenceRecheck, RangeShrinks, SequenceFirst,
};
use crate::mutants::mutant;
use crate::sync::{AtomicU64, Ordering};
use crate::tlb::lock::{Exclusive, Writer};
use Ordering::{Acquire, Relaxed, Release};

/// The state of a VM's invalidations, alone in its cache line: faults only read it.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct InvalidationSequence {
    open: AtomicU64,
    start: AtomicU64,
    end: AtomicU64,
    sequence: AtomicU64,
    /// The generation in which the oldest open one began, for the statistics.
    since: AtomicU64,
}

/// The sequence as it was before a page was resolved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Snapshot(u64);

impl InvalidationSequence {
    pub(crate) fn new() -> Self {
        Self {
            open: AtomicU64::new(0),
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
            sequence: AtomicU64::new(0),
            since: AtomicU64::new(0),
        }
    }

    /// Taken before slots, attributes and backing are looked at (M72).
    #[inline(always)]
    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot(self.sequence.load(Acquire))
    }

    /// Whether what was resolved after `snapshot` still stands for all of `range`: asked after the announcement
    /// (M71). The range is everything that is about to be mapped or used, not the page that faulted alone: a
    /// large leaf over one page that is being taken away would map that page too. Errs only towards "no".
    #[inline(always)]
    pub(crate) fn is_current(&self, range: GfnRange, snapshot: Snapshot) -> bool {
        if mutant(SequenceFirst) && self.sequence.load(Acquire) != snapshot.0 {
            return false;
        }
        if self.open.load(Acquire) != 0 && !mutant(NoRangeRecheck) {
            let (start, end) = (self.start.load(Acquire), self.end.load(Acquire));
            if start < range.end().raw() && range.start().raw() < end {
                hit(Point::RangeOverlaps);
                return false;
            }
        }
        if mutant(SequenceFirst) || mutant(NoSequenceRecheck) || self.sequence.load(Acquire) == snapshot.0 {
            return true;
        }
        hit(Point::SequenceMoved);
        false
    }

    /// The largest level, up to `level`, at which the block around `gfn` has nothing of an open invalidation: a
    /// page beside one that is being taken away is mapped smaller instead of waiting for it. `None` where the page
    /// itself is being taken away. The sequence is still to be asked, by [`Self::is_current`].
    #[inline(always)]
    pub(crate) fn clear_level(&self, gfn: Gfn, level: Level) -> Option<Level> {
        if self.open.load(Acquire) == 0 { Some(level) } else { self.clear_level_beside(gfn, level) }
    }

    #[cold]
    fn clear_level_beside(&self, gfn: Gfn, mut level: Level) -> Option<Level> {
        let (start, end) = (self.start.load(Acquire), self.end.load(Acquire));
        loop {
            let block = GfnRange::block(gfn, level);
            if end <= block.start().raw() || block.end().raw() <= start {
                return Some(level);
            }
            level = level.below()?;
        }
    }

    /// Invalidations that are open.
    #[inline(always)]
    pub(crate) fn open(&self) -> u64 {
        self.open.load(Acquire)
    }

    /// The generation in which the first of the open ones began, if any is.
    pub(crate) fn open_since(&self) -> Option<u64> {
        if self.open() == 0 { None } else { Some(self.since.load(Relaxed)) }
    }

    /// Opens one: the range first, then the count, under the Exclusive that zaps and before the zap.
    pub(crate) fn begin(&self, _exclusive: &Exclusive<'_>, range: GfnRange, generation: u64) {
        let open = self.open.load(Relaxed);
        let pending = if open == 0 {
            self.since.store(generation, Relaxed);
            range
        } else {
            let start = Gfn::new(self.start.load(Relaxed));
            GfnRange::new(start, Gfn::new(self.end.load(Relaxed))).unwrap_or(GfnRange::ALL).hull(range)
        };
        self.start.store(pending.start().raw(), Release);
        self.end.store(pending.end().raw(), Release);
        self.open.store(open + 1, Release);
    }

    /// Closes one: the sequence first, then the count.
    pub(crate) fn end(&self, _writer: &Writer<'_>) {
        let open = self.open.load(Relaxed);
        assert!(open != 0, "an invalidation ended that never began");
        if mutant(CountBeforeSequence) {
            self.open.store(open - 1, Release);
        }
        if !mutant(NoSequenceBump) {
            self.sequence.store(self.sequence.load(Relaxed) + 1, Release);
        }
        if open > 1 && mutant(RangeShrinks) {
            self.end.store(self.start.load(Relaxed), Release);
        }
        self.open.store(open - 1, Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::QuietHost;
    use crate::tlb::Tlb;

    fn range(start: u64, end: u64) -> GfnRange {
        GfnRange::new(Gfn::new(start), Gfn::new(end)).expect("ordered")
    }

    fn page(gfn: u64) -> GfnRange {
        range(gfn, gfn + 1)
    }

    /// M71, M73: faults in the range of an open invalidation retry; so does every fault whose snapshot is older
    /// than an end; the range does not shrink while any is open (bug scenario 2).
    #[test]
    fn faults_in_flight_notice() {
        let (tlb, host) = (Tlb::new(), QuietHost::new());
        let line = tlb.readers.take(None);
        let sequence = InvalidationSequence::new();
        let old = sequence.snapshot();
        {
            let exclusive = tlb.lock.exclusive(&tlb, line, &host);
            sequence.begin(&exclusive, range(10, 20), 1);
        }
        assert!(!sequence.is_current(page(10), old));
        assert!(sequence.is_current(page(20), old), "outside the range nothing changed yet");
        assert!(!sequence.is_current(range(0, 512), old), "a block that has some of the range");
        {
            let exclusive = tlb.lock.exclusive(&tlb, line, &host);
            sequence.begin(&exclusive, range(15, 30), 2);
        }
        sequence.end(&tlb.lock.writer());
        let new = sequence.snapshot();
        assert!(!sequence.is_current(page(40), old), "an end outdates every older snapshot");
        assert!(!sequence.is_current(page(12), new), "the range has not shrunk");
        assert_eq!(sequence.open_since(), Some(1));
        sequence.end(&tlb.lock.writer());
        assert!(!sequence.is_current(page(12), new));
        assert!(sequence.is_current(page(12), sequence.snapshot()));
        assert_eq!(sequence.open_since(), None);
    }

    /// Beside an open range a block gets smaller until it misses it; inside there is none.
    #[test]
    fn blocks_beside_an_open_range() {
        let (tlb, host) = (Tlb::new(), QuietHost::new());
        let line = tlb.readers.take(None);
        let sequence = InvalidationSequence::new();
        let clear = |gfn| sequence.clear_level(Gfn::new(gfn), Level::L3).map(Level::number);
        assert_eq!(clear(600), Some(3));
        {
            let exclusive = tlb.lock.exclusive(&tlb, line, &host);
            sequence.begin(&exclusive, range(600, 610), 1);
        }
        assert_eq!(clear(599), Some(1));
        assert_eq!(clear(600), None);
        assert_eq!(clear(0), Some(2));
        assert_eq!(clear(1 << 18), Some(3));
        sequence.end(&tlb.lock.writer());
    }
}
