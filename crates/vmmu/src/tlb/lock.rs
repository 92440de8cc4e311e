//! Shared and Exclusive: the MMU lock as a big-reader lock over the readers' lines (PROTOCOLS 2).
//!
//! Shared is an announcement in the holder's own line; Exclusive raises a flag and waits until no line says
//! *mapping*. Invariants: nobody is in Shared while somebody is in Exclusive; there is no upgrade; Exclusive
//! is taken with the own line *out*; it ends by lowering the flag, then unlocking.

use super::Tlb;
use super::reader::{Announcement, Line, State};
use crate::coverage::{Point, hit};
use crate::host::Host;
use crate::mutants::Mutant::{ExclusiveNoWait, NoFenceFlag, NoFenceShared, NoFlagRecheck};
use crate::mutants::mutant;
use crate::sync::{AtomicBool, Mutex, MutexGuard, Ordering, Rank, full_fence};
use Ordering::{Acquire, Relaxed, Release};
use core::marker::PhantomData;

/// The MMU lock of one VM.
#[derive(Debug)]
pub(crate) struct MmuLock {
    writers: Mutex<()>,
    flag: AtomicBool,
}

/// Shared: entries may be installed by compare-exchange, and the short list of other things that a fault may
/// do (PROTOCOLS 8). Holding it proves that no Exclusive section runs, and that table pages that it can reach
/// are not reused. It does not prove that an entry stays as it was read.
#[must_use]
#[derive(Debug)]
pub(crate) struct Shared<'t> {
    line: &'t Line,
    before: Announcement,
    _not_send: PhantomData<*const ()>,
}

/// Exclusive: nobody holds Shared, nobody else Exclusive. Lock-free readers and processors still read, and
/// processors still set accessed and dirty bits.
#[must_use]
#[derive(Debug)]
pub(crate) struct Exclusive<'t> {
    lock: &'t MmuLock,
    line: &'t Line,
    _writers: MutexGuard<'t, ()>,
}

/// The writers' mutex alone: serialises with Exclusive without stopping faults (the end of an invalidation).
#[must_use]
#[derive(Debug)]
pub(crate) struct Writer<'t> {
    _writers: MutexGuard<'t, ()>,
}

impl MmuLock {
    pub(crate) fn new() -> Self {
        Self { writers: Mutex::new(Rank::Writers, ()), flag: AtomicBool::new(false) }
    }

    /// Takes Shared, waiting while somebody wants or has Exclusive. May be called from *walking*, whose
    /// section then goes on afterwards, and, joining it, from Shared itself.
    #[inline(always)]
    pub(crate) fn shared<'t, H: Host>(&'t self, tlb: &'t Tlb, line: &'t Line, host: &H) -> Shared<'t> {
        loop {
            let before = line.raise(State::Mapping, &tlb.generation);
            if before.state() == State::Mapping {
                return Shared { line, before, _not_send: PhantomData };
            }
            if !mutant(NoFenceShared) {
                full_fence();
            }
            if !self.flag.load(Acquire) || mutant(NoFlagRecheck) {
                return Shared { line, before, _not_send: PhantomData };
            }
            line.restore(before);
            self.wait_for_writer(host);
        }
    }

    #[cold]
    fn wait_for_writer<H: Host>(&self, host: &H) {
        hit(Point::SharedWaits);
        while self.flag.load(Acquire) {
            host.relax();
        }
    }

    /// Takes Exclusive, waiting until nobody holds Shared.
    ///
    /// # Panics
    /// Where the caller's own line is announced: it would wait for itself.
    pub(crate) fn exclusive<'t, H: Host>(&'t self, tlb: &'t Tlb, line: &'t Line, host: &H) -> Exclusive<'t> {
        assert!(line.is_out(), "Exclusive asked for from inside a section: {line:?}");
        let writers = self.writers.lock();
        self.flag.store(true, Relaxed);
        if !mutant(NoFenceFlag) {
            full_fence();
        }
        for other in tlb.readers.iter() {
            while other.announcement().state() == State::Mapping && !mutant(ExclusiveNoWait) {
                hit(Point::ExclusiveWaits);
                host.relax();
            }
        }
        let before = line.raise(State::Walking, &tlb.generation);
        debug_assert_eq!(before, Announcement::OUT);
        full_fence();
        Exclusive { lock: self, line, _writers: writers }
    }

    /// Takes the writers' mutex without raising the flag.
    pub(crate) fn writer(&self) -> Writer<'_> {
        Writer { _writers: self.writers.lock() }
    }
}

impl Shared<'_> {
    pub(crate) fn line(&self) -> &Line {
        self.line
    }
}

impl Drop for Shared<'_> {
    #[inline]
    fn drop(&mut self) {
        self.line.restore(self.before);
    }
}

