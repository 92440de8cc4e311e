//! The generation, and the waits that it orders: shootdown (processors in the guest) and settling (every
//! section) (PROTOCOLS 3 and 4); the flush debt as a value.
//!
//! Invariants: the generation only grows; every advance is followed by a full fence before any line is read;
//! a debt is paid or merged, never dropped.

use super::Tlb;
use super::reader::{Line, State};
use crate::addr::GfnRange;
use crate::coverage::{Point, hit};
use crate::host::Host;
use crate::mutants::Mutant::{NoGrace, NoShootdownWait};
use crate::mutants::mutant;
use crate::sync::order;

/// Translations of a range of guest frames that were removed or restricted, and that a processor may still
/// use. Whoever holds it owes a flush; memory behind it is released only against [`FlushDebt::pay`].
///
/// Dropped unpaid it asserts in debug builds; in release builds it makes every later entry flush, which is
/// late but no longer never.
#[must_use = "translations were removed, and processors may still use them"]
#[derive(Debug)]
pub(crate) struct FlushDebt<'t> {
    tlb: &'t Tlb,
    range: GfnRange,
}

impl<'t> FlushDebt<'t> {
    /// Nothing owed yet.
    pub(crate) const fn none(tlb: &'t Tlb) -> Self {
        Self { tlb, range: GfnRange::EMPTY }
    }
    /// Adds what a change in `range` owes.
    pub(crate) fn owe(&mut self, range: GfnRange) {
        self.range = self.range.hull(range);
    }
    /// Whether anything is owed.
    pub(crate) fn is_owed(&self) -> bool {
        !self.range.is_empty()
    }
    /// Pays by a shootdown, if anything is owed. Returns the generation since which nothing removed before is
    /// in use, where one was needed.
    pub(crate) fn pay<H: Host>(mut self, line: &Line, host: &H) -> Option<u64> {
        if self.range.is_empty() {
            return None;
        }
        self.range = GfnRange::EMPTY;
        Some(self.tlb.shootdown(line, host))
    }
    /// Asserts that nothing is owed: in an invalid root, whose shootdown came before (T104, T148j).
    pub(crate) fn none_owed(self) {
        debug_assert!(self.range.is_empty(), "an invalid root owes a flush of {:?}", self.range);
    }
    /// A debt that a shootdown still to come in the same operation pays, whatever else it covers.
    pub(crate) fn paid_by_what_follows(mut self) {
        self.range = GfnRange::EMPTY;
    }
}

impl Drop for FlushDebt<'_> {
    fn drop(&mut self) {
        if !self.range.is_empty() {
            debug_assert!(false, "a flush owed for {:?} was dropped unpaid", self.range);
            self.tlb.generation.advance();
        }
    }
}

impl Tlb {
    /// Makes sure that no processor in the guest uses a translation that was removed before this call:
    /// advances the generation, kicks who is in the guest since an older one, and waits until each has left or
    /// entered anew. Returns the generation. May be called under Shared or Exclusive.
    pub(crate) fn shootdown<H: Host>(&self, own: &Line, host: &H) -> u64 {
        order::waits_for_guests();
        own.counters.remote_tlb_flush_requests.add(1);
        let generation = self.generation.advance();
        let old = |line: &Line| {
            let announced = line.announcement();
            announced.state() == State::InGuest && announced.is_older_than(generation)
        };
        let mut found = false;
        for line in self.readers.iter().filter(|line| old(line)) {
            found = true;
            if let Some(vcpu) = line.vcpu() {
                hit(Point::ShootdownKicks);
                host.kick(vcpu);
            }
        }
        if found {
            own.counters.remote_tlb_flush.add(1);
            for line in self.readers.iter() {
                while old(line) && !mutant(NoShootdownWait) {
                    hit(Point::ShootdownWaits);
                    host.relax();
                }
            }
        } else {
            hit(Point::ShootdownAlone);
        }
        generation
    }

    /// Waits until every section that was announced before `generation` has ended. The own line must be
    /// *out* (PROTOCOLS 1: grace is never awaited from inside a section). Guests are not kicked.
    pub(crate) fn settle<H: Host>(&self, own: &Line, host: &H, generation: u64) {
        assert!(own.is_out(), "grace awaited from inside a section: {own:?}");
        for line in self.readers.iter() {
            while line.announcement().is_older_than(generation) {
                hit(Point::SettleWaits);
                host.relax();
            }
        }
    }

    /// The newest generation whose removals nobody can use any more: what was retired at or before it may be
    /// reused. Must be read after the fence of the retirement (PROTOCOLS 4).
    pub(crate) fn horizon(&self) -> u64 {
        if mutant(NoGrace) {
            return u64::MAX;
        }
        self.readers
            .iter()
            .map(Line::announcement)
            .filter(|a| a.state() != State::Out)
            .map(super::reader::Announcement::since)
            .min()
            .unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Gfn;
    use crate::addr::Hpa;
    use crate::names::VcpuId;
    use crate::testing::{QuietHost, comes_true};

    /// PROTOCOLS 3: a vCPU out of the guest costs a shootdown neither a kick nor a wait.
    #[test]
    fn shootdown_ignores_who_is_out() {
        let tlb = Tlb::new();
        let host = QuietHost::new();
        let own = tlb.readers.take(None);
        for n in 0..8 {
            tlb.readers.take(Some(VcpuId::new(n)));
        }
        tlb.shootdown(own, &host);
        assert_eq!(host.kicks(), 0);
    }

    /// PROTOCOLS 3: one that is in the guest since an older generation is kicked and awaited; one that
    /// entered since the advance is neither.
    #[test]
    fn shootdown_waits_for_old_guests() {
        let tlb = Tlb::new();
        let own = tlb.readers.take(None);
        let guest = tlb.readers.take(Some(VcpuId::new(3)));
        guest.announce_guest(Hpa::new(0x1000));
        guest.publish_guest(tlb.generation.now());
        let host = QuietHost::new();
        std::thread::scope(|s| {
            let done = s.spawn(|| tlb.shootdown(own, &host));
            let kicked = comes_true(|| host.kicks() != 0);
            let waits = comes_true(|| done.is_finished() || host.relaxed() > 100) && !done.is_finished();
            guest.leave_guest();
            assert!(kicked && waits, "kicked: {kicked}, awaited: {waits}");
        });
        assert_eq!(host.kicks(), 1);
        guest.announce_guest(Hpa::new(0x1000));
        guest.publish_guest(tlb.generation.now() + 1);
        tlb.shootdown(own, &host);
        assert_eq!(host.kicks(), 1);
    }

    #[test]
    fn horizon_is_the_oldest_announcement() {
        let tlb = Tlb::new();
        let (a, b) = (tlb.readers.take(None), tlb.readers.take(None));
        assert_eq!(tlb.horizon(), u64::MAX);
        let _older = a.walk(&tlb);
        let since = tlb.generation.now();
        tlb.generation.advance();
        let newer = b.walk(&tlb);
        assert_eq!(tlb.horizon(), since);
        drop(newer);
        assert_eq!(tlb.horizon(), since);
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "dropped unpaid")]
    fn a_debt_is_not_forgotten() {
        let tlb = Tlb::new();
        let mut debt = FlushDebt::none(&tlb);
        debt.owe(GfnRange::block(Gfn::new(0), crate::addr::Level::L2));
    }
}
