//! Table pages between their unlinking and their reuse (PROTOCOLS 4): a queue in the order of retirement.
//!
//! The links and generations lie in the pages' own records, reached through [`Records`], so nothing is
//! allocated here. Invariants: a page is queued with a generation advanced after its unlink; it leaves the
//! queue only when no reader is announced since an older one.

use crate::addr::Hpa;
use crate::coverage::{Point, hit, hits};
use crate::sync::{AtomicU64, Mutex, Ordering, Rank};

/// Where the queue keeps a page's link and generation: its record.
pub(crate) trait Records {
    /// The page's link, used by whichever list holds the page.
    fn next(&self, page: Hpa) -> &AtomicU64;
    /// The generation of the page's retirement.
    fn generation(&self, page: Hpa) -> &AtomicU64;
}

/// No page: table pages never lie at 0, where the records of their block would be.
const END: u64 = 0;

/// Pages in a chain, owned by whoever holds the value. It must be retired, freed or used: dropping one with
/// pages leaks them until the VM ends.
#[must_use = "pages in a dropped list are lost until the VM ends"]
#[derive(Debug, Default)]
pub(crate) struct PageList {
    first: u64,
    last: u64,
    count: u64,
}

impl PageList {
    pub(crate) const fn new() -> Self {
        Self { first: END, last: END, count: 0 }
    }
    pub(crate) fn count(&self) -> u64 {
        self.count
    }
    /// Appends a page that the caller owns.
    pub(crate) fn push(&mut self, records: &impl Records, page: Hpa) {
        records.next(page).store(END, Ordering::Relaxed);
        if self.first == END {
            self.first = page.raw();
        } else {
            records.next(Hpa::new(self.last)).store(page.raw(), Ordering::Relaxed);
        }
        self.last = page.raw();
        self.count += 1;
    }
    /// Takes the first page.
    pub(crate) fn pop(&mut self, records: &impl Records) -> Option<Hpa> {
        if self.first == END {
            return None;
        }
        let page = Hpa::new(self.first);
        self.first = records.next(page).load(Ordering::Relaxed);
        self.count -= 1;
        Some(page)
    }
    fn peek(&self) -> Option<Hpa> {
        if self.first == END { None } else { Some(Hpa::new(self.first)) }
    }
    /// Appends all of `other`.
    pub(crate) fn append(&mut self, records: &impl Records, other: Self) {
        if other.first == END {
            return;
        }
        if self.first == END {
            self.first = other.first;
        } else {
            records.next(Hpa::new(self.last)).store(other.first, Ordering::Relaxed);
        }
        self.last = other.last;
        self.count += other.count;
    }
}

/// The queue of retired pages.
#[derive(Debug)]
pub(crate) struct Reclaim {
    queue: Mutex<PageList>,
    waiting: AtomicU64,
}

impl Reclaim {
    pub(crate) fn new() -> Self {
        Self { queue: Mutex::new(Rank::Leaf, PageList::new()), waiting: AtomicU64::new(0) }
    }

    /// Pages that wait.
    pub(crate) fn waiting(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Queues unlinked pages. `generation` was advanced, and followed by a full fence, after the last unlink.
    pub(crate) fn retire(&self, records: &impl Records, mut pages: PageList, generation: u64) {
        if pages.count() == 0 {
            return;
        }
        hits(Point::TableRetired, pages.count());
        let mut stamped = PageList::new();
        while let Some(page) = pages.pop(records) {
            records.generation(page).store(generation, Ordering::Relaxed);
            stamped.push(records, page);
        }
        let mut queue = self.queue.lock();
        queue.append(records, stamped);
        self.waiting.store(queue.count(), Ordering::Relaxed);
    }

    /// Takes the pages whose grace has passed. `horizon` is computed under the queue's lock, so after the
    /// fence of every retirement that is in it. A page retired out of order waits for those before it.
    pub(crate) fn take(&self, records: &impl Records, horizon: impl FnOnce() -> u64) -> PageList {
        let mut ready = PageList::new();
        if self.waiting() == 0 {
            return ready;
        }
        let mut queue = self.queue.lock();
        let horizon = horizon();
        while let Some(page) = queue.peek() {
            if records.generation(page).load(Ordering::Relaxed) > horizon {
                hit(Point::TableGraceLasts);
                break;
            }
            if let Some(page) = queue.pop(records) {
                ready.push(records, page);
            }
        }
        self.waiting.store(queue.count(), Ordering::Relaxed);
        hits(Point::TableFreed, ready.count());
        ready
    }

    /// The generation of the page that has waited longest.
    pub(crate) fn oldest(&self, records: &impl Records) -> Option<u64> {
        let queue = self.queue.lock();
        queue.peek().map(|page| records.generation(page).load(Ordering::Relaxed))
    }

    /// Everything, with no regard to grace: for the end of the VM, when no reader is left.
    pub(crate) fn drain(&mut self) -> PageList {
        self.waiting = AtomicU64::new(0);
        core::mem::take(self.queue.get_mut())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    struct Table(BTreeMap<u64, (AtomicU64, AtomicU64)>);
    impl Table {
        fn new(pages: u64) -> Self {
            Self((1..=pages).map(|n| (n << 12, (AtomicU64::new(0), AtomicU64::new(0)))).collect())
        }
    }
    impl Records for Table {
        fn next(&self, page: Hpa) -> &AtomicU64 {
            &self.0[&page.raw()].0
        }
        fn generation(&self, page: Hpa) -> &AtomicU64 {
            &self.0[&page.raw()].1
        }
    }
    fn list(table: &Table, pages: &[u64]) -> PageList {
        let mut list = PageList::new();
        for n in pages {
            list.push(table, Hpa::new(n << 12));
        }
        list
    }
    fn numbers(table: &Table, mut list: PageList) -> Vec<u64> {
        core::iter::from_fn(|| list.pop(table)).map(|p| p.raw() >> 12).collect()
    }

    /// PROTOCOLS 4: a page is reused when no line is older than its generation, and not before.
    #[test]
    fn pages_wait_for_their_grace() {
        let table = Table::new(4);
        let reclaim = Reclaim::new();
        reclaim.retire(&table, list(&table, &[1, 2]), 5);
        reclaim.retire(&table, list(&table, &[3]), 7);
        assert_eq!(numbers(&table, reclaim.take(&table, || 4)), []);
        assert_eq!(numbers(&table, reclaim.take(&table, || 6)), [1, 2]);
        assert_eq!(reclaim.waiting(), 1);
        assert_eq!(reclaim.oldest(&table), Some(7));
        assert_eq!(numbers(&table, reclaim.take(&table, || u64::MAX)), [3]);
    }

    /// Out of order costs delay, never grace.
    #[test]
    fn an_older_page_behind_a_newer_one_waits_with_it() {
        let table = Table::new(2);
        let reclaim = Reclaim::new();
        reclaim.retire(&table, list(&table, &[1]), 9);
        reclaim.retire(&table, list(&table, &[2]), 3);
        assert_eq!(numbers(&table, reclaim.take(&table, || 5)), []);
        assert_eq!(numbers(&table, reclaim.take(&table, || 9)), [1, 2]);
    }
}
