//! What should be: slots, what stands behind their pages, and so which frames a guest may reach at each moment.
//!
//! The model is told of each change at the moments that the library's contracts name: a new slot counts from
//! before it is asked for, an old one until its deletion has returned, a page's old frame until its invalidation
//! has returned. Invariant: whatever the library maps between two changes is in [`World::allowed`].

use crate::random::Random;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use vmmu::{
    AddressSpace, Backing, Gfn, GfnRange, PageSize, Pfn, ResolveError, ResolveRequest, Resolved, SlotId,
};

/// Frames of 2 MiB.
const BLOCK: u64 = 512;

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
    /// Says "read-only" to who reads, and gives who writes pages of at most this size.
    pub(crate) lazily: Option<PageSize>,
    /// Has no frame for the guest.
    pub(crate) refuses: Option<ResolveError>,
}

/// A backing whose pages tasks change under invalidations.
#[derive(Debug)]
pub(crate) struct SimBacking {
    pub(crate) id: u64,
    /// All pages, or the first alone where it is one of 1 GiB, and the others follow it.
    pub(crate) pages: Mutex<Vec<Page>>,
    /// Turns that an answer takes where it may wait, at most.
    delay: u64,
    /// One question in so many that may wait goes without an answer; 0: none.
    hesitates: u64,
    asked: AtomicU64,
}

impl SimBacking {
    pub(crate) fn new(id: u64, delay: u64, hesitates: u64) -> Self {
        Self { id, pages: Mutex::default(), delay, hesitates, asked: AtomicU64::new(0) }
    }

    /// What stands behind a page of the slot.
    pub(crate) fn page(&self, page: u64) -> Option<Page> {
        let pages = self.pages.lock().expect("one thread");
        let first = *pages.first()?;
        if first.size == PageSize::Size1G {
            return (page < first.size.pages()).then(|| Page { pfn: first.pfn.offset(page), ..first });
        }
        pages.get(page as usize).copied()
    }

    /// Why this question goes without an answer, if it does.
    fn hesitates(&self) -> Option<ResolveError> {
        let asked = self.asked.fetch_add(1, Relaxed) + 1;
        let kinds = [ResolveError::OutOfMemory, ResolveError::Interrupted, ResolveError::WouldWait];
        (self.hesitates != 0 && asked.is_multiple_of(self.hesitates))
            .then(|| kinds[(asked / self.hesitates % 3) as usize])
    }
}

// SAFETY: tasks change a page only while an invalidation of it is held, and call blocks large only whole.
unsafe impl Backing for SimBacking {
    fn resolve(&self, page: u64, request: ResolveRequest) -> Result<Resolved, ResolveError> {
        let found = self.page(page).ok_or(ResolveError::Unbacked)?;
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
        if request.may_wait
            && let Some(why) = self.hesitates()
        {
            return Err(why);
        }
        match (found.refuses, found.lazily) {
            (Some(why), _) => Err(why),
            (None, Some(size)) if request.write => {
                Ok(Resolved::new(found.pfn, size.min(found.size), found.writable))
            }
            (None, Some(_)) => Ok(Resolved::new(found.pfn, found.size, false)),
            (None, None) => Ok(Resolved::new(found.pfn, found.size, found.writable)),
        }
    }
}

/// A slot as the model has it.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) id: SlotId,
    pub(crate) gfn: u64,
    pub(crate) pages: u64,
    pub(crate) read_only: bool,
    pub(crate) backing: Arc<SimBacking>,
    /// Neither being made nor being deleted.
    pub(crate) settled: bool,
}

impl Slot {
    /// Whether what is behind `gfn`, a page of it, is there, and its backing says so.
    pub(crate) fn is_here(&self, gfn: u64) -> bool {
        let page = self.backing.page(gfn - self.gfn);
        page.is_some_and(|page| !page.absent && page.refuses.is_none())
    }
    /// Whether the guest may write to what is behind `gfn`, a page of it.
    pub(crate) fn is_writable(&self, gfn: u64) -> bool {
        !self.read_only && self.backing.page(gfn - self.gfn).is_some_and(|page| page.writable)
    }
    /// Whether `pages` pages from guest frame `gfn` on lie in it and have the host frames from `frame` on, which the
    /// guest may write to, if it is to.
    pub(crate) fn holds(&self, gfn: u64, frame: u64, pages: u64, write: bool) -> bool {
        let Some(first) = gfn.checked_sub(self.gfn).filter(|first| first + pages <= self.pages) else {
            return false;
        };
        let allowed = |page: &Page| page.refuses.is_none() && !(write && (self.read_only || !page.writable));
        let held = self.backing.pages.lock().expect("one thread");
        match held.first() {
            Some(giant) if giant.size == PageSize::Size1G => {
                giant.pfn.raw() + first == frame && allowed(giant)
            }
            _ => held.get(first as usize..(first + pages) as usize).is_some_and(|span| {
                span.iter().zip(frame..).all(|(page, frame)| page.pfn.raw() == frame && allowed(page))
            }),
        }
    }
}

