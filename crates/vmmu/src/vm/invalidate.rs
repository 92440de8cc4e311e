//! Taking translations away: for the host (`invalidate`), for everything (`zap_all`), and what becomes of
//! unlinked tables (PROTOCOLS 3 and 4).
//!
//! Invariants: an operation that returns has awaited the shootdown, and, where memory changes hands, every
//! section announced before it; nothing is awaited under Shared or Exclusive but a shootdown.

use super::{Inner, OwnLine, Vm};
use crate::addr::GfnRange;
use crate::coverage::{Point, hit};
use crate::error::Error;
use crate::host::Host;
use crate::mutants::Mutant::{
    CollapseNoFlush, InvalidRootGeneration, InvalidateNoShootdown, NoSettle, ShootdownBeforeZap, SkipIfEmpty,
    ZapAllNoShootdown, ZapBeforeBegin,
};
use crate::mutants::mutant;
use crate::sync::order;
use crate::table::cursor::Resume;
use crate::tdp::zap::{Removed, ZapProgress};
use crate::tlb::lock::Exclusive;
use crate::tlb::reader::{Line, Request, State};
use crate::tlb::reclaim::PageList;
use crate::trace::Event;
use core::fmt;
use core::marker::PhantomData;

/// Retired tables above which vCPUs that hold up their reuse are kicked.
const WATERMARK: u64 = 256;

/// An open invalidation: until it is dropped, no translation of its range is made. The backing may be changed
/// while it is held, and the frames reused.
///
/// While it is held, the same thread may neither change slots nor access guest memory of the range: both would
/// wait for the guard (checked in debug builds with `std`). One that is leaked stops the faults of its range for ever;
/// [`crate::Stats::invalidation_age`] tells.
#[must_use = "dropping it at once ends the invalidation"]
pub struct Invalidation<'vm, H: Host> {
    inner: &'vm Inner<H>,
    range: GfnRange,
    /// Whoever opened it ends it, so that a thread that waits for itself is caught.
    _not_send: PhantomData<*const ()>,
}

impl<H: Host> Invalidation<'_, H> {
    /// The guest frames.
    pub fn range(&self) -> GfnRange {
        self.range
    }
}

impl<H: Host> Drop for Invalidation<'_, H> {
    fn drop(&mut self) {
        self.inner.sequence.end(&self.inner.tlb.lock.writer());
        order::invalidation(false);
    }
}

impl<H: Host> fmt::Debug for Invalidation<'_, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invalidation").field("range", &self.range).finish_non_exhaustive()
    }
}

impl<H: Host> Vm<H> {
    /// Takes the guest frames of `range` away from the guest and from the library. When this returns, no
    /// processor uses a translation of them, no software access to their memory is under way, and none begins
    /// before the guard is dropped: change what stands behind them, then drop it (M66–M73).
    pub fn invalidate(&self, range: GfnRange) -> Result<Invalidation<'_, H>, Error> {
        let inner = &*self.inner;
        inner.alive()?;
        let own = self.own_line();
        let line = own.line();
        if mutant(ShootdownBeforeZap) {
            inner.tlb.shootdown(line, &inner.host);
        }
        let mut removed = Removed::new(&inner.tlb);
        let mut guard = None;
        let mut left = Some(range);
        while let Some(piece) = left {
            let exclusive = inner.tlb.lock.exclusive(&inner.tlb, line, &inner.host);
            if !mutant(ZapBeforeBegin) {
                guard.get_or_insert_with(|| inner.begin(&exclusive, range));
            }
            left = inner
                .tdp
                .unmap(inner.env(), &exclusive, piece, &mut removed)
                .and_then(|Resume(at)| GfnRange::new(at, range.end()));
            drop(exclusive);
            if left.is_some() {
                hit(Point::InvalidationPieced);
                // Faults that waited for this piece come in before the next (T59).
                inner.host.relax();
            }
        }
        let guard = match guard {
            Some(guard) => guard,
            None => inner.begin(&inner.tlb.lock.exclusive(&inner.tlb, line, &inner.host), range),
        };
        // Also where nothing was mapped: a software walk may hold a frame that no entry maps.
        let waits = !mutant(SkipIfEmpty) || removed.is_owed();
        let (pages, debt) = removed.into_parts();
        debt.paid_by_what_follows();
        let generation = if mutant(ShootdownBeforeZap) || mutant(InvalidateNoShootdown) || !waits {
            inner.tlb.generation.advance()
        } else {
            inner.tlb.shootdown(line, &inner.host)
        };
        inner.reclaim.retire(&inner.tables(), pages, generation);
        if waits && !mutant(NoSettle) {
            inner.tlb.settle(line, &inner.host, generation);
        }
        inner.host.trace(Event::Invalidated { range });
        Ok(guard)
    }

    /// Removes every translation of every address space; faults make them anew. Returns when all are gone and
    /// no processor can use one (T102).
    pub fn zap_all(&self) -> Result<(), Error> {
        self.inner.alive()?;
        self.inner.zap_all_roots(&self.own_line());
        Ok(())
    }
}

