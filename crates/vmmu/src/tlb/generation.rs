//! The generation: the clock by which announcements and removals are compared (PROTOCOLS 1).
//!
//! Invariants: it only grows; every advance is followed by a full fence before any line is read.

use crate::mutants::Mutant::NoFenceAdvance;
use crate::mutants::mutant;
use crate::sync::{AtomicU64, Ordering, full_fence};
use Ordering::{AcqRel, Acquire};

/// A counter of generations, alone in its cache line.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Generation(AtomicU64);

impl Generation {
    pub(crate) fn new() -> Self {
        // 0 is "since before everything" in a line.
        Self(AtomicU64::new(1))
    }

    #[inline(always)]
    pub(crate) fn now(&self) -> u64 {
        self.0.load(Acquire)
    }

    /// Starts the next generation and returns it; lines read after this call are ordered after the advance.
    pub(crate) fn advance(&self) -> u64 {
        let next = self.0.fetch_add(1, AcqRel) + 1;
        if !mutant(NoFenceAdvance) {
            full_fence();
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::cost;
    use crate::testing::QuietHost;

    /// PROTOCOLS 3: an advance is one read-modify-write, and a full fence before any line is read.
    #[test]
    fn an_advance_has_its_fence() {
        let _host = QuietHost::new();
        let generation = Generation::new();
        assert_eq!(cost::of(|| generation.advance()), (2, 1, 1));
        assert_eq!(generation.now(), 2);
    }
}