/// The model of one VM.
#[derive(Debug, Default)]
pub(crate) struct World {
    /// Slots; a place that a move leaves stands here twice for a while.
    pub(crate) slots: Vec<Slot>,
    /// Changes of slots so far: for whoever wants to know that nothing changed meanwhile.
    pub(crate) changes: u64,
    /// What is taken away just now, in every address space: no answer about it, of whatever kind, is given while it
    /// stands here.
    pub(crate) open: Vec<GfnRange>,
    /// Changes of `open`, and of what is absent.
    pub(crate) openings: u64,
    next_frame: u64,
    /// Frames given back, by how many go together.
    free: BTreeMap<u64, Vec<u64>>,
    /// How many single frames were given back of each block of 2 MiB.
    singles: BTreeMap<u64, u64>,
}

/// The model, shared by tasks.
pub(crate) type SharedWorld = Rc<RefCell<World>>;

impl World {
    pub(crate) fn new(first_frame: u64) -> Self {
        Self { next_frame: first_frame, ..Self::default() }
    }

    /// The frames that a guest in `space` may reach for `gfn` now, and whether it may write to them.
    pub(crate) fn allowed(&self, space: AddressSpace, gfn: u64) -> impl Iterator<Item = (Pfn, bool)> {
        self.at(space, gfn).filter_map(move |s| {
            let page = s.backing.page(gfn - s.gfn).filter(|page| page.refuses.is_none())?;
            Some((page.pfn, page.writable && !s.read_only))
        })
    }

    /// Changes of slots, and of what is open or absent, so far: while it is the same, so is the world.
    pub(crate) const fn moment(&self) -> (u64, u64) {
        (self.changes, self.openings)
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

    /// Whether `gfn` is taken away now.
    pub(crate) fn is_open(&self, gfn: u64) -> bool {
        self.open.iter().any(|range| range.contains(Gfn::new(gfn)))
    }

    /// Whether a backing may say `why` of `gfn` now instead of naming a frame.
    pub(crate) fn may_refuse(&self, space: AddressSpace, gfn: u64, why: ResolveError) -> bool {
        let page = |slot: &Slot| slot.backing.page(gfn - slot.gfn);
        if self.at(space, gfn).any(|slot| page(slot).is_some_and(|page| page.refuses == Some(why))) {
            return true;
        }
        let absent = self.at(space, gfn).any(|slot| page(slot).is_none_or(|page| page.absent));
        why == ResolveError::Unbacked && absent && !self.is_open(gfn)
    }

    /// Some slot of `space`.
    pub(crate) fn some_slot(&self, space: AddressSpace, random: &mut Random) -> Option<&Slot> {
        let of = || self.slots.iter().filter(|slot| slot.id.space() == space);
        let count = of().count() as u64;
        (count != 0).then(|| of().nth(random.below(count) as usize))?
    }

    /// Whether a slot, or what takes its place, is where it was when `slot` was looked up, and nowhere else.
    pub(crate) fn stays(&self, slot: &Slot) -> bool {
        let mut places = self.slots.iter().filter(|s| Arc::ptr_eq(&s.backing, &slot.backing)).peekable();
        places.peek().is_some() && places.all(|s| s.gfn == slot.gfn)
    }

    /// The slots of `space` that hold `gfn`, settled or not.
    pub(crate) fn at(&self, space: AddressSpace, gfn: u64) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(move |s| s.id.space() == space && s.gfn <= gfn && gfn < s.gfn + s.pages)
    }

    /// `count` consecutive frames, aligned to `count`: the ones given back last first, so that frames are reused soon.
    pub(crate) fn frames(&mut self, count: u64) -> u64 {
        if let Some(first) = self.free.get_mut(&count).and_then(Vec::pop) {
            if count == 1 {
                self.singles.entry(first / BLOCK).and_modify(|singles| *singles -= 1);
            }
            return first;
        }
        let first = self.next_frame.next_multiple_of(count);
        self.next_frame = first + count;
        first
    }

    /// Takes frames back; they must be out of everybody's reach.
    pub(crate) fn give_back(&mut self, first: u64, count: u64) {
        self.free.entry(count).or_default().push(first);
        if count == 1 {
            let block = first / BLOCK;
            let singles = self.singles.entry(block).or_default();
            *singles += 1;
            if *singles == BLOCK {
                // All of a large frame that was split: it is one again.
                self.singles.remove(&block);
                self.free.entry(1).or_default().retain(|frame| frame / BLOCK != block);
                self.free.entry(BLOCK).or_default().push(block * BLOCK);
            }
        }
    }
}