impl<H: Host> Inner<H> {
    /// Opens an invalidation; from here on its end is owed, whatever becomes of the operation.
    fn begin(&self, exclusive: &Exclusive<'_>, range: GfnRange) -> Invalidation<'_, H> {
        self.sequence.begin(exclusive, range, self.tlb.generation.now());
        order::invalidation(true);
        Invalidation { inner: self, range, _not_send: PhantomData }
    }

    /// Invalidates all roots, waits until no processor is in one, and removes their entries.
    pub(crate) fn zap_all_roots(&self, own: &OwnLine<H>) {
        let line = own.line();
        {
            let exclusive = self.tlb.lock.exclusive(&self.tlb, line, &self.host);
            self.tdp.roots.invalidate_all(&exclusive);
            for reader in self.tlb.readers.iter().filter(|reader| reader.vcpu().is_some()) {
                reader.post(Request::FreeObsoleteRoots);
            }
        }
        let generation = if mutant(ZapAllNoShootdown) {
            self.tlb.generation.advance()
        } else {
            self.tlb.shootdown(line, &self.host)
        };
        self.host.trace(Event::RootsInvalidated);
        while let Some(root) = self.tdp.roots.claim() {
            let mut left = Some(ZapProgress::START);
            while let Some(progress) = left {
                let mut removed = Removed::new(&self.tlb);
                let shared = self.tlb.lock.shared(&self.tlb, line, &self.host);
                left = self.tdp.zap_invalid(self.env(), &shared, &root, progress, &mut removed);
                drop(shared);
                if left.is_some_and(ZapProgress::is_within_a_level) {
                    hit(Point::ZapPieced);
                }
                self.retire_excused(removed, generation);
            }
            self.tdp.roots.remove(&root);
            hit(Point::RootZapped);
            let mut page = PageList::new();
            page.push(&self.tables(), root.page);
            self.reclaim.retire(&self.tables(), page, self.tlb.generation.advance());
            self.host.trace(Event::RootZapped { space: root.space });
        }
        // Others may still be zapping roots that this call invalidated.
        while self.tdp.roots.any_invalid() {
            hit(Point::ZapsAwaited);
            self.host.relax();
        }
        self.tlb.settle(line, &self.host, generation);
        self.collect();
    }

    /// Retires what was removed from an invalid root: its shootdown came before the unlink, so the generation is
    /// one of its own (PROTOCOLS 4).
    fn retire_excused(&self, removed: Removed<'_>, shootdown: u64) {
        let (pages, debt) = removed.into_parts();
        debt.none_owed();
        if pages.count() != 0 {
            let generation =
                if mutant(InvalidRootGeneration) { shootdown } else { self.tlb.generation.advance() };
            self.reclaim.retire(&self.tables(), pages, generation);
        }
    }

    /// Pays for and retires what a change by a fault removed. May be called under Shared.
    pub(crate) fn settle_removed(&self, line: &Line, removed: Removed<'_>) {
        let (pages, debt) = removed.into_parts();
        let generation = if mutant(CollapseNoFlush) {
            debt.paid_by_what_follows();
            None
        } else {
            debt.pay(line, &self.host)
        };
        if pages.count() != 0 {
            let generation = generation.unwrap_or_else(|| self.tlb.generation.advance());
            self.reclaim.retire(&self.tables(), pages, generation);
        }
    }

    /// Frees the retired tables whose grace has passed; above a watermark, kicks the vCPUs that hold up the
    /// others.
    pub(crate) fn collect(&self) {
        let ready = self.reclaim.take(&self.tables(), || self.tlb.horizon());
        self.tables().free_list(ready);
        if self.reclaim.waiting() > WATERMARK {
            self.kick_laggards();
        }
    }

    /// Waits, holding nothing, until the table that was retired first has passed its grace, and frees it.
    pub(crate) fn wait_for_grace(&self, line: &Line) {
        assert!(line.is_out(), "grace awaited from inside a section: {line:?}");
        if let Some(oldest) = self.reclaim.oldest(&self.tables()) {
            hit(Point::GraceAwaited);
            self.kick_laggards();
            while self.tlb.horizon() < oldest {
                self.host.relax();
            }
        }
        self.collect();
    }

    fn kick_laggards(&self) {
        let Some(oldest) = self.reclaim.oldest(&self.tables()) else { return };
        for line in self.tlb.readers.iter() {
            let announced = line.announcement();
            if announced.state() == State::InGuest
                && announced.is_older_than(oldest)
                && let Some(vcpu) = line.vcpu()
            {
                hit(Point::LaggardKicked);
                self.host.kick(vcpu);
            }
        }
    }
}