impl Exclusive<'_> {
    pub(crate) fn line(&self) -> &Line {
        self.line
    }
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        self.line.restore(Announcement::OUT);
        self.lock.flag.store(false, Release);
        // The mutex is released after this body, when the guard's field is dropped.
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{QuietHost, comes_true};
    use core::sync::atomic::AtomicI64;

    /// PROTOCOLS 2: nobody is in Shared during Exclusive (stress; the order of each step is the models').
    #[test]
    fn shared_and_exclusive_exclude_each_other() {
        let tlb = Tlb::new();
        let host = QuietHost::new();
        let inside = AtomicI64::new(0);
        std::thread::scope(|s| {
            for n in 0..4 {
                let (tlb, host, inside) = (&tlb, &host, &inside);
                s.spawn(move || {
                    let line = tlb.readers.take(None);
                    for round in 0..2_000 {
                        if (round + n) % 7 == 0 {
                            let exclusive = tlb.lock.exclusive(tlb, line, host);
                            assert_eq!(inside.swap(-1, Ordering::SeqCst), 0);
                            assert_eq!(inside.swap(0, Ordering::SeqCst), -1);
                            drop(exclusive);
                        } else {
                            let shared = tlb.lock.shared(tlb, line, host);
                            assert!(inside.fetch_add(1, Ordering::SeqCst) >= 0);
                            assert!(inside.fetch_sub(1, Ordering::SeqCst) >= 1);
                            drop(shared);
                        }
                    }
                    line.give_back();
                });
            }
        });
    }

    /// PROTOCOLS 2: Shared inside Shared is the outer token, and costs no fence.
    #[test]
    fn shared_inside_shared_joins() {
        let tlb = Tlb::new();
        let host = QuietHost::new();
        let line = tlb.readers.take(None);
        let outer = tlb.lock.shared(&tlb, line, &host);
        let (inner, fences, _) = crate::sync::cost::of(|| tlb.lock.shared(&tlb, line, &host));
        assert_eq!(fences, 0);
        drop(inner);
        assert_eq!(line.announcement().state(), State::Mapping);
        drop(outer);
        assert!(line.is_out());
    }

    /// PROTOCOLS 2: Exclusive waits until nobody holds Shared, whoever announced it and since when.
    #[test]
    fn exclusive_waits_for_shared() {
        let (tlb, host, got) = (Tlb::new(), QuietHost::new(), AtomicBool::new(false));
        let line = tlb.readers.take(None);
        let shared = tlb.lock.shared(&tlb, line, &host);
        std::thread::scope(|s| {
            s.spawn(|| {
                let line = tlb.readers.take(None);
                let exclusive = tlb.lock.exclusive(&tlb, line, &host);
                got.store(true, Release);
                drop(exclusive);
            });
            assert!(comes_true(|| got.load(Acquire) || host.relaxed() > 100));
            assert!(!got.load(Acquire), "Exclusive beside Shared");
            drop(shared);
        });
        assert!(got.load(Acquire));
    }

    /// PROTOCOLS 2: whoever announces Shared and sees the flag raised takes it back, and waits.
    #[test]
    fn shared_waits_for_exclusive() {
        let (tlb, host, got) = (Tlb::new(), QuietHost::new(), AtomicBool::new(false));
        let (own, other) = (tlb.readers.take(None), tlb.readers.take(None));
        let exclusive = tlb.lock.exclusive(&tlb, own, &host);
        std::thread::scope(|s| {
            s.spawn(|| {
                // Also from walking, whose section then goes on.
                let walking = other.walk(&tlb);
                let shared = tlb.lock.shared(&tlb, other, &host);
                got.store(true, Release);
                drop((shared, walking));
            });
            assert!(comes_true(|| got.load(Acquire) || host.relaxed() > 100));
            assert!(!got.load(Acquire), "Shared beside Exclusive");
            assert_eq!(other.announcement().state(), State::Walking);
            drop(exclusive);
        });
        assert!(got.load(Acquire));
    }

    /// PROTOCOLS 2: raising the flag and announcing oneself have their fences; the writers' mutex alone has none.
    #[test]
    fn exclusive_has_its_fences() {
        let (tlb, host) = (Tlb::new(), QuietHost::new());
        let line = tlb.readers.take(None);
        let (exclusive, fences, locked) = crate::sync::cost::of(|| tlb.lock.exclusive(&tlb, line, &host));
        assert_eq!((fences, locked), (2, 1));
        drop(exclusive);
        let (_writer, fences, locked) = crate::sync::cost::of(|| tlb.lock.writer());
        assert_eq!((fences, locked), (0, 1));
    }

    #[test]
    #[should_panic(expected = "from inside a section")]
    fn there_is_no_upgrade() {
        let tlb = Tlb::new();
        let host = QuietHost::new();
        let line = tlb.readers.take(None);
        let _shared = tlb.lock.shared(&tlb, line, &host);
        let _never = tlb.lock.exclusive(&tlb, line, &host);
    }
}
