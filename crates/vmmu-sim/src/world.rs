//! What should be: slots, what stands behind their pages, and so which frames a guest may reach at each moment.
//!
//! The model is told of each change at the moments that the library's contracts name: a new slot counts from
//! before it is asked for, an old one until its deletion has returned, a page's old frame until its invalidation
//! has returned. Invariant: whatever the library maps between two changes is in [`World::allowed`].

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use vmmu::{Backing, Gfn, GfnRange, PageSize, Pfn, ResolveError, ResolveRequest, Resolved};

/// One page of a backing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Page {
    pub(crate) pfn: Pfn,
    pub(crate) size: PageSize,
    pub(crate) writable: bool,
    /// Answers only who may wait.
    pub(crate) slow: bool,
    /// Nothing is behind it just now: it is on its way to other frames.
    pub(crate) absent: bool,
}

/// A backing whose pages tasks change under invalidations.
#[derive(Debug)]
pub(crate) struct SimBacking {
    pub(crate) id: u64,
    pub(crate) pages: Mutex<Vec<Page>>,
    /// Turns that an answer takes where it may wait, at most.
    pub(crate) delay: u64,
}

// SAFETY: tasks change a page only while an invalidation of it is held, and call blocks large only whole.
unsafe impl Backing for SimBacking {
    fn resolve(&self, page: u64, request: ResolveRequest) -> Result<Resolved, ResolveError> {
        let found = {
            let pages = self.pages.lock().expect("one thread");
            *pages.get(page as usize).ok_or(ResolveError::Unbacked)?
        };
        if found.slow && !request.may_wait {
            return Err(ResolveError::WouldWait);
        }
        // The answer is on its way: by the time that it arrives it may be out of date.
        for _ in 0..if found.slow { 1 + page % self.delay } else { 1 } {
            vmmu::instrument::step();
        }
        if found.absent {
            return Err(ResolveError::Unbacked);
        }
        Ok(Resolved::new(found.pfn, found.size, found.writable))
    }
}

/// A slot as the model has it.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) id: u16,
    pub(crate) gfn: u64,
    pub(crate) pages: u64,
    pub(crate) read_only: bool,
    pub(crate) backing: Arc<SimBacking>,
    /// Neither being made nor being deleted.
    pub(crate) settled: bool,
}

/// The model of one VM.
#[derive(Debug, Default)]
pub(crate) struct World {
    /// Slots; a place that a move leaves stands here twice for a while.
    pub(crate) slots: Vec<Slot>,
    /// Changes of slots so far: for whoever wants to know that nothing changed meanwhile.
    pub(crate) changes: u64,
    /// What is taken away just now: no answer about it, of whatever kind, is given while it stands here.
    pub(crate) open: Vec<GfnRange>,
    /// Changes of `open`, and of what is absent.
    pub(crate) openings: u64,
    next_frame: u64,
    /// Frames given back, by how many go together.
    free: BTreeMap<u64, Vec<u64>>,
}

/// The model, shared by tasks.
pub(crate) type SharedWorld = Rc<RefCell<World>>;

impl World {
    pub(crate) fn new(first_frame: u64) -> Self {
        Self { next_frame: first_frame, ..Self::default() }
    }

    /// The frames that the guest may reach for `gfn` now, and whether it may write to them.
    pub(crate) fn allowed(&self, gfn: u64) -> impl Iterator<Item = (Pfn, bool)> {
        self.slots.iter().filter(move |s| s.gfn <= gfn && gfn < s.gfn + s.pages).map(move |s| {
            let page = s.backing.pages.lock().expect("one thread")[(gfn - s.gfn) as usize];
            (page.pfn, page.writable && !s.read_only)
        })
    }

    /// Notes that `range` is taken away, from when that is true.
    pub(crate) fn opened(&mut self, range: GfnRange) {
        self.openings += 1;
        self.open.push(range);
    }

    /// Notes that `range` is about to be given back.
    pub(crate) fn closes(&mut self, range: GfnRange) {
        self.openings += 1;
        if let Some(at) = self.open.iter().position(|open| *open == range) {
            self.open.swap_remove(at);
        }
    }

    /// Whether it may be said now that nothing is behind `gfn`.
    pub(crate) fn may_be_absent(&self, gfn: u64) -> bool {
        let absent = |slot: &Slot| {
            slot.backing
                .pages
                .lock()
                .expect("one thread")
                .get((gfn - slot.gfn) as usize)
                .is_none_or(|page| page.absent)
        };
        self.at(gfn).any(absent) && !self.open.iter().any(|range| range.contains(Gfn::new(gfn)))
    }

    /// The slots that hold `gfn`, settled or not.
    pub(crate) fn at(&self, gfn: u64) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(move |s| s.gfn <= gfn && gfn < s.gfn + s.pages)
    }

    /// `count` consecutive frames, aligned to `count`: the ones given back last first, so that frames are reused soon.
    pub(crate) fn frames(&mut self, count: u64) -> u64 {
        if let Some(first) = self.free.get_mut(&count).and_then(Vec::pop) {
            return first;
        }
        let first = self.next_frame.next_multiple_of(count);
        self.next_frame = first + count;
        first
    }

    /// Takes frames back; they must be out of everybody's reach.
    pub(crate) fn give_back(&mut self, first: u64, count: u64) {
        self.free.entry(count).or_default().push(first);
    }
}
